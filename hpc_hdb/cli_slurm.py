"""The ``slurm`` command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpc_hdb.cluster.roles import check_roles, count_workers
from hpc_hdb.config import Settings, load_settings
from hpc_hdb.errors import UserError
from hpc_hdb.report.terminal import find_console
from hpc_hdb.run.launchers import find_job_launcher
from hpc_hdb.run.sbatch import Options, check_options, limit_seconds, submit, typed_options
from hpc_hdb.run.site import Site, load_site
from hpc_hdb.run.slurm import (
    Job,
    is_as_written,
    profile_script,
    template_option,
    training_script,
)

if TYPE_CHECKING:
    from rich.console import Console

    from hpc_hdb.plan import TrainingPlan

_JOB, _SITE, _RUN = "The job", "The cluster (defaults: site file)", "The run"


def slurm(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG...", help="A TOML file, or a preset's name; several are a job array."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Override a setting.", rich_help_panel=_RUN
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of workers.", rich_help_panel=_JOB)] = 1,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="By default as many as there are GPUs for; without GPUs plan.workers.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    server_partition: Annotated[
        str | None,
        typer.Option(
            metavar="PARTITION",
            help="Put each server on a node of its own there (a heterogeneous job).",
            rich_help_panel=_JOB,
        ),
    ] = None,
    chain: Annotated[
        bool,
        typer.Option(
            "--chain",
            help="Interrupted, submit a next job instead of requeueing this one.",
            rich_help_panel=_JOB,
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Measure timing.json on one device instead.", rich_help_panel=_JOB
        ),
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            help="The run folder; one that holds a run is gone on with.", rich_help_panel=_RUN
        ),
    ] = None,
    stage: Annotated[
        bool,
        typer.Option(
            "--stage",
            help="Copy packed images to each node's own disk first.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Training images, for the prediction; else counted.", rich_help_panel=_RUN
        ),
    ] = None,
    job_name: Annotated[
        str | None, typer.Option(help="By default the CONFIG's.", rich_help_panel=_JOB)
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Limit, as 12:00:00 or 1-12.", rich_help_panel=_SITE)
    ] = None,
    account: Annotated[str | None, typer.Option(help="Account.", rich_help_panel=_SITE)] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.", rich_help_panel=_SITE)] = None,
    qos: Annotated[str | None, typer.Option(help="Quality.", rich_help_panel=_SITE)] = None,
    constraint: Annotated[
        str | None, typer.Option(help="Features of nodes.", rich_help_panel=_SITE)
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a node, as 64G.", rich_help_panel=_SITE)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs of a node.", rich_help_panel=_SITE)
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, help="Slurm's CPUs of a rank.", rich_help_panel=_SITE)
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(help="mpirun, 'srun --mpi=pmix', ...: see hdb doctor.", rich_help_panel=_SITE),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]", help="Any option of sbatch; repeatable.", rich_help_panel=_SITE
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="SCRIPT",
            help="By default NAME.sbatch, or NAME-profile.sbatch.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the script.")] = False,
    submitted: Annotated[bool, typer.Option("--submit", help="Submit it.")] = False,
) -> None:
    """Write a job script for Slurm, or submit it; shows ranks and predicted time."""
    settings = [load_settings(config, overrides or ()) for config in configs]
    site = _site(
        time=time,
        account=account,
        partition=partition,
        qos=qos,
        constraint=constraint,
        memory=memory,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        launcher=launcher,
    )
    name = Path(configs[0]).stem
    if job_name is None:
        job_name = name if len(configs) == 1 else f"{name}+{len(configs) - 1}"
    shared = _ranks_per_worker(settings[0])
    training_ranks = workers * shared if workers else nodes * site.gpus_per_node
    job = Job(
        configs,
        overrides or (),
        job_name,
        training_ranks or settings[0].plan.workers * shared,
        settings[0].server.server_ranks,
        nodes,
        site.gpus_per_node,
        server_partition,
        run or (settings[0].run.output if len(configs) == 1 else None),
        settings[0].data.path if stage else None,
        chain,
        Path.cwd(),
        _options(site, sbatch or ()),
    )
    console = find_console()
    script = output or Path(f"{name}-profile.sbatch" if profile else f"{name}.sbatch")
    if profile:
        if len(configs) > 1:
            raise UserError("--profile measures for one CONFIG: leave out the others")
        _write(script, profile_script(job, site, Path("timing.json")), force)
        console.print("measures batch times on one device, and writes timing.json", highlight=False)
    else:
        _check(job, settings)
        found_launcher = find_job_launcher(site.launcher)
        text = training_script(job, site, found_launcher)
        limit = limit_seconds(site.time or template_option(job.template, "time"))
        lines = [
            _time_line(config, its, job.workers, samples, limit, site.grace)
            for config, its in zip(configs, settings, strict=True)
        ]
        if site.launcher == "auto" and found_launcher.kind == "srun":
            lines.append(
                "no mpirun here, so plain srun starts the ranks: whether it can, or with which "
                "--mpi=..., is told by sbatch --ntasks=2 --wrap='hdb doctor'; then --launcher"
            )
        _write(script, text, force)
        _show(console, job, site, lines)
    if submitted:
        number = submit(script)
        console.print(
            f"submitted {script} as job {number}; watch it with squeue -j {number}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    else:
        typed = shlex.quote(str(script))
        console.print(
            f"written to {script}; submit it with: sbatch {typed}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _site(**typed: str | int | None) -> Site:
    """The site file's defaults, and what was typed."""
    chosen = {key: value for key, value in typed.items() if value is not None}
    return load_site().model_copy(update=chosen)


