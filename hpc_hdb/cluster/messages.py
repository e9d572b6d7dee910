"""The three small fixed-size records that servers and workers exchange beside the model."""

from __future__ import annotations

import enum
import struct
from dataclasses import astuple, dataclass, fields
from typing import ClassVar, TypeVar


class ReportKind(enum.IntEnum):
    """What a worker tells the server."""

    JOIN = 1
    COMMIT = 2
    PROGRESS = 3
    LEAVE = 4
    LEFT_OUT = 5
    """A bad image, whose sample is `index`."""
    DIVERGED = 6
    """A round that ended in NaN or infinity: there is nothing to commit."""
    UNDONE = 7
    """A reduction came to nothing, as a rank was lost in it: the merged model is not here."""
    LOST = 8
    """Not sent by the worker, but said of it by the link: it is gone."""
    PRESENT = 9
    """The answer to a MUSTER order."""


class OrderKind(enum.IntEnum):
    """What the server tells a worker."""

    TRAIN = 1
    STOP = 2
    EVALUATE = 3
    """Within a group: take part in the evaluation of the model that comes with it."""
    REDUCE = 4
    """Take part in a reduction (BSP), with a model scaled by `weight`; another order follows."""
    MUSTER = 5
    """Answer, before those that are left form new groups; another order follows."""


Self = TypeVar("Self", bound="_Record")


@dataclass
class _Record:
    """A dataclass of int and float fields that packs into a fixed number of bytes."""

    layout: ClassVar[struct.Struct]

    def __init_subclass__(cls) -> None:
        codes = ("d" if kind == "float" else "q" for kind in cls.__annotations__.values())
        cls.layout = struct.Struct("<" + "".join(codes))

    def pack(self) -> bytearray:
        return bytearray(self.layout.pack(*astuple(self)))

    @classmethod
    def unpack(cls: type[Self], data: bytes | bytearray) -> Self:
        values = cls.layout.unpack(data)
        return cls(**{field.name: value for field, value in zip(fields(cls), values, strict=True)})


@dataclass
class Report(_Record):
    """From a worker: what its round did and where its time went since the last report.

    `loss` is the sum over samples, `correct` the number classified right while training.
    `train_seconds` holds the local steps by the run's clock, `real_seconds` by the device's, which
    on the virtual cluster is another; the other seconds are real ones. `data_seconds` is the part
    of a round in which the steps waited for images.
    """

    kind: int
    small: int = 0
    index: int = 0
    samples: int = 0
    steps: int = 0
    correct: int = 0
    loss: float = 0.0
    train_seconds: float = 0.0
    real_seconds: float = 0.0
    data_seconds: float = 0.0
    rebuild_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    wait_seconds: float = 0.0
    communicate_seconds: float = 0.0


@dataclass
class Order(_Record):
    """From the server: the next round, or the end.

    `begin` and `end` are positions in the epoch's permutation, `commits` the global commit
    count of the model that comes with the order, `worker_commits` the worker's own. With
    `keep_state` the worker's state must be in its file before it commits: a checkpoint may follow.
    `weight` is the factor by which the worker scales its model in a reduction (BSP); with
    `regroup` those that take part form their group anew, without ranks that were lost and with
    `newcomers`, replacements of lost workers; such a one has its `position` among them, others -1.
    `learning_rate` holds at the start of the round and has grown by `rate_change` at its end.
    `next_resolution` and `next_batch` are what the round after this one will probably want.
    """

    kind: int
    small: int = 0
    index: int = 0
    epoch: int = 0
    part: int = 0
    slot: int = 0
    begin: int = 0
    end: int = 0
    stage: int = 0
    resolution: int = 0
    batch: int = 0
    next_resolution: int = 0
    next_batch: int = 0
    commits: int = 0
    worker_commits: int = 0
    keep_state: int = 0
    regroup: int = 0
    newcomers: int = 0
    position: int = -1
    learning_rate: float = 0.0
    rate_change: float = 0.0
    dropout: float = 0.0
    predicted_seconds: float = 0.0
    weight: float = 0.0


class InstructionKind(enum.IntEnum):
    """What the root server tells the other servers to do with their slices of the model."""

    MERGE = 1
    """Merge the commit of `worker`; with `reply`, send each part back as it is merged."""
    SEND = 2
    """Send the current version to `worker`."""
    DROP = 3
    """Receive the commit of `worker`, and forget it."""
    REDUCE = 4
    """Reduce all workers' commits to a new version, and send it to all of them."""
    COLLECT = 5
    """Hand the current version in to the root server: of its buffers the one in `kept`."""
    END = 6
    REGROUP = 7
    """Form groups with the root server and the workers that are left (BSP)."""


@dataclass
class Instruction(_Record):
    """From the root server to the others, which carry out all instructions in their order.

    The root does the same with its own slice, so that the n-th version of every slice belongs
    to the n-th version of the model. With `undo` the instruction before has come to nothing at
    some server: all go on from the version before it. `kept`, `trained`, `learning_rate` and
    `weight` are of `hpc_hdb.train.server_optimizer`.
    """

    kind: int
    worker: int = 0
    reply: int = 0
    undo: int = 0
    factor: float = 0.0
    kept: int = 0
    trained: int = 0
    learning_rate: float = 0.0
    weight: float = 0.0
