"""A virtual clock: coroutines that run one at a time, in the order of simulated time."""

from __future__ import annotations

import heapq
from collections.abc import Coroutine, Generator, Mapping
from typing import Any


class Suspend:
    """Awaiting it hands control back to the clock."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class Clock:
    """A discrete-event simulation: who asked to be woken first runs first, ties by rank.

    Attributes
    ----------
    time : float
        Virtual seconds since the start.
    """

    def __init__(self) -> None:
        self.time = 0.0
        self._events: list[tuple[float, int]] = []

    def wake(self, rank: int, delay: float = 0.0) -> None:
        """Let `rank` run again after `delay` virtual seconds."""
        heapq.heappush(self._events, (self.time + delay, rank))

    def run_ranks(self, coroutines: Mapping[int, Coroutine[Any, Any, Any]]) -> dict[int, Any]:
        """Run all ranks to their end; what they returned, by rank.

        Raises
        ------
        RuntimeError
            If every rank waits for another.
        """
        ranks = dict(coroutines)
        results: dict[int, Any] = {}
        try:
            for rank in ranks:
                self.wake(rank)
            while self._events:
                self.time, rank = heapq.heappop(self._events)
                if rank not in ranks:
                    continue
                try:
                    ranks[rank].send(None)
                except StopIteration as end:
                    del ranks[rank]
                    results[rank] = end.value
            if ranks:
                raise RuntimeError(f"ranks {sorted(ranks)} wait for each other")
        finally:
            for coroutine in ranks.values():
                coroutine.close()
        return results
