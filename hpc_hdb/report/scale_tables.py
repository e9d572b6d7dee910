"""Tables of how a run scales, and the advice that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_hdb.plan.network import Network
from hpc_hdb.plan.topology import Topology
from hpc_hdb.report.tables import TextTable
from hpc_hdb.report.units import format_count, format_number, format_seconds

if TYPE_CHECKING:
    from hpc_hdb.run.scale import Advice, Scaling


def scaling_tables(scalings: list[Scaling], sync: str) -> list[TextTable]:
    """One table for each topology that has rows."""
    tables = []
    for scaling in scalings:
        rows = [
            (
                f"{row.ranks:,}",
                f"{row.servers:,}",
                format_seconds(row.epoch_seconds),
                _percent(row.timing.train_seconds / row.timing.round_seconds),
                _percent(row.timing.communicate_seconds / row.timing.round_seconds),
                _percent(row.timing.wait_seconds / row.timing.round_seconds),
                _percent(row.timing.server_load),
            )
            for row in scaling.rows
        ]
        columns = (
            "workers", "servers", "epoch", "training", "communicating", "waiting", "server load",
        )  # fmt: skip
        if rows:
            title = f"{describe(scaling.topology)}: {_saturation(scaling, sync)}"
            note = "workers: all ranks that train" if scaling.topology.name == "grouped" else ""
            tables.append(TextTable(title, columns, rows, note))
    return tables


def describe(topology: Topology) -> str:
    """A topology in words."""
    if topology.name == "sharded":
        return f"Sharded, {topology.servers} servers"
    if topology.name == "grouped":
        return f"Grouped, {topology.ranks_per_worker} ranks a worker"
    if topology.name == "tree":
        return f"Tree, {topology.fan_out} to a server"
    return "Star, one server"


def _saturation(scaling: Scaling, sync: str) -> str:
    if scaling.saturation is None:
        return "never the limit"
    if sync == "bsp":
        return f"merging takes longer than training from {scaling.saturation:,} workers on"
    return f"saturates at {scaling.saturation:,} workers"


def network_line(network: Network, source: str) -> str:
    """The constants that matter most, and where they are from."""
    return (
        f"network: a model comes at {network.bandwidth / 1e9:.3g} GB/s after "
        f"{network.latency * 1e6:.3g} µs, a server takes {network.server_rate / 1e9:.3g} GB/s "
        f"({source})"
    )


def network_table(network: Network) -> TextTable:
    """All constants, as `hdb profile --network` measured them."""
    rows = [
        ("latency of a message", f"{network.latency * 1e6:.3g} µs"),
        ("bandwidth of one transfer", _rate(network.bandwidth)),
        ("merge at the server", _rate(network.merge_rate)),
        ("server's time for a commit of no bytes", f"{network.overhead * 1e6:.3g} µs"),
        ("commits, one worker", _rate(network.commit_rate)),
        ("commits, several workers at once", _rate(network.server_rate)),
        ("BSP reduction, one worker", _rate(network.reduce_rate)),
        ("BSP reduction, each further worker", _rate(network.exchange_rate)),
        (
            "BSP reduction, all workers together",
            "no limit seen" if network.fabric_rate is None else _rate(network.fabric_rate),
        ),
        ("latency within a node", f"{network.node_latency * 1e6:.3g} µs"),
        ("bandwidth within a node", _rate(network.node_bandwidth)),
    ]
    return TextTable("Network", ("constant", "measured"), rows)


def advice_line(advice: Advice, sync: str, source: str, ranks_per_worker: int) -> str:
    """The recommended topology and why, in one line.

    Parameters
    ----------
    sync, ranks_per_worker
        Of the plan that is advised on.
    source : str
        Where the network's constants are from.
    """
    star, row, topology = advice.star, advice.row, advice.topology
    workers = format_count(star.ranks, "worker") + (" of one rank" if ranks_per_worker > 1 else "")
    limit = ""
    if advice.saturation is not None:
        limit = f", and {'outweighs training' if sync == 'bsp' else 'saturates'} "
        limit += f"at {advice.saturation:,}"
    if topology.name == "star":
        what = "merging takes" if sync == "bsp" else "it is busy"
        return (
            f"topology: one server: {what} {_percent(star.timing.server_load)} of the time with "
            f"{workers}{limit} (network: {source})"
        )
    key = (
        f"server.servers = {topology.servers}"
        if topology.name == "sharded"
        else f"server.ranks_per_worker = {topology.ranks_per_worker}"
    )
    return (
        f"topology: {key}: an epoch takes {format_seconds(row.epoch_seconds)} instead of "
        f"{format_seconds(star.epoch_seconds)} with {workers}; one server"
        f"{limit.removeprefix(', and') or ' is slower'} (network: {source})"
    )


def _percent(part: float) -> str:
    return "<0.1%" if 0 < part < 0.001 else f"{part:.1%}"


def _rate(value: float) -> str:
    return f"{format_number(value / 1e9)} GB/s"
