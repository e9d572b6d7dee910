"""Checkpoints: the server's state and each worker's optimizer, of which none is ever half.

A folder of them holds the newest few of the server (``00000012.pt``, named after the commit), the
best by accuracy (``best.pt``), and the newest states of each worker (``worker-1-00000006.pt``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_hdb.errors import UserError
from hpc_hdb.train.sealed import DamagedFile, read_sealed, write_sealed

BEST = "best.pt"
_NUMBERED = "[0-9]" * 8 + ".pt"

NoteDamage = Callable[[Path, str, str], None]
"""Told of a damaged file: which, what is wrong with it, and what is used instead."""


def _tell_nobody(file: Path, reason: str, instead: str) -> None:
    pass


@dataclass
class Checkpoint:
    """The server's state after a commit.

    Attributes
    ----------
    model : Tensor, shape (size,), float32
        The global model's buffer.
    signature : str
        `FlatModel.signature` of the model it belongs to.
    rounds : dict
        `RoundBook.state`.
    worker_commits : dict of int to int
        Commits of each worker.
    seconds : float
        Seconds of training so far.
    accuracy : float or None
        On the held-out images, from 0 to 1; None where this version was not evaluated.
    server : dict of str to Tensor, shape (size,), float32
        What the server's optimizer keeps beside the model: "momentum", "average".
    """

    model: Tensor
    signature: str
    rounds: dict[str, Any]
    worker_commits: dict[int, int]
    seconds: float
    accuracy: float | None = None
    server: dict[str, Tensor] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of its file among the newest."""
        return f"{self.rounds['commits']:08d}.pt"

    @property
    def result(self) -> Tensor:
        """What is evaluated: the weight average where there is one."""
        return self.server.get("average", self.model)

    @property
    def finite(self) -> bool:
        """Whether it is worth keeping: neither the model nor what goes with it has diverged."""
        return all(math.isfinite(buffer.sum()) for buffer in (self.model, *self.server.values()))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into `folder`, and keep the newest `keep`.

    Later ones than this are of a past that no longer counts (the run went back, or they were
    damaged), and are removed too, as is what kills left unfinished. What appears while this one is
    written stays: then this process was stopped for long, and another job has taken the run over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / checkpoint.file
    before, unfinished = _numbered(folder), list(folder.glob(_NUMBERED + ".part"))
    write_sealed(path, vars(checkpoint))
    kept = sorted(file for file in {*before, path} if file.name <= path.name)[-keep:]
    for file in {*before, *unfinished}.difference(kept):
        file.unlink(missing_ok=True)
    return path


def save_best(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint as the best one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / BEST, vars(checkpoint))
    return folder / BEST


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, be it whole or damaged."""
    return bool(_numbered(folder))


def load_checkpoint(
    folder: Path, signature: str, note_damage: NoteDamage = _tell_nobody
) -> Checkpoint:
    """The newest whole checkpoint in `folder`.

    Parameters
    ----------
    signature : str
        Of the model that is to go on from it.
    note_damage : callable
        Told of newer ones that are damaged, where there is a whole one.

    Raises
    ------
    UserError
        If there is none, all are damaged, or it belongs to another model.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_numbered(folder)):
        try:
            checkpoint = _load(path, signature)
        except (DamagedFile, FileNotFoundError) as error:
            damaged.append((path, str(error)))
            continue
        for file, reason in damaged:
            note_damage(file, reason, path.name)
        return checkpoint
    advice = "start the run anew, with another run.output"
    if not damaged:
        raise UserError(f"{folder} holds no checkpoint: {advice}")
    path, reason = damaged[0]
    if (folder / BEST).exists():
        advice = f"go back to the best one with hdb train --resume {folder.parent} --best"
    raise UserError(
        f"checkpoint {path} is damaged ({reason}) and there is no older whole one: {advice}"
    )


def load_best(folder: Path, signature: str) -> Checkpoint:
    """The best checkpoint in `folder`; parameters and errors as `load_checkpoint`."""
    path = folder / BEST
    try:
        return _load(path, signature)
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}: a run has it once its model has been evaluated"
        ) from None
    except DamagedFile as error:
        raise UserError(
            f"checkpoint {path} is damaged ({error}): go on from the newest one, without --best"
        ) from None


