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
from hpc_hdb.cli_options import AsJson, Config, MaybeConfig, Overrides
from hpc_hdb.cli_plan import plan, schedule
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
)
from hpc_hdb.cli_shards import pack, verify
from hpc_hdb.cli_slurm import slurm
from hpc_hdb.cluster.launcher import check_mpi, find_launcher, leave
from hpc_hdb.config import Settings
from hpc_hdb.config_files import load_settings, preset_names
from hpc_hdb.errors import UserError
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
        if bound is not None:
            raise UserError("--bound is of batch times, not of the network: leave out one of them")
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


app.command()(plan)
app.command()(schedule)


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
            f"{source}: accuracy {result.accuracy:.2%}, loss {result.loss:.4f}", soft_wrap=True
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
    console.print(f"report: {written.page}", soft_wrap=True)


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
