"""From ranks to roles: first the parameter servers, then the large-batch and the small group."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_hdb.errors import UserError
from hpc_hdb.plan import Group

SERVER = 0
"""Rank of the root server, which decides for all servers."""


def check_roles(
    ranks: int, small_workers: int, servers: int = 1, ranks_per_worker: int = 1
) -> None:
    """Raise UserError where `ranks` do not make servers, workers and `small_workers` of them."""
    if ranks <= servers:
        needed = "a server" if servers == 1 else f"server.servers = {servers} servers"
        instead = "" if servers == 1 else ", or lower server.servers"
        raise UserError(
            f"{ranks} rank{'s are' if ranks > 1 else ' is'} too few: start at least {servers + 1} "
            f"({needed} and a worker), such as mpirun -n {servers + 4} hdb train CONFIG{instead}"
        )
    workers = count_workers(ranks, servers, ranks_per_worker)
    if small_workers > workers:
        raise UserError(
            f"plan.small_workers = {small_workers} does not fit the {workers} "
            f"worker{'s' if workers > 1 else ''} of {ranks} ranks: set it to {workers} or less, "
            "or start more ranks"
        )


def count_workers(ranks: int, servers: int, ranks_per_worker: int) -> int:
    """Workers that the ranks beside the servers make.

    Raises
    ------
    UserError
        If they do not divide.
    """
    workers, rest = divmod(ranks - servers, ranks_per_worker)
    if workers > 0 and not rest:
        return workers
    counts = sorted({max(workers, 1), max(workers, 0) + 1})
    fitting = " or ".join(str(servers + ranks_per_worker * count) for count in counts)
    serving = "a server" if servers == 1 else f"{servers} servers"
    raise UserError(
        f"{ranks} ranks do not divide into {serving} and workers of server.ranks_per_worker = "
        f"{ranks_per_worker} ranks: start {fitting}"
    )


def place_workers(nodes: Sequence[int], ranks_per_worker: int, servers: int = 1) -> list[list[int]]:
    """Which ranks make up each worker: ranks of one node wherever the launcher allows it.

    Parameters
    ----------
    nodes : sequence of int, one for each rank
        The node on which it runs, as any number.
    ranks_per_worker : int
        Divides the number of ranks beside the servers.
    servers : int
        The first ranks.

    Returns
    -------
    list of list of int
        Ranks of worker 1, 2, ..., each led by its first; in the order of their leaders.
    """
    by_node: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        if rank >= servers:
            by_node.setdefault(node, []).append(rank)
    workers, rest = [], []
    for ranks in by_node.values():
        whole = len(ranks) - len(ranks) % ranks_per_worker
        workers += _cut(ranks[:whole], ranks_per_worker)
        rest += ranks[whole:]
    return sorted(workers + _cut(sorted(rest), ranks_per_worker))


def _cut(ranks: list[int], size: int) -> list[list[int]]:
    return [ranks[start : start + size] for start in range(0, len(ranks), size)]


def group_of(worker: int, workers: int, small_workers: int) -> Group:
    """Group of worker number `worker`, 1 to `workers`: the last ones train the small batch."""
    return Group.SMALL if worker > workers - small_workers else Group.LARGE
