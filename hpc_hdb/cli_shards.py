"""The ``pack`` and ``verify`` commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpc_hdb.errors import UserError
from hpc_hdb.report.terminal import find_console

_SHOWN = 10
"""Files left out that are named on the screen."""


def pack(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds train/<class>/<image>.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write; made if missing.")],
    sides: Annotated[
        list[int] | None,
        typer.Option(
            "--side",
            min=8,
            metavar="PIXELS",
            help="Also copies whose shorter side has PIXELS, for low resolutions; repeatable.",
        ),
    ] = None,
    originals: Annotated[bool, typer.Option(help="Pack the files' own bytes.")] = True,
    per_shard: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 2000,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That pack side by side; by default all cores.")
    ] = None,
) -> None:
    """Pack an image folder into a few large files (WebDataset), for data.source = "shards"."""
    from hpc_hdb.run.packing import pack_split, splits_of

    if not sides and not originals:
        raise UserError("--no-originals leaves nothing to pack: give --side as well")
    console = find_console()
    for split in splits_of(folder):
        with _advancing(split) as bar:
            done = pack_split(
                folder / split,
                out / split,
                sorted(set(sides or ())),
                originals,
                per_shard,
                processes or len(os.sched_getaffinity(0)),
                *bar,
            )
        left_out = f", {len(done.skipped)} left out" if done.skipped else ""
        lines = [
            f"{done.folder}: {'packed already, ' if done.before else ''}{done.samples} images"
            f"{left_out}, {done.shards} shards, {done.size / 2**20:.1f} MiB",
            *(f"  left out: {file}: {reason}" for file, reason in done.skipped[:_SHOWN]),
        ]
        if len(done.skipped) > _SHOWN:
            lines.append(f"  all of them: {done.folder / 'manifest.json'}")
        if done.passed_over:
            lines.append(done.passed_over)
        console.print("\n".join(lines), soft_wrap=True)
    print(f"train on them: --set data.source=shards --set data.path={out}")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="What hdb pack wrote.")],
) -> None:
    """Check packed shards against their checksums."""
    from hpc_hdb.run.packing import splits_of, verify_split

    problems = []
    for split in splits_of(folder):
        with _advancing(split) as bar:
            problems += verify_split(folder / split, *bar)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise UserError(f"{len(problems)} files are damaged or missing: pack {folder} again")
    print(f"{folder}: all shards are whole")


@contextmanager
def _advancing(name: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A progress bar: what to call with the total, and with each advance."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=find_console()) as progress:
        task = progress.add_task(name, total=None)
        yield (
            lambda total: progress.update(task, total=total),
            lambda count: progress.advance(task, count),
        )