def _options(site: Site, typed: Sequence[str]) -> Options:
    """Further options of sbatch: those of the site file, and what was typed."""
    of_site = {
        name: value if isinstance(value, bool) else str(value)
        for name, value in site.options.items()
    }
    options = of_site | typed_options(typed)
    check_options(options)
    return options


def _ranks_per_worker(settings: Settings) -> int:
    """How many ranks a worker takes; with all-reduce every rank counts as one."""
    server = settings.server
    return 1 if server.sync == "allreduce" else server.ranks_per_worker


def _workers(settings: Settings, ranks: int) -> int:
    """Of so many ranks that train, the workers that a plan is made for."""
    server = settings.server
    if server.sync == "allreduce":
        return ranks
    return count_workers(ranks + server.servers, server.servers, server.ranks_per_worker)


def _check(job: Job, settings: Sequence[Settings]) -> None:
    """Raise UserError for what would end the job as it starts."""
    for its in settings:
        server = its.server
        if server.server_ranks != job.servers:
            raise UserError("the CONFIGs of a job array must have as many servers as one another")
        if server.sync != "allreduce":
            ranks = job.workers + job.servers
            check_roles(ranks, its.plan.small_workers, job.servers, server.ranks_per_worker)
    if not job.servers and job.server_partition is not None:
        raise UserError('server.sync = "allreduce" has no server: leave out --server-partition')
    most = job.nodes * job.gpus_per_node
    if most and job.workers > most:
        raise UserError(
            f"{job.workers} ranks that train: {job.nodes} nodes of {job.gpus_per_node} GPUs have "
            f"room for {most}, one on each: lower --workers"
        )
    sources = {(its.data.source, its.data.path) for its in settings}
    if job.shards is not None and sources != {("shards", job.shards)}:
        raise UserError(
            "--stage copies packed images, the same for all CONFIGs: pack them with hdb pack, "
            "then --set data.source=shards --set data.path=..."
        )


def _time_line(
    config: str, settings: Settings, ranks: int, samples: int | None, limit: float, grace: int
) -> str:
    """What is predicted, or why nothing is."""
    from hpc_hdb.report.job_tables import time_lines

    plan = _plan(settings, _workers(settings, ranks), samples)
    if isinstance(plan, str):
        return f"{config}: no prediction: {plan}"
    return f"{config}: {time_lines(plan, limit, grace)}"


def _plan(settings: Settings, workers: int, samples: int | None) -> TrainingPlan | str:
    """The plan, or why there is none beforehand."""
    from hpc_hdb.run.planning import known_timing, make_plan
    from hpc_hdb.train.data import count_images

    timing = known_timing(settings, workers)
    if timing is None:
        return "batch times are measured as the run starts (or beforehand, with --profile)"
    if samples is None:
        try:
            samples = count_images(settings.data)
        except UserError as error:
            return f"{error} (or give --samples)"
    return make_plan(settings, workers, samples, timing)


def _write(script: Path, text: str, force: bool) -> None:
    try:
        if not force and script.exists():
            there = script.read_text(encoding="utf-8", errors="surrogateescape")
            if there != text and not is_as_written(there):
                raise UserError(
                    f"{script} exists and is another script, or was edited: choose another "
                    "--output, or --force"
                )
        script.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot write {script}: {error.strerror}") from None


def _show(console: Console, job: Job, site: Site, lines: Sequence[str]) -> None:
    from hpc_hdb.report.job_tables import layout_table

    console.print(layout_table(job.layout, job.gpus_per_node, site.cpus_per_task))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
