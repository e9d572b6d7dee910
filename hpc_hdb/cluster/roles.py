"""From ranks to roles: rank 0 is the parameter server, then come the large and the small group."""

from __future__ import annotations

from hpc_hdb.errors import UserError
from hpc_hdb.plan import Group

SERVER = 0
"""Rank of the parameter server."""


def check_roles(ranks: int, small_workers: int) -> None:
    """Raise UserError where `ranks` do not make a server, workers and `small_workers` of them."""
    if ranks < 2:
        raise UserError(
            f"{ranks} rank is too few: start at least 2 (a server and a worker), "
            "such as mpirun -n 5 hdb train CONFIG"
        )
    if small_workers > ranks - 1:
        raise UserError(
            f"plan.small_workers = {small_workers} does not fit the {ranks - 1} workers of "
            f"{ranks} ranks: set it to {ranks - 1} or less, or start more ranks"
        )


def group_of(rank: int, ranks: int, small_workers: int) -> Group:
    """Group of worker `rank`: the last `small_workers` ranks train with the small batch."""
    return Group.SMALL if rank >= ranks - small_workers else Group.LARGE
