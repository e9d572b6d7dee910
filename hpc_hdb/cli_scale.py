"""What hdb prints of scale: simulated timing, the topology that suits a plan, the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from hpc_hdb.cli_options import typed_option
from hpc_hdb.cluster.launcher import check_mpi, find_launcher
from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import TrainingPlan
from hpc_hdb.plan.topology import Topology
from hpc_hdb.report.terminal import find_console
from hpc_hdb.startup import lasting_imports

DEFAULT_COUNTS = "4,16,64,256,1024,4096,16384"

_PANEL = "With --timing-only"
_OF_TIMING = (
    "workers", "samples", "servers", "ranks_per_worker", "fan_out", "jitter", "as_json",
)  # fmt: skip
TimingOnly = Annotated[
    bool,
    typer.Option(
        "--timing-only",
        help="Train nothing: epoch time, waiting and server load of many workers.",
    ),
]
Counts = Annotated[
    str, typer.Option(metavar="N,N,...", rich_help_panel=_PANEL, help="Numbers of workers.")
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1, rich_help_panel=_PANEL, help="Training images; by default those of the data."
    ),
]
Servers = Annotated[
    int, typer.Option(min=1, rich_help_panel=_PANEL, help="Of the sharded topology.")
]
RanksPerWorker = Annotated[
    int, typer.Option(min=1, rich_help_panel=_PANEL, help="Of the grouped topology.")
]
FanOut = Annotated[
    int, typer.Option(min=2, rich_help_panel=_PANEL, help="Of the tree: most to one server.")
]
Jitter = Annotated[
    float,
    typer.Option(
        min=0, max=1, rich_help_panel=_PANEL, help="Standard deviation of rounds, of their mean."
    ),
]
TimingAsJson = Annotated[
    bool, typer.Option("--json", rich_help_panel=_PANEL, help="Print JSON instead of tables.")
]


def refuse_timing_options(context: typer.Context) -> None:
    """Raise UserError where an option is typed that only --timing-only heeds."""
    option = typed_option(context, _OF_TIMING)
    if option is not None:
        told = f"{option} goes with --timing-only"
        if option == "--workers":
            told += "; to train on so many: --set plan.workers=N"
        raise UserError(told)


def show_timing(
    settings: Settings,
    workers: str,
    samples: int | None,
    servers: int,
    ranks_per_worker: int,
    fan_out: int,
    jitter: float,
    as_json: bool,
) -> None:
    """Simulate the timing of a run with several numbers of workers, in all topologies."""
    counts = _counts(workers)

    from hpc_hdb.report.scale_tables import network_line, scaling_tables
    from hpc_hdb.report.units import format_count
    from hpc_hdb.run.network import find_network
    from hpc_hdb.run.scale import scaling_to_dict, simulate_scaling, workload_of

    network, source = find_network(settings)
    workload = workload_of(settings, samples)
    topologies = [
        Topology("star"),
        Topology("sharded", servers=servers),
        Topology("grouped", ranks_per_worker=ranks_per_worker),
        Topology("tree", fan_out=fan_out),
    ]
    commits = workload.commits_per_epoch
    console = find_console()
    with console.status("simulating ..."):
        scalings = simulate_scaling(settings, workload, network, topologies, counts, jitter)
    if as_json:
        values = scaling_to_dict(settings, workload, network, source, scalings)
        print(json.dumps(values, indent=2))
        return
    console.print(
        f"{settings.server.sync.upper()}: each worker commits {workload.model_bytes / 1e6:.1f} MB "
        f"{'once' if commits == 1 else f'{commits} times'} an epoch of "
        f"{format_count(workload.samples, 'image')}"
    )
    console.print(network_line(network, source), soft_wrap=True)
    for table in scaling_tables(scalings, settings.server.sync):
        console.print(table)
    most = max((row.ranks for scaling in scalings for row in scaling.rows), default=0)
    if most < max(counts):
        console.print(
            f"with more than {most:,} workers there is not a sample for each commit of an epoch",
            soft_wrap=True,
        )


class ShownAdvice(NamedTuple):
    """The recommended topology, as values for JSON and as a line."""

    values: dict[str, Any]
    line: str


def topology_advice(settings: Settings, plan: TrainingPlan) -> ShownAdvice | None:
    """The topology that suits a plan, from the simulated timing; None for all-reduce."""
    if settings.server.sync == "allreduce":
        return None

    from hpc_hdb.report.scale_tables import advice_line
    from hpc_hdb.run.network import find_network
    from hpc_hdb.run.scale import advise, workload_of

    network, source = find_network(settings)
    workload = workload_of(settings, plan.samples, plan.shares.workers)
    advice = advise(settings, workload, network, plan.shares.workers * plan.ranks)
    line = advice_line(advice, settings.server.sync, source, plan.ranks)
    return ShownAdvice(advice.to_dict() | {"network": source}, line)


def _counts(text: str) -> list[int]:
    """Numbers of workers as they are typed: 4,16,64."""
    try:
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise UserError(f"--workers {text}: give numbers from 1 up, such as --workers 4,64,1024")
    return counts


def measure(settings: Settings, output: Path) -> None:
    """Measure the network among the ranks of this job; the first of them prints and writes."""
    launched = find_launcher()
    if launched is None or launched.size < 2:
        raise UserError(
            "--network measures between ranks: mpirun -n RANKS hdb profile CONFIG --network, "
            "3 ranks or more to see what several workers cost"
        )
    check_mpi(launched)

    with lasting_imports():
        from hpc_hdb.report.scale_tables import network_table
        from hpc_hdb.run.network_profile import profile_network

    network, path = profile_network(settings, output)
    if network is not None:
        console = find_console()
        console.print(network_table(network))
        if launched.size == 2:
            console.print("two ranks do not show what several workers cost: start more")
        console.print(f"written to {path}", soft_wrap=True)
