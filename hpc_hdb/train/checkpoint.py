"""Checkpoints: the server's state and each worker's optimizer, written so that none is ever half.

Every file is written beside its final name, flushed to disk, and renamed. Files load with
``weights_only``, so that loading one executes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_hdb.errors import UserError

_KEEP = 2


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
    server : dict of str to Tensor, shape (size,), float32
        What the server's optimizer keeps beside the model: "momentum", "average".
    """

    model: Tensor
    signature: str
    rounds: dict[str, Any]
    worker_commits: dict[int, int]
    seconds: float
    server: dict[str, Tensor] = field(default_factory=dict)

    @property
    def result(self) -> Tensor:
        """What is evaluated: the weight average where there is one."""
        return self.server.get("average", self.model)


def write_atomically(path: Path, value: Any, durable: bool = True) -> None:
    """Save `value` with torch under `path`, whole or not at all.

    Parameters
    ----------
    durable : bool
        Also flush to disk, so that it survives the machine and not only the process.
    """
    unfinished = path.with_name(path.name + ".part")
    with open(unfinished, "wb") as file:
        torch.save(value, file)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    unfinished.replace(path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into `folder`; remove all but the newest two, and what kills left."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{checkpoint.rounds['commits']:08d}.pt"
    write_atomically(path, vars(checkpoint) | {"sha256": _digest(vars(checkpoint))})
    for old in _server_files(folder)[:-_KEEP]:
        old.unlink(missing_ok=True)
    for unfinished in folder.glob("[0-9]*.part"):
        unfinished.unlink(missing_ok=True)
    return path


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, be it whole or damaged."""
    return bool(_server_files(folder))


def load_checkpoint(folder: Path, signature: str) -> Checkpoint:
    """The newest whole checkpoint in `folder`.

    Parameters
    ----------
    signature : str
        Of the model that is to go on from it.

    Raises
    ------
    UserError
        If there is none, all are damaged, or it belongs to another model.
    """
    problem = f"{folder} holds no checkpoint: start the run anew, with another run.output"
    for path in reversed(_server_files(folder)):
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
            if values.pop("sha256") != _digest(values):
                raise ValueError("its checksum is wrong")
            checkpoint = Checkpoint(**values)
        except Exception as error:  # a damaged file raises whatever its bytes lead to
            reason = str(error).split("\n")[0][:120]
            problem = (
                f"checkpoint {path} is damaged ({reason}) and there is no older whole one: "
                "start the run anew, with another run.output"
            )
            continue
        if checkpoint.signature != signature:
            raise UserError(
                f"checkpoint {path} belongs to another model: set model and data as in "
                f"{folder.parent / 'config.toml'}"
            )
        return checkpoint
    raise UserError(problem)


def save_worker_state(
    folder: Path, rank: int, commits: int, state: dict, checkpoint_every: int
) -> None:
    """Keep what worker `rank` needs besides the model after its commit number `commits`.

    Older ones are removed once no checkpoint can belong to them: each of the newest two is at
    most `checkpoint_every` commits of the worker behind the next, and one more is under way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(_worker_file(folder, rank, commits), state, durable=False)
    _worker_file(folder, rank, commits - _KEEP * (checkpoint_every + 1)).unlink(missing_ok=True)


def load_worker_state(folder: Path, rank: int, commits: int, device: torch.device) -> dict | None:
    """What `save_worker_state` kept, or None: training then goes on with a fresh optimizer."""
    with contextlib.suppress(Exception):  # missing or cut short by a crash of the machine
        return torch.load(
            _worker_file(folder, rank, commits), map_location=device, weights_only=True
        )
    return None


def _server_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.pt"))


def _worker_file(folder: Path, rank: int, commits: int) -> Path:
    return folder / f"worker-{rank}-{commits:08d}.pt"


def _digest(values: dict[str, Any]) -> str:
    """Of all weights among the values of a checkpoint."""
    digest = hashlib.sha256(values["model"].numpy().data)
    for _, tensor in sorted(values.get("server", {}).items()):
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
