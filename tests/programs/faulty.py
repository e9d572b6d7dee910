"""A model whose worker meets with an accident, as ``$HDB_FAULT`` says; for the tests of faults.

``HDB_FAULT="2:kill@push:3,1:nan@round:1"``: worker 2 is killed in the middle of its third push,
and worker 1's first round ends in NaN. Worker 0 is the last server, "2+" whoever replaces worker 2.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from models import Tiny
from torch import Tensor, nn

from hpc_hdb.cluster.messages import Order, Report, ReportKind
from hpc_hdb.cluster.mpi_worker import MpiWorkerLink
from hpc_hdb.train.global_model import GlobalModel
from hpc_hdb.train.trainer import Trainer

NAP_SECONDS = 4
_WORKER = str(
    int(os.environ.get("OMPI_COMM_WORLD_RANK", 0)) - int(os.environ.get("HDB_SERVERS", 1)) + 1
)
if sys.argv[0].endswith("replacement.py"):
    _WORKER = f"{json.loads(sys.argv[1])['worker']}+"
_PARTS_PUSHED = 3
"""Of a model's eight, before a worker dies in the middle of a push."""


def _faults() -> dict[tuple[str, int], str]:
    """What is to happen to this rank, by moment and how many times that has come."""
    found = {}
    for fault in filter(None, os.environ.get("HDB_FAULT", "").split(",")):
        worker, _, rest = fault.partition(":")
        what, _, moment = rest.partition("@")
        name, _, number = moment.partition(":")
        if worker == _WORKER:
            found[name, int(number or 1)] = what
    return found


_FAULTS = _faults()
_TIMES: Counter[str] = Counter()


def meet(moment: str) -> str:
    """The moment has come (again): die, stop, or tell what else is to happen."""
    _TIMES[moment] += 1
    fault = _FAULTS.get((moment, _TIMES[moment])) or _FAULTS.get((moment, 0), "")
    if fault == "nap":
        wake = f"sleep {NAP_SECONDS}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", wake], start_new_session=True)
    numbers = {
        "kill": signal.SIGKILL,
        "segv": signal.SIGSEGV,
        "abort": signal.SIGABRT,
        "stop": signal.SIGSTOP,
    }
    number = numbers.get("stop" if fault == "nap" else fault)
    if number is not None:
        time.sleep(0.05)  # what was sent before has left
        os.kill(os.getpid(), number)
    return fault


class _CutShort(list):
    """The parts of a model, of which only some are sent."""

    def __iter__(self) -> Any:
        for number, part in enumerate(super().__iter__()):
            if number == _PARTS_PUSHED:
                meet("push")
            yield part


class Faulty(Tiny):
    """Dies in the second step of a round, or spoils it."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.ballast = nn.Parameter(torch.zeros(300_000))
        meet("start")

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            Round.steps += 1
            if Round.steps == 2 and meet("round") == "nan":
                with torch.no_grad():
                    self.conv.weight.fill_(float("nan"))
            time.sleep(float(os.environ.get("HDB_STEP_SECONDS", 0)))
        return super().forward(images)


class Round:
    """The round under way."""

    steps = 0


def net(num_classes: int) -> nn.Module:
    return Faulty(num_classes)


def _before(owner: type, name: str, hook: Callable[..., None]) -> None:
    """Call `hook` with the same arguments before a method."""
    method = getattr(owner, name)

    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        hook(self, *arguments)
        return method(self, *arguments, **options)

    setattr(owner, name, wrapped)


def _reported(link: MpiWorkerLink, report: Report) -> None:
    if report.kind == ReportKind.JOIN:
        meet("join")


def _waits(link: MpiWorkerLink) -> None:
    if Round.steps:
        meet("reply")


def _begins(trainer: Trainer, order: Order, *_: Any) -> None:
    Round.steps = 0


if _FAULTS:
    whole_cut = MpiWorkerLink._cut
    _before(Trainer, "train_round", _begins)
    _before(MpiWorkerLink, "_report", _reported)
    _before(MpiWorkerLink, "_next_order", _waits)
    _before(MpiWorkerLink, "_reduce", lambda link, order: meet("reduce") and None)
    _before(MpiWorkerLink, "leave", lambda link, report: meet("leave") and None)
    _before(GlobalModel, "merge", lambda model, *_: meet("merge") and None)
    _before(GlobalModel, "reduce", lambda model: meet("merge") and None)
    reduce_scatter = MpiWorkerLink._reduce_scatter

    def scatter(link: MpiWorkerLink, *arguments: Any) -> Any:
        result = reduce_scatter(link, *arguments)
        meet("scatter")
        return result

    MpiWorkerLink._reduce_scatter = scatter
    MpiWorkerLink._cut = lambda link, model: _CutShort(whole_cut(link, model))
