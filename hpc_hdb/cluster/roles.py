"""From ranks to roles: first the parameter servers, then the large-batch and the small group."""

from __future__ import annotations

from hpc_hdb.errors import UserError
from hpc_hdb.plan import Group

SERVER = 0
"""Rank of the root server, which decides for all servers."""


def check_roles(ranks: int, small_workers: int, servers: int = 1) -> None:
    """Raise UserError where `ranks` do not make servers, workers and `small_workers` of them."""
    if ranks <= servers:
        needed = "a server" if servers == 1 else f"server.servers = {servers} servers"
        instead = "" if servers == 1 else ", or lower server.servers"
        raise UserError(
            f"{ranks} rank{'s are' if ranks > 1 else ' is'} too few: start at least {servers + 1} "
            f"({needed} and a worker), such as mpirun -n {servers + 4} hdb train CONFIG{instead}"
        )
    workers = ranks - servers
    if small_workers > workers:
        raise UserError(
            f"plan.small_workers = {small_workers} does not fit the {workers} "
            f"worker{'s' if workers > 1 else ''} of {ranks} ranks: set it to {workers} or less, "
            "or start more ranks"
        )


def group_of(worker: int, workers: int, small_workers: int) -> Group:
    """Group of worker number `worker`, 1 to `workers`: the last ones train the small batch."""
    return Group.SMALL if worker > workers - small_workers else Group.LARGE
