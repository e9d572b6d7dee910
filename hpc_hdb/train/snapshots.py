"""What is done with versions of the model beside the server's loop: evaluations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_hdb.cluster.link import ServerLink
from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import RoundBook
from hpc_hdb.train.background import Background
from hpc_hdb.train.checkpoint import BEST, Checkpoint, save_best, save_checkpoint
from hpc_hdb.train.evaluate import Evaluation, Evaluator
from hpc_hdb.train.global_model import GlobalModel

Emit = Callable[[str, dict[str, Any]], None]

_SLOW_SECONDS = 30.0
"""After which a checkpoint that is still being written is reported, and again at each doubling."""


class Snapshots:
    """Evaluates the merged model and writes checkpoints, in threads of the root server.

    Parameters
    ----------
    model : GlobalModel
    book : RoundBook
    worker_commits : dict of int to int
        Commits of each worker, as the server counts them.
    link : ServerLink
        For its clock.
    settings : Settings
    evaluator : Evaluator
    emit : callable
        Takes an event's name and its values.
    note_left_out : callable
        Takes the name of a bad held-out image.
    folder : Path or None
        Of the checkpoints; None writes none.
    inline : bool
        Do everything within the loop instead of beside it.

    Attributes
    ----------
    saved : dict of int to int
        Commits of each worker in the newest checkpoint.
    """

    def __init__(
        self,
        model: GlobalModel,
        book: RoundBook,
        worker_commits: dict[int, int],
        link: ServerLink,
        settings: Settings,
        evaluator: Evaluator,
        emit: Emit,
        note_left_out: Callable[[str], None],
        folder: Path | None,
        inline: bool,
    ) -> None:
        self._model = model
        self._book = book
        self._worker_commits = worker_commits
        self._link = link
        self._settings = settings.run
        self._rates = settings.server.rates
        self._evaluator = evaluator
        self._emit = emit
        self._note_left_out = note_left_out
        self._folder = folder
        self.saved = dict(worker_commits)
        self._begun = dict(worker_commits)
        self._seconds_before = 0.0
        self._next_evaluation = settings.run.evaluate_every
        self._evaluated = -1
        self._evaluations: Background[Evaluation] = Background(inline)
        self._writer: Background[Path] = Background(inline)
        self._written = ""
        self._write_started = 0.0
        self._next_complaint = _SLOW_SECONDS
        self._best_accuracy = -math.inf
        self._best: Checkpoint | None = None

    def resume(self, checkpoint: Checkpoint, evaluated: int, best_accuracy: float) -> None:
        """Go on after `checkpoint`; the rest as in `ParameterServer.resume`."""
        self._best_accuracy = best_accuracy
        self.saved = dict(self._worker_commits)
        self._begun = dict(self._worker_commits)
        self._seconds_before = checkpoint.seconds
        self._evaluated = evaluated
        self._next_evaluation = self._evaluation_after(self._book.epoch_at(evaluated))

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation is under way beside the loop."""
        return self._evaluations.busy

    def poll(self) -> None:
        """Finish what has ended meanwhile. Raises what it raised."""
        self._evaluations.poll()
        self._writer.poll()
        if self._writer.busy:
            self._complain_of_slow_write()
        else:
            self._write_best()

    async def evaluate_if_due(self) -> None:
        if self._book.epoch >= self._next_evaluation and not self._evaluations.busy:
            await self._evaluate()

    def due_after(self, commits: int) -> bool:
        """Whether one is due after that being written once each worker has so many commits more."""
        unsaved = max(self._worker_commits[worker] - begun for worker, begun in self._begun.items())
        return (unsaved + commits) * 2 > self._settings.checkpoint_every

    async def save_if_due(self) -> None:
        if self.due_after(0):
            await self._save()

    async def make_room(self, worker: int) -> None:
        """Before a worker's commit is taken: no more than `checkpoint_every` of its are unsaved."""
        if self._folder is not None:
            while self._unsaved(worker) >= self._settings.checkpoint_every:
                if self._writer.busy:
                    self._wait_for_writer()
                else:
                    await self._save()

    async def finish(self) -> None:
        """At the end of training: evaluate the last version, and wait for everything."""
        self._evaluations.wait()
        if self._evaluated != self._book.commits:
            await self._evaluate()
        self._evaluations.wait()
        self._wait_for_writer()
        self._write_best()
        self._wait_for_writer()

    async def interrupt(self, save: bool) -> None:
        """Give up the evaluation under way, and save what is merged if `save` says so."""
        self._evaluator.cancel()  # on resume it is done again
        self._wait_for_writer()
        if save and any(map(self._unsaved, self.saved)):
            await self._save()
            self._wait_for_writer()
        self._write_best()
        self._wait_for_writer()

    def _unsaved(self, worker: int) -> int:
        return self._worker_commits[worker] - self.saved[worker]

    def _evaluation_after(self, epoch: float) -> int:
        """The epoch after which an evaluation is due that follows one after `epoch`."""
        every = self._settings.evaluate_every
        return (int(epoch) // every + 1) * every

    async def _evaluate(self) -> None:
        commits, epoch = self._book.commits, self._book.epoch
        self._next_evaluation = self._evaluation_after(epoch)
        self._evaluated = commits
        checkpoint = None if self._folder is None else await self._checkpoint()
        model = await self._model.hold_result() if checkpoint is None else checkpoint.result

        def done(result: Evaluation) -> None:
            for file in self._evaluator.left_out():
                self._note_left_out(file)
            self._emit("evaluation", {"commit": commits, "epoch": epoch} | vars(result))
            if checkpoint is None:
                self._model.release(model)
                return
            if not (result.accuracy > self._best_accuracy and checkpoint.finite):
                self._release(checkpoint)
                return
            if self._best is not None:  # not written yet, and no longer the best
                self._release(self._best)
            self._best_accuracy = result.accuracy
            self._best = replace(checkpoint, accuracy=result.accuracy)
            if not self._writer.busy:
                self._write_best()

        self._evaluations.start(lambda: self._evaluator.evaluate(model), done)

    async def _save(self) -> None:
        """Write the current version, unless one is just being written."""
        if self._folder is None or self._writer.busy:
            return
        folder, keep = self._folder, self._settings.keep_checkpoints
        checkpoint = await self._checkpoint()
        self._begun.update(checkpoint.worker_commits)

        def write() -> Path:
            if not checkpoint.finite:
                raise UserError(
                    f"training diverged (the merged model is no longer finite after commit "
                    f"{checkpoint.rounds['commits']}): lower {self._rates} and start again"
                )
            return save_checkpoint(folder, checkpoint, keep)

        def done(path: Path) -> None:
            self._release(checkpoint)
            self.saved.update(checkpoint.worker_commits)
            self._emit("checkpoint", {"commit": checkpoint.rounds["commits"], "file": path.name})

        self._write(checkpoint.file, write, done)

    def _write_best(self) -> None:
        """Write the best version, where there is a new one and nothing else is being written."""
        if self._best is None or self._folder is None:
            return
        folder, (best, self._best) = self._folder, (self._best, None)
        self._write(BEST, lambda: save_best(folder, best), lambda _: self._release(best))

    def _write(self, name: str, work: Callable[[], Path], done: Callable[[Path], None]) -> None:
        self._written, self._write_started = name, time.monotonic()
        self._next_complaint = _SLOW_SECONDS
        self._writer.start(work, done)

    def _wait_for_writer(self) -> None:
        while not self._writer.ends_within(1.0):
            self._complain_of_slow_write()
        self._writer.wait()

    def _complain_of_slow_write(self) -> None:
        seconds = time.monotonic() - self._write_started
        if seconds >= self._next_complaint:
            self._next_complaint *= 2
            self._emit("slow_write", {"file": self._written, "seconds": round(seconds, 1)})

    async def _checkpoint(self) -> Checkpoint:
        """The server's state; its tensors are held until `_release`."""
        return Checkpoint(
            await self._model.hold(),
            self._evaluator.parameters.signature,
            self._book.state(),
            dict(self._worker_commits),
            self._seconds_before + self._link.now(),
            server=await self._model.hold_state(),
        )

    def _release(self, checkpoint: Checkpoint) -> None:
        for held in (checkpoint.model, *checkpoint.server.values()):
            self._model.release(held)
