"""How a model's buffer is cut: into parts, and for several servers into slices of whole parts.

A *part* is what one message carries, so that it can be merged while the next one arrives. A
*slice* is what one server keeps: consecutive parts. The parts depend on the size of the model
alone, never on the number of servers: every merge and every reduction is done part by part, so
it is the same arithmetic on the same operands however many servers share the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest

_FEWEST, _USUAL = 8, 32
"""Parts of a model: the usual number, unless they would be too short or too long."""
_SHORTEST, _LONGEST = 1 << 14, 1 << 20
"""Floats of a part: a shorter one costs more than it saves, a longer one no longer stays in a
core's cache from arrival to reply."""


@dataclass(frozen=True)
class Slices:
    """A buffer of `size` floats, spread over `servers` in contiguous slices.

    >>> Slices(size=96, servers=2).bounds(1)
    (48, 96)
    >>> Slices(size=96, servers=2).parts(1)[0]
    slice(48, 60, None)
    """

    size: int
    servers: int

    def parts(self, server: int) -> list[slice]:
        """The parts of that server's slice, as positions in the whole buffer; none is empty."""
        usual = min(_USUAL, self.size // _SHORTEST)
        number = max(_FEWEST, usual, -(-self.size // _LONGEST))
        first, end = (number * limit // self.servers for limit in (server, server + 1))
        cuts = [self.size * part // number for part in range(first, end + 1)]
        return [slice(*cut) for cut in pairwise(cuts) if cut[0] < cut[1]]

    def bounds(self, server: int) -> tuple[int, int]:
        """Where that server's slice begins and ends."""
        parts = self.parts(server)
        return (parts[0].start, parts[-1].stop) if parts else (0, 0)

    def interleaved(self) -> list[tuple[int, slice]]:
        """All parts with their servers, taking turns, so that no server waits for another."""
        by_server = [[(s, part) for part in self.parts(s)] for s in range(self.servers)]
        return [item for item in chain(*zip_longest(*by_server)) if item is not None]


def share_of_sum(size: int, worker: int, workers: int) -> slice:
    """The elements of a sum of `size` floats that worker number `worker`, from 0, adds up."""
    return slice(size * worker // workers, size * (worker + 1) // workers)


def overlap(one: slice, other: slice) -> slice:
    """What two ranges have in common; empty where that is nothing."""
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))
