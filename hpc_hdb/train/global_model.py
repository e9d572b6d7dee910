"""The global model, kept in slices by one or more servers.

Every server does the same with its own slice (`Slice`), in the same order. The root decides on
that order (`GlobalModel`); the others follow its instructions (`follow_root`). So the n-th
version of each slice belongs to the n-th version of the model, and a worker that is sent a
version, or a checkpoint that collects one, gets slices of one and the same.
"""

from __future__ import annotations

from torch import Tensor

from hpc_hdb.cluster.link import FollowerLink, ServerLink, SliceLink
from hpc_hdb.cluster.messages import Instruction, InstructionKind
from hpc_hdb.train.merge import Merge
from hpc_hdb.train.versions import Versions


class Slice:
    """One server's slice of the global model.

    Parameters
    ----------
    link : SliceLink
    initial : Tensor, shape (slice size,), float32
    merge : Merge
        How a worker's commit is merged (ASP, SSP).
    """

    def __init__(self, link: SliceLink, initial: Tensor, merge: Merge) -> None:
        self.versions = Versions(initial, link)
        self._link = link
        self._merge_part = merge

    async def carry_out(self, instruction: Instruction) -> None:
        """Do what changes this slice or sends it to workers."""
        if instruction.kind == InstructionKind.MERGE:
            await self._merge(instruction.worker, instruction.factor, bool(instruction.reply))
        elif instruction.kind == InstructionKind.SEND:
            for part in self._link.parts:
                self._link.send(instruction.worker, self.versions.current, part)
        elif instruction.kind == InstructionKind.REDUCE:
            await self._reduce()
        elif instruction.kind == InstructionKind.DROP:
            async for _ in self._link.receive(instruction.worker, self.versions.spare()):
                pass

    async def _merge(self, worker: int, factor: float, reply: bool) -> None:
        """Merge each part of a commit as it arrives, and send it back before the next."""
        model, commit = self.versions.current, self.versions.spare()
        async for part in self._link.receive(worker, commit):
            self._merge_part(model[part], commit[part], factor, commit[part])
            if reply:
                self._link.send(worker, commit, part)
        self.versions.publish(commit)

    async def _reduce(self) -> None:
        total = self.versions.spare()
        async for part in self._link.reduce(total):
            self._link.broadcast(total, part)
        self.versions.publish(total)


async def follow_root(link: FollowerLink, merge: Merge) -> None:
    """The loop of every server but the root."""
    own = Slice(link, await link.first_slice(), merge)
    while (instruction := await link.next_instruction()).kind != InstructionKind.END:
        if instruction.kind == InstructionKind.COLLECT:
            link.hand_in(own.versions.current)
        else:
            await own.carry_out(instruction)


class GlobalModel:
    """All slices, as the root server handles them.

    Parameters
    ----------
    link : ServerLink
    initial : Tensor, shape (size,), float32
        On the CPU; may be changed until `distribute`.
    merge : Merge
    """

    def __init__(self, link: ServerLink, initial: Tensor, merge: Merge) -> None:
        self.initial = initial
        self._link = link
        self._merge = merge
        self._collected = True
        self._own: Slice
        self._whole: Versions

    def distribute(self) -> None:
        """Give each server its slice of `initial`, before anything else."""
        self._own = Slice(self._link, self._link.distribute(self.initial), self._merge)
        if self._link.servers == 1:
            self._whole = self._own.versions
        else:  # what was last collected; in memory of its own
            self._whole = Versions(self.initial.clone(), self._link)

    async def merge(self, worker: int, factor: float, reply: bool) -> None:
        """Merge the worker's commit with its update factor; with `reply`, send it the result."""
        await self._change(Instruction(InstructionKind.MERGE, worker, reply=reply, factor=factor))

    async def reduce(self) -> None:
        """Merge all workers' commits, and send all of them the result (BSP)."""
        await self._change(Instruction(InstructionKind.REDUCE))

    async def send(self, worker: int) -> None:
        """Send the current version to a worker."""
        await self._carry_out(Instruction(InstructionKind.SEND, worker))

    async def drop(self, worker: int) -> None:
        """Take a commit from the worker that is not to be merged."""
        await self._carry_out(Instruction(InstructionKind.DROP, worker))

    async def hold(self) -> Tensor:
        """The whole current version, shape (size,), kept unchanged until `release`."""
        if not self._collected:
            whole = self._whole.spare()
            self._link.instruct(Instruction(InstructionKind.COLLECT))
            await self._link.collect(self._own.versions.current, whole)
            self._whole.publish(whole)
            self._collected = True
        return self._whole.hold()

    def release(self, model: Tensor) -> None:
        """Give back what `hold` returned."""
        self._whole.release(model)

    def end(self) -> None:
        """Let the other servers go."""
        self._link.instruct(Instruction(InstructionKind.END))

    async def _change(self, instruction: Instruction) -> None:
        await self._carry_out(instruction)
        self._collected = self._link.servers == 1

    async def _carry_out(self, instruction: Instruction) -> None:
        self._link.instruct(instruction)
        await self._own.carry_out(instruction)
