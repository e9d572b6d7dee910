"""The global model, kept in slices by one or more servers.

Every server does the same with its own slice (`Slice`), in the same order. The root decides on
that order (`GlobalModel`); the others follow its instructions (`follow_root`). So the n-th
version of each slice belongs to the n-th version of the model, and a worker that is sent a
version, or a checkpoint that collects one, gets slices of one and the same.

A commit is merged by all servers or by none: a slice keeps what it has made of it aside until
the root knows that no server has lost the worker meanwhile, and says so with its next instruction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hpc_hdb.cluster.link import (
    FollowerLink,
    ReductionBroken,
    ServerLink,
    SliceLink,
    WorkerLost,
)
from hpc_hdb.cluster.messages import Instruction, InstructionKind
from hpc_hdb.train.merge import Merge
from hpc_hdb.train.server_optimizer import Kept, Pace, ServerOptimizer
from hpc_hdb.train.versions import Versions

_CHANGES = (InstructionKind.MERGE, InstructionKind.REDUCE)
AVERAGING = ServerOptimizer()
"""The paper's: what merging gives is the model."""


class Slice:
    """One server's slice of the global model.

    Parameters
    ----------
    link : SliceLink
    initial : mapping of Kept to Tensor, shape (slice size,), float32
        The first version: what `optimizer` keeps of it.
    merge : Merge
        How a worker's commit is merged (ASP, SSP).
    optimizer : ServerOptimizer
        What is done with that, or with a reduction's sum.
    """

    def __init__(
        self,
        link: SliceLink,
        initial: Mapping[Kept, Tensor],
        merge: Merge,
        optimizer: ServerOptimizer = AVERAGING,
    ) -> None:
        self.kept = {kept: Versions(tensor, link) for kept, tensor in initial.items()}
        self._made: Mapping[Kept, Tensor] = {}
        self._link = link
        self._merge_part = merge
        self._optimizer = optimizer

    @property
    def model(self) -> Tensor:
        """The current version."""
        return self.kept[Kept.MODEL].current

    def settle(self, undo: bool) -> None:
        """Publish what the last instruction has made, or forget it."""
        if not undo:
            for kept, buffer in self._made.items():
                self.kept[kept].publish(buffer)
        self._made = {}

    async def carry_out(self, instruction: Instruction) -> None:
        """Make a new version, which `settle` publishes, or send the current one to workers.

        Raises
        ------
        WorkerLost, ReductionBroken
            If nothing has come of it.
        """
        if instruction.kind == InstructionKind.MERGE:
            await self._merge(instruction)
        elif instruction.kind == InstructionKind.SEND:
            for part in self._link.parts:
                self._link.send(instruction.worker, self.model, part)
        elif instruction.kind == InstructionKind.REDUCE:
            await self._reduce(instruction)
        elif instruction.kind == InstructionKind.DROP:
            spare = self.kept[Kept.MODEL].spare()
            async for _ in self._link.receive(instruction.worker, spare):
                pass

    async def _merge(self, instruction: Instruction) -> None:
        """Merge each part of a commit as it arrives, and send it back before the next."""
        new = self._spares()
        model, commit = self.model, new[Kept.MODEL]
        async for part in self._link.receive(instruction.worker, commit):
            self._merge_part(model[part], commit[part], instruction.factor, commit[part])
            self._step(part, new, instruction)
            if instruction.reply:
                self._link.send(instruction.worker, commit, part)
            self._average(part, new, instruction)
        self._made = new

    async def _reduce(self, instruction: Instruction) -> None:
        new = self._spares()
        total = new[Kept.MODEL]
        async for part in self._link.reduce(total):
            self._step(part, new, instruction)
            self._link.broadcast(total, part)
            self._average(part, new, instruction)
        self._made = new

    def _step(self, part: slice, new: Mapping[Kept, Tensor], instruction: Instruction) -> None:
        """Let the server's optimizer go on from what merging has made of a part."""
        if Kept.MOMENTUM not in new:
            return
        # Only of parameters; momentum of statistics stays what it is at the start, zero.
        end = max(part.start, min(part.stop, instruction.trained - self._link.begin))
        trained = slice(part.start, end)
        momentum = self.kept[Kept.MOMENTUM].current
        new[Kept.MOMENTUM][end : part.stop] = 0
        self._optimizer.step(
            self.model[trained],
            new[Kept.MODEL][trained],
            momentum[trained],
            new[Kept.MOMENTUM][trained],
            instruction.learning_rate,
        )

    def _average(self, part: slice, new: Mapping[Kept, Tensor], instruction: Instruction) -> None:
        if Kept.AVERAGE in new:
            before = self.kept[Kept.AVERAGE].current[part]
            out = new[Kept.AVERAGE][part]
            torch.lerp(before, new[Kept.MODEL][part], instruction.weight, out=out)

    def _spares(self) -> dict[Kept, Tensor]:
        return {kept: versions.spare() for kept, versions in self.kept.items()}


async def follow_root(
    link: FollowerLink, merge: Merge, optimizer: ServerOptimizer = AVERAGING
) -> None:
    """The loop of every server but the root."""
    initial = {kept: await link.first_slice() for kept in optimizer.keeps}
    own = Slice(link, initial, merge, optimizer)
    while (instruction := await link.next_instruction()).kind != InstructionKind.END:
        own.settle(instruction.undo > 0)
        if instruction.kind == InstructionKind.COLLECT:
            link.hand_in(own.kept[Kept(instruction.kept)].current)
        elif instruction.kind == InstructionKind.REGROUP:
            link.regroup()
        else:
            done = True
            try:
                await own.carry_out(instruction)
            except (WorkerLost, ReductionBroken):
                done = False
            if instruction.kind in _CHANGES:
                link.confirm(done)


