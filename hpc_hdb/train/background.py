"""Work beside the server's loop: evaluations and checkpoints never hold a worker back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Background(Generic[T]):
    """Runs one job at a time, in a thread; what its `done` does runs in the caller's thread.

    Parameters
    ----------
    inline : bool
        Run each job at once instead, in the caller's thread (on the virtual clock).
    """

    def __init__(self, inline: bool = False) -> None:
        self._executor: ThreadPoolExecutor | None = None
        if not inline:
            # A thread starts with torch's default of all cores, whatever the rank was given.
            self._executor = ThreadPoolExecutor(
                1, initializer=_use_threads(torch.get_num_threads())
            )
        self._job: tuple[Future[T], Callable[[T], None]] | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None

    def start(self, work: Callable[[], T], done: Callable[[T], None]) -> None:
        """Start `work`, once any job before it has ended; `done` gets its result."""
        self.wait()
        if self._executor is None:
            done(work())
        else:
            self._job = (self._executor.submit(work), done)

    def poll(self) -> None:
        """Finish the job if it has ended. Raises what the job raised."""
        if self._job is not None and self._job[0].done():
            self.wait()

    def ends_within(self, seconds: float) -> bool:
        """Wait at most so long for the job; whether it has ended, or there is none."""
        return self._job is None or bool(wait_for([self._job[0]], seconds).done)

    def wait(self) -> None:
        """Wait for the job, if there is one, and finish it. Raises what the job raised."""
        if self._job is not None:
            (future, done), self._job = self._job, None
            done(future.result())


def _use_threads(count: int) -> Callable[[], None]:
    return lambda: torch.set_num_threads(count)