def find_best_accuracy(folder: Path, signature: str, note_damage: NoteDamage) -> float:
    """The accuracy of the best checkpoint; minus infinity where there is no whole one of the model.

    Removes what a kill left of one.
    """
    (folder / f"{BEST}.part").unlink(missing_ok=True)
    try:
        accuracy = _load(folder / BEST, signature).accuracy
    except FileNotFoundError:
        return -math.inf
    except (DamagedFile, UserError) as error:
        note_damage(folder / BEST, str(error), "the next best")
        return -math.inf
    return -math.inf if accuracy is None else accuracy


def save_worker_state(folder: Path, rank: int, commits: int, state: dict, kept: int) -> None:
    """Keep what worker `rank` needs besides the model after its commit number `commits`.

    Parameters
    ----------
    kept : int
        Commits back to which such states are kept (`hpc_hdb.config.Run.states_kept`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _worker_file(folder, rank, commits)
    write_sealed(path, state | {"file": path.name}, durable=False)
    oldest = _worker_file(folder, rank, max(0, commits - kept + 1)).name
    for file in folder.glob(f"worker-{rank}-{_NUMBERED}"):
        if file.name < oldest:
            file.unlink(missing_ok=True)


def drop_worker_states(folder: Path, worker_commits: Mapping[int, int]) -> None:
    """Remove the workers' states but those after so many commits of each."""
    kept = {_worker_file(folder, rank, commits) for rank, commits in worker_commits.items()}
    for file in {*folder.glob("worker-*.pt")} - kept:
        file.unlink(missing_ok=True)


def load_worker_state(folder: Path, rank: int, commits: int, device: torch.device) -> dict | None:
    """What `save_worker_state` kept; None where it is missing or damaged.

    Training then goes on with a fresh optimizer, of which `note_lost_states` tells.
    """
    with contextlib.suppress(FileNotFoundError, DamagedFile):
        return _load_state(_worker_file(folder, rank, commits), device)
    return None


def note_lost_states(
    folder: Path, worker_commits: Mapping[int, int], note_damage: NoteDamage
) -> None:
    """Tell of the workers whose state is missing or damaged, if there are any."""
    ranks = [rank for rank, commits in sorted(worker_commits.items()) if commits]
    files = [_worker_file(folder, rank, worker_commits[rank]) for rank in ranks]
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        problems = list(pool.map(_problem_of_state, files))
    lost = [found for found in zip(ranks, files, problems, strict=True) if found[2]]
    if lost:
        _, path, reason = lost[0]
        numbers = ", ".join(str(rank) for rank, *_ in lost)
        who = f"worker {numbers}" if len(lost) == 1 else f"workers {numbers}"
        note_damage(path, reason, f"a fresh optimizer in {who}")


def _load(path: Path, signature: str) -> Checkpoint:
    """A checkpoint; raises FileNotFoundError, DamagedFile, and UserError where it does not fit."""
    values = read_sealed(path)
    try:
        checkpoint = Checkpoint(**values)
        whole = checkpoint.model.dtype == torch.float32 and checkpoint.rounds["commits"] >= 0
        whole = whole and all(commits >= 0 for commits in checkpoint.worker_commits.values())
    except (TypeError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise DamagedFile("it is no checkpoint")
    if path.name not in (BEST, checkpoint.file):
        raise DamagedFile(f"it is that of commit {checkpoint.rounds['commits']}")
    if checkpoint.signature != signature:
        raise UserError(
            f"checkpoint {path} belongs to another model than {path.parent.parent / 'config.toml'} "
            "makes now: undo what has changed since (settings, the model's code, the data's "
            "classes), or start a new run"
        )
    return checkpoint


def _load_state(path: Path, device: torch.device | str) -> dict:
    state = read_sealed(path, device)
    if not (isinstance(state, dict) and "optimizer" in state):
        raise DamagedFile("it is no worker's state")
    if state.pop("file", None) != path.name:
        raise DamagedFile("it is that of another worker or commit")
    return state


def _problem_of_state(path: Path) -> str:
    """Why a worker's state cannot be used; empty if it can."""
    try:
        _load_state(path, "cpu")
    except FileNotFoundError:
        return "it is missing"
    except DamagedFile as error:
        return str(error)
    return ""


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob(_NUMBERED))


def _worker_file(folder: Path, rank: int, commits: int) -> Path:
    return folder / f"worker-{rank}-{commits:08d}.pt"
