"""The ``hdb`` command: parses, calls, prints.

What needs torch is imported within the commands, so that the others answer at once.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hpc_hdb import __version__
from hpc_hdb.cli_doctor import doctor
from hpc_hdb.cli_scale import (
    DEFAULT_COUNTS,
    Counts,
    FanOut,
    Jitter,
    RanksPerWorker,
    Samples,
    Servers,
    TimingAsJson,
    TimingOnly,
    measure,
    refuse_timing_options,
    show_timing,
    topology_advice,
)
from hpc_hdb.cli_shards import pack, verify
from hpc_hdb.cli_slurm import slurm
from hpc_hdb.cluster.launcher import check_mpi, find_launcher, leave
from hpc_hdb.config import Settings, load_settings, preset_names
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, plan_dual_batch
from hpc_hdb.report.terminal import find_console
from hpc_hdb.startup import lasting_imports

app = typer.Typer(
    name="hdb",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Hybrid dual-batch and cyclic progressive learning for clusters.",
    epilog=f"CONFIG is a TOML file or the name of a preset: {', '.join(preset_names())}.",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or a preset's name.")]
MaybeConfig = Annotated[
    str | None, typer.Argument(metavar="[CONFIG]", help="A TOML file, or a preset's name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Resume = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run's folder.")
]

Best = Annotated[
    bool,
    typer.Option(
        "--best",
        help="With --resume: go back to the checkpoint of the best accuracy, and drop later ones.",
    ),
]
DataCopy = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="A copy of data.path to read, as on a node's own disk."),
]

_UsageError: Any = typer.BadParameter.__base__


def _show_version(asked: bool) -> None:
    if asked:
        print(f"hdb {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command()
def profile(
    config: Config,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Where to write it.")] = Path("timing.json"),
    bound: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Largest batch to try; by default what fits the GPU, or on a CPU the configured "
            "one up to 256.",
        ),
    ] = None,
    network: Annotated[
        bool,
        typer.Option(
            "--network", help="Under mpirun: measure the network instead, into network.json."
        ),
    ] = False,
) -> None:
    """Measure the time model and the largest batch of each resolution on this device."""
    settings = load_settings(config, overrides or ())
    if network:
        measure(settings, output)
        return

    with lasting_imports():
        from hpc_hdb.report.plan_tables import timing_table
        from hpc_hdb.run.profiling import profile_device

    console = find_console()
    with console.status("measuring batch times ..."):
        timings = profile_device(settings, bound, output)
    console.print(timing_table(timings))
    console.print(f"written to {output}; use it with --set plan.timing={output}", soft_wrap=True)


@app.command()
def plan(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    seconds_per_image: Annotated[
        float | None, typer.Option(help="a, the time of one more image in a batch, in seconds.")
    ] = None,
    overhead: Annotated[
        float | None, typer.Option(help="c, the fixed time of a batch, in seconds.")
    ] = None,
    large_batch: Annotated[int | None, typer.Option(help="B_L, in images.")] = None,
    samples: Annotated[int | None, typer.Option(help="D, training images per epoch.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="n.")] = None,
    small_workers: Annotated[int | None, typer.Option(help="n_S, of the n.")] = None,
    time_ratio: Annotated[
        float | None, typer.Option(help="k: epoch time relative to large batches alone.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Solve the dual-batch plan: of a configuration, or of figures on the command line."""
    from hpc_hdb.report.plan_notes import plan_notes
    from hpc_hdb.report.plan_tables import dual_batch_table
    from hpc_hdb.report.tables import plan_table

    figures = {
        "--seconds-per-image": seconds_per_image,
        "--overhead": overhead,
        "--large-batch": large_batch,
        "--samples": samples,
        "--workers": workers,
    }
    console = find_console()
    if config is not None:
        measured = [name for name, value in list(figures.items())[:3] if value is not None]
        if measured:
            raise UserError(f"{measured[0]} cannot be given beside a CONFIG, which has its own")
        settings = load_settings(
            config,
            [
                *(overrides or ()),
                *([f"plan.small_workers={small_workers}"] if small_workers is not None else ()),
                *([f"plan.time_ratio={time_ratio}"] if time_ratio is not None else ()),
            ],
        )
        solved = _plan_of(settings, workers, samples)
        advice = topology_advice(settings, solved)
        if as_json:
            print(json.dumps(solved.to_dict() | {"topology": advice.values}, indent=2))
        else:
            console.print(plan_table(solved))
            for note in (*plan_notes(solved, settings), advice.line):
                console.print(note, highlight=False, soft_wrap=True)
        return
    if overrides:
        raise UserError(f"--set {overrides[0]} changes a CONFIG: give one, or leave it out")
    missing = [name for name, value in figures.items() if value is None]
    if missing:
        raise UserError(f"give a CONFIG, or {', '.join(missing)} too")
    dual = plan_dual_batch(
        BatchTime(seconds_per_image or 0, overhead or 0),
        large_batch or 0,
        samples or 0,
        workers or 0,
        small_workers or 0,
        1.0 if time_ratio is None else time_ratio,
    )
    if as_json:
        print(json.dumps(asdict(dual), indent=2))
    else:
        console.print(dual_batch_table(dual))


def _plan_of(settings: Settings, workers: int | None, samples: int | None) -> Any:
    with lasting_imports():
        from hpc_hdb.run.planning import known_timing, make_plan
        from hpc_hdb.train.data import count_images

    timing = known_timing(settings, workers)
    if timing is None:
        raise UserError(
            'plan.timing = "profile" is measured when a run starts: for a plan beforehand '
            "write timing.json with 'hdb profile', then --set plan.timing=timing.json"
        )
    if samples is None:
        try:
            samples = count_images(settings.data)
        except UserError as error:
            raise UserError(f"{error}; or give their number: --samples") from None
    return make_plan(settings, workers or settings.plan.workers, samples, timing)


