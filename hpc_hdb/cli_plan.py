"""The ``plan`` and ``schedule`` commands."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from hpc_hdb.cli_options import AsJson, Config, MaybeConfig, Overrides
from hpc_hdb.cli_scale import topology_advice
from hpc_hdb.config import Settings
from hpc_hdb.config_files import load_settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, plan_dual_batch
from hpc_hdb.report.terminal import find_console
from hpc_hdb.startup import lasting_imports


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
    figures = {
        "--seconds-per-image": seconds_per_image,
        "--overhead": overhead,
        "--large-batch": large_batch,
        "--samples": samples,
        "--workers": workers,
    }
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
        _show_plan(settings, workers, samples, as_json)
        return
    if overrides:
        raise UserError(f"--set {overrides[0]} changes a CONFIG: give one, or leave it out")
    missing = [name for name, value in figures.items() if value is None]
    if missing:
        raise UserError(f"give a CONFIG, or {', '.join(missing)} too")

    from hpc_hdb.report.plan_tables import dual_batch_table

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
        find_console().print(dual_batch_table(dual))


def _show_plan(settings: Settings, workers: int | None, samples: int | None, as_json: bool) -> None:
    """A configuration's plan, and what is to be said of it."""
    with lasting_imports():
        from hpc_hdb.report.plan_notes import plan_notes
        from hpc_hdb.report.tables import plan_table
        from hpc_hdb.run.planning import large_batch_note, plan_beforehand

    solved = plan_beforehand(settings, workers, samples)
    advice = topology_advice(settings, solved)
    if as_json:
        topology = advice.values if advice else None
        print(json.dumps(solved.to_dict() | {"topology": topology}, indent=2))
        return
    console = find_console()
    console.print(plan_table(solved))
    for note in (
        *plan_notes(solved, settings),
        large_batch_note(settings),
        advice.line if advice else "",
    ):
        if note:
            console.print(note, soft_wrap=True)


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
        with lasting_imports():
            from hpc_hdb.run.planning import plan_beforehand

        stages = plan_beforehand(settings, samples=samples).stages
    if as_json:
        known = [{k: v for k, v in asdict(stage).items() if v is not None} for stage in stages]
        print(json.dumps(known, indent=2))
    else:
        console = find_console()
        console.print(schedule_table(stages))
        workers = 1 if settings.server.sync == "allreduce" else settings.plan.workers
        if note := rate_note(settings.schedule, workers):
            console.print(note, soft_wrap=True)
