"""Rank 0 of a run, over MPI or on the virtual clock: events, signals, results."""

from __future__ import annotations

import math
import platform
import shlex
import signal
from collections.abc import Callable, Coroutine
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_hdb import __version__
from hpc_hdb.cluster.link import ServerLink
from hpc_hdb.config import Settings
from hpc_hdb.plan import TrainingPlan
from hpc_hdb.report.events import EventLog, read_events
from hpc_hdb.report.progress import Progress
from hpc_hdb.report.summary import summarise
from hpc_hdb.run.folder import RunFolder
from hpc_hdb.train.checkpoint import (
    drop_worker_states,
    find_best_accuracy,
    has_checkpoint,
    load_best,
    load_checkpoint,
    note_lost_states,
    save_checkpoint,
)
from hpc_hdb.train.evaluate import Evaluator
from hpc_hdb.train.sealed import write_sealed
from hpc_hdb.train.server import Interrupted, ParameterServer

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

Drive = Callable[[Coroutine[Any, Any, Tensor]], Tensor]


def serve(
    settings: Settings,
    folder: RunFolder,
    plan: TrainingPlan,
    evaluator: Evaluator,
    link: ServerLink,
    progress: Progress,
    drive: Drive,
    mode: str,
    image_name: Callable[[int], str],
    signal_number: Callable[[], int],
) -> int:
    """Run the root server to the end of training.

    Parameters
    ----------
    drive : callable
        Runs the server's coroutine, and on the virtual clock the workers' beside it.
    mode : str
        "mpi" or "virtual"; the latter, and all-reduce, evaluate and write checkpoints within
        the loop.
    image_name : callable
        Where a sample's training image is, to name bad ones.
    signal_number : callable
        What `catch_signals` returned.

    Returns
    -------
    int
        Exit status: 0, or 128 plus the signal that ended the run early.

    Raises
    ------
    UserError
        If the run is resumed and its checkpoint cannot be used.
    """
    signature = evaluator.parameters.signature
    damages: list[dict[str, str]] = []

    def note_damage(file: Path, reason: str, instead: str) -> None:
        name = str(file.relative_to(folder.path))
        damages.append({"file": name, "reason": reason, "instead": instead})

    checkpoint, best_accuracy = None, -math.inf
    if folder.resumed:
        best_accuracy = find_best_accuracy(folder.checkpoints, signature, note_damage)
        if folder.goes_back:
            checkpoint = load_best(folder.checkpoints, signature)
            save_checkpoint(folder.checkpoints, checkpoint, settings.run.keep_checkpoints)
        elif has_checkpoint(folder.checkpoints):
            checkpoint = load_checkpoint(folder.checkpoints, signature, note_damage)
    if checkpoint is not None and settings.train.keep_momentum:
        note_lost_states(folder.checkpoints, checkpoint.worker_commits, note_damage)
    before = checkpoint.seconds if checkpoint else 0.0
    log = EventLog(folder.path / "events.jsonl", lambda: before + link.now())
    log.listen(progress.show)
    log.listen(lambda _: folder.check())
    evaluator.parameters.to_wire()
    server = ParameterServer(
        link,
        plan,
        settings,
        evaluator.parameters.wire.clone(),
        evaluator,
        log.emit,
        folder.checkpoints,
        signal_number,
        image_name,
        inline=mode == "virtual" or settings.server.sync == "allreduce",
    )
    if checkpoint is not None:
        evaluated = _last_evaluated(folder, checkpoint.rounds["commits"])
        server.resume(checkpoint, evaluated, best_accuracy)
    new_plan = server.members.fit_plan()
    plan = server.work.newest_plan
    log.emit("start", _about(settings, plan, mode, evaluator.parameters.flat.device))
    if folder.resumed:
        log.emit("resume", {"commit": server.work.book.commits, "seconds": before})
    for damage in damages:
        log.emit("damaged", damage)
    progress.begin(plan, settings, server.work.book)
    if new_plan is not None:
        log.emit("plan", new_plan)
    try:
        model = drive(server.run())
    except Interrupted as interruption:
        log.emit("interrupted", {"signal": signal.Signals(interruption.signal_number).name})
        log.close()
        progress.interrupted(folder.path, has_checkpoint(folder.checkpoints))
        return 128 + interruption.signal_number
    finally:
        progress.close()
    log.emit("end", {"commit": server.work.book.commits} | server.own_seconds())
    log.close()
    evaluator.load(model)
    write_sealed(folder.model, evaluator.parameters.state_dict())
    summary = summarise(read_events(folder.path))
    folder.write_json("summary.json", summary)
    # All but what the newest checkpoint goes on with, should this model be lost.
    drop_worker_states(folder.checkpoints, server.saved)
    progress.end(summary, folder.path)
    _report(folder.path, settings.run.report, progress.note)
    return 0


def _report(run: Path, wanted: bool, note: Callable[[str], None]) -> None:
    """Write the report of a finished run if it is wanted; say where it is, or how to have it."""
    again = f"hdb report {shlex.quote(str(run))}"
    if not wanted:
        note(f"plots and tables: {again}")
        return
    try:
        from hpc_hdb.report.report import write_report  # imports matplotlib

        page = write_report([run]).page
    except Exception as error:  # the run has finished, whatever happens here
        reason = str(error).partition("\n")[0] or type(error).__name__
        note(f"no report was written ({reason}): {again}")
    else:
        note(f"plots and tables: {page}")


def has_finished(folder: RunFolder, progress: Progress) -> bool:
    """Whether the run of a reopened folder has nothing left to do; says so."""
    if folder.finished:
        where = folder.path
        progress.note(f"{where} has finished: nothing to resume; see hdb report {where}")
    return folder.finished


def _last_evaluated(folder: RunFolder, commits: int) -> int:
    """Commit count of the last evaluation of the first `commits`; 0 if there is none."""
    evaluations = [e["commit"] for e in read_events(folder.path) if e["event"] == "evaluation"]
    return max((number for number in evaluations if number <= commits), default=0)


def catch_signals() -> Callable[[], int]:
    """From now on, catch the signals that ask this run to stop; says which came, 0 for none."""
    received = [0]
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: received.append(number))
    return lambda: received[-1]


def _about(
    settings: Settings, plan: TrainingPlan, mode: str, device: torch.device
) -> dict[str, Any]:
    shares = plan.shares
    versions = {
        "hpc-hdb": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
    }
    if mode == "mpi":
        from hpc_hdb.cluster.mpi import library

        versions["mpi"] = library()
    return {
        "mode": mode,
        "sync": settings.server.sync,
        "servers": settings.server.server_ranks,
        "workers": shares.workers,
        "ranks_per_worker": plan.ranks,
        "small_workers": shares.small_workers,
        "commits_per_epoch": shares.workers * settings.server.commits_per_epoch,
        "samples": plan.samples,
        "update_factor": shares.update_factor,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