@app.command()
def schedule(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[
        int | None, typer.Option(help="Training images; by default those of the data.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the stages: epochs, learning rate, resolution, dropout, batches."""
    from hpc_hdb.report.plan_tables import rate_note, schedule_table

    settings = load_settings(config, overrides or ())
    if settings.plan.timing == "profile":
        stages = settings.schedule.stages()
    else:
        stages = _plan_of(settings, None, samples).stages
    if as_json:
        known = [{k: v for k, v in asdict(stage).items() if v is not None} for stage in stages]
        print(json.dumps(known, indent=2))
    else:
        console = find_console()
        console.print(schedule_table(stages))
        workers = 1 if settings.server.sync == "allreduce" else settings.plan.workers
        if note := rate_note(settings.schedule, workers):
            console.print(note, highlight=False, soft_wrap=True)


@app.command()
def train(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    best: Best = False,
    data_copy: DataCopy = None,
) -> None:
    """Train: under mpirun or srun with a rank each, alone on the virtual cluster."""
    launched = find_launcher()
    if launched is None:
        if data_copy is not None:
            raise UserError("--data-copy is for ranks under a launcher: set data.path instead")
        _train_virtually(config, overrides, resume, best, noted=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training, ends the rank, so the job
    check_mpi(launched)
    settings, name = _settings_to_train(config, overrides, resume, best)

    with lasting_imports():
        from hpc_hdb.report.progress import Progress
        from hpc_hdb.run.over_mpi import train_over_mpi

    progress = Progress(find_console())
    raise typer.Exit(train_over_mpi(settings, name, resume, best, progress, data_copy))


@app.command()
def simulate(
    context: typer.Context,
    config: MaybeConfig = None,
    overrides: Overrides = None,
    resume: Resume = None,
    best: Best = False,
    timing_only: TimingOnly = False,
    workers: Counts = DEFAULT_COUNTS,
    samples: Samples = None,
    servers: Servers = 4,
    ranks_per_worker: RanksPerWorker = 8,
    fan_out: FanOut = 32,
    jitter: Jitter = 0.05,
    as_json: TimingAsJson = False,
) -> None:
    """Train on the virtual cluster: the same run in one process, timed by the time model."""
    launched = find_launcher()
    if launched is not None and launched.size > 1:
        raise UserError("hdb simulate is one process: start it without a launcher, or hdb train")
    if timing_only:
        if config is None or resume is not None:
            raise UserError("--timing-only takes a CONFIG, and no --resume")
        settings = load_settings(config, overrides or ())
        show_timing(settings, workers, samples, servers, ranks_per_worker, fan_out, jitter, as_json)
        return
    refuse_timing_options(context)
    _train_virtually(config, overrides, resume, best, noted=False)


def _train_virtually(
    config: str | None,
    overrides: list[str] | None,
    resume: Path | None,
    best: bool,
    noted: bool,
) -> NoReturn:
    settings, name = _settings_to_train(config, overrides, resume, best)

    with lasting_imports():
        from hpc_hdb.report.progress import Progress
        from hpc_hdb.run.virtually import train_virtually

    progress = Progress(find_console())
    if noted:
        progress.note(
            "no launcher: the workers are simulated in this process, on a virtual clock\n"
            "(for real ones: mpirun -n 5 hdb train ...)"
        )
    raise typer.Exit(train_virtually(settings, name, resume, best, progress))


def _settings_to_train(
    config: str | None, overrides: list[str] | None, resume: Path | None, best: bool
) -> tuple[Settings, str]:
    """The settings and a name for the run folder; a resumed run has both already."""
    if config is None and resume is None:
        raise UserError("give a CONFIG to train, or --resume RUN to go on with a run")
    if config is not None and resume is not None:
        raise UserError(f"--resume goes on with the run's own configuration: leave out '{config}'")
    if best and resume is None:
        raise UserError("--best is for going on with a run: give --resume RUN as well")
    if resume is not None:
        if overrides:
            raise UserError("--resume goes on with the run's own settings: leave out --set")
        return Settings(), resume.name
    assert config is not None
    return load_settings(config, overrides or ()), Path(config).stem


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint of the best accuracy instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's model, or its newest checkpoint, on the held-out images."""
    with lasting_imports():
        from hpc_hdb.run.evaluation import evaluate_run

    notes: list[str] = []
    with find_console().status("evaluating ..."):
        source, result = evaluate_run(run, best, notes.append)
    for note in notes:
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps({"model": str(source)} | asdict(result), indent=2))
    else:
        find_console().print(
            f"{source}: accuracy {result.accuracy:.2%}, loss {result.loss:.4f}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to; by default the run's, or report/ for several."),
    ] = None,
) -> None:
    """Write tables and plots of a run, or of several side by side, as one HTML page."""
    from hpc_hdb.report.report import write_report

    written = write_report(runs, output)
    console = find_console()
    console.print(written)
    console.print(f"report: {written.page}", highlight=False, soft_wrap=True)


app.command()(pack)
app.command()(verify)
app.command()(slurm)
app.command()(doctor)


def main() -> None:
    """Entry point of ``hdb``."""
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="hdb", standalone_mode=False)
    except _UsageError as error:
        of = error.ctx.command_path if error.ctx else app.info.name
        leave(UserError(f"{error.format_message().rstrip('.')}: see {of} --help"))
    except typer.Abort:
        leave(KeyboardInterrupt())
    except BaseException as error:  # every rank must leave, whatever happened to this one
        leave(error)
    sys.exit(status)
