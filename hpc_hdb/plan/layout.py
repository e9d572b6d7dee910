"""Which node each rank of a job runs on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hpc_hdb.errors import UserError


@dataclass(frozen=True)
class NodeRanks:
    """The ranks of one node, which follow one another.

    Attributes
    ----------
    first, last : int
        Ranks.
    servers : int
        How many of them, the first ones, are parameter servers.
    """

    first: int
    last: int
    servers: int

    @property
    def ranks(self) -> int:
        return self.last - self.first + 1

    @property
    def workers(self) -> int:
        return self.ranks - self.servers


def spread_workers(workers: int, nodes: int) -> tuple[int, ...]:
    """Workers of each node: as equal as can be, and the later ones have more.

    Raises
    ------
    UserError
        If there are fewer workers than nodes.

    Examples
    --------
    >>> spread_workers(8, 2), spread_workers(3, 2), spread_workers(5, 3)
    ((4, 4), (1, 2), (1, 2, 2))
    """
    if workers < nodes:
        raise UserError(f"{workers} workers leave some of {nodes} nodes empty: ask for fewer nodes")
    counts = Counter((worker * nodes + nodes - 1) // workers for worker in range(workers))
    return tuple(counts[node] for node in range(nodes))


def lay_out(
    workers: int, nodes: int, servers: int = 1, servers_apart: bool = False
) -> tuple[NodeRanks, ...]:
    """The ranks of each node, the servers' first.

    Parameters
    ----------
    workers, nodes : int
        The `nodes` have workers.
    servers_apart : bool
        Whether each server has a node of its own, beside those; else the first node has them all.

    Raises
    ------
    UserError
        If there are fewer workers than nodes.
    """
    counts = spread_workers(workers, nodes)
    if servers_apart:
        parts = [(1, 0)] * servers + [(0, count) for count in counts]
    else:
        parts = [(servers, counts[0]), *((0, count) for count in counts[1:])]
    laid_out = []
    first = 0
    for own_servers, own_workers in parts:
        laid_out.append(NodeRanks(first, first + own_servers + own_workers - 1, own_servers))
        first = laid_out[-1].last + 1
    return tuple(laid_out)