class GlobalModel:
    """All slices, as the root server handles them.

    Parameters
    ----------
    link : ServerLink
    initial : Tensor, shape (size,), float32
        On the CPU; may be changed until `distribute`.
    merge : Merge
    optimizer : ServerOptimizer
    pace : callable
        Asked, before a version is made, what `optimizer` must know of it.

    Attributes
    ----------
    communicate_seconds : float
        Seconds spent moving and merging models; the caller may reset it.
    """

    def __init__(
        self,
        link: ServerLink,
        initial: Tensor,
        merge: Merge,
        optimizer: ServerOptimizer = AVERAGING,
        pace: Callable[[], Pace] = Pace,
    ) -> None:
        self.initial = initial
        self.communicate_seconds = 0.0
        self._link = link
        self._merge = merge
        self._optimizer = optimizer
        self._pace = pace
        self._state: dict[str, Tensor] = {}
        self._collected = set(optimizer.keeps)
        self._undo = False
        self._own: Slice
        self._whole: dict[Kept, Versions]

    def restore(self, model: Tensor, state: Mapping[str, Tensor]) -> None:
        """Begin with a checkpoint's model, and the `state` that belongs to it."""
        self.initial.copy_(model)
        self._state = dict(state)

    def distribute(self) -> None:
        """Give each server its slice of the first version, before anything else."""
        first = {Kept.MODEL: self.initial}
        if Kept.MOMENTUM in self._optimizer.keeps:
            first[Kept.MOMENTUM] = torch.zeros_like(self.initial)
        if Kept.AVERAGE in self._optimizer.keeps:
            first[Kept.AVERAGE] = self.initial.clone()
        for kept in first:
            first[kept] = self._state.get(kept.name.lower(), first[kept])
        slices = {kept: self._link.distribute(tensor) for kept, tensor in first.items()}
        self._own = Slice(self._link, slices, self._merge, self._optimizer)
        self._whole = self._own.kept
        if self._link.servers > 1:  # what was last collected; in memory of its own
            self._whole = {
                kept: Versions(tensor.clone(), self._link) for kept, tensor in first.items()
            }

    async def merge(self, worker: int, factor: float, reply: bool) -> None:
        """Merge the worker's commit with its update factor; with `reply`, send it the result.

        Raises
        ------
        WorkerLost
            If the worker dies meanwhile: nothing of its commit is merged.
        """
        await self._change(Instruction(InstructionKind.MERGE, worker, reply=reply, factor=factor))

    async def reduce(self) -> None:
        """Merge all workers' commits, and send all of them the result (BSP).

        Raises
        ------
        ReductionBroken
            If a worker dies or hangs meanwhile: nothing is merged.
        """
        await self._change(Instruction(InstructionKind.REDUCE))

    async def send(self, worker: int) -> None:
        """Send the current version to a worker."""
        await self._carry_out(Instruction(InstructionKind.SEND, worker))

    async def drop(self, worker: int) -> None:
        """Take a commit from the worker that is not to be merged."""
        await self._carry_out(Instruction(InstructionKind.DROP, worker))

    async def hold(self, kept: Kept = Kept.MODEL) -> Tensor:
        """A buffer of the whole current version, shape (size,), unchanged until `release`."""
        if kept not in self._collected:
            whole = self._whole[kept].spare()
            self._instruct(Instruction(InstructionKind.COLLECT, kept=kept))
            with self._timed():
                await self._link.collect(self._own.kept[kept].current, whole)
            self._whole[kept].publish(whole)
            self._collected.add(kept)
        return self._whole[kept].hold()

    async def hold_result(self) -> Tensor:
        """What is evaluated and saved as the result: the weight average where there is one."""
        averages = self._optimizer.averages
        return await self.hold(Kept.AVERAGE if averages else Kept.MODEL)

    async def hold_state(self) -> dict[str, Tensor]:
        """What of the current version a checkpoint holds beside the model, by name."""
        others = self._optimizer.keeps[1:]
        return {kept.name.lower(): await self.hold(kept) for kept in others}

    def release(self, buffer: Tensor) -> None:
        """Give back what `hold`, `hold_result` or, each on its own, `hold_state` returned."""
        for versions in self._whole.values():
            if versions.holds(buffer):
                versions.release(buffer)

    def regroup(self, newcomers: Sequence[int]) -> bool:
        """Let servers and workers form groups anew (`ServerLink.regroup`); whether they have."""
        self._instruct(Instruction(InstructionKind.REGROUP))
        return self._link.regroup(newcomers)

    def end(self) -> None:
        """Let the other servers go."""
        self._instruct(Instruction(InstructionKind.END))

    async def _change(self, instruction: Instruction) -> None:
        if self._optimizer.keeps != (Kept.MODEL,):
            pace = self._pace()
            instruction.trained = pace.trained
            instruction.learning_rate = pace.learning_rate
            instruction.weight = pace.weight
        failure: WorkerLost | ReductionBroken | None = None
        try:
            await self._carry_out(instruction)
        except (WorkerLost, ReductionBroken) as error:
            failure = error
        worker = instruction.worker
        if not await self._link.confirmed(worker) and failure is None:
            failure = WorkerLost(worker) if worker else ReductionBroken()
        self._undo = failure is not None
        self._own.settle(self._undo)
        if failure is not None:
            raise failure
        if self._link.servers > 1:
            self._collected.clear()

    async def _carry_out(self, instruction: Instruction) -> None:
        self._instruct(instruction)
        with self._timed():
            await self._own.carry_out(instruction)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = self._link.now()
        try:
            yield
        finally:
            self.communicate_seconds += self._link.now() - start

    def _instruct(self, instruction: Instruction) -> None:
        instruction.undo, self._undo = int(self._undo), False
        self._link.instruct(instruction)
