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
    server : bool
        Whether the first of them is the parameter server.
    """

    first: int
    last: int
    server: bool

    @property
    def ranks(self) -> int:
        return self.last - self.first + 1

    @property
    def workers(self) -> int:
        return self.ranks - self.server


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


def lay_out(workers: int, nodes: int, server_apart: bool = False) -> tuple[NodeRanks, ...]:
    """The ranks of each node, the server's node first.

    Parameters
    ----------
    server_apart : bool
        Whether the server has a node of its own, beside the `nodes` of the workers.

    Raises
    ------
    UserError
        If there are fewer workers than nodes.
    """
    laid_out = [NodeRanks(0, 0, server=True)] if server_apart else []
    for count in spread_workers(workers, nodes):
        first = laid_out[-1].last + 1 if laid_out else 0
        server = first == 0
        laid_out.append(NodeRanks(first, first + count - 1 + server, server))
    return tuple(laid_out)
