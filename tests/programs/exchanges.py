"""Servers and workers that only exchange vectors: over MPI (link_program.py) and virtually."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hpc_hdb.cluster.link import ServerLink, WorkerLink
from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.train.global_model import GlobalModel
from hpc_hdb.train.merge import MERGES, reduction_weights

CLUSTERS = [(1, 1), (1, 2), (1, 4), (2, 2), (3, 2), (1, 3), (2, 3)]
"""Servers and workers; all fit into five ranks."""
ROUNDS = 4
PROGRESS_REPORTS = 300
SIZES = (10007, 3)
"""The second has fewer floats than a model usually has parts."""


def factors(workers: int) -> list[float]:
    """A different update factor for every worker."""
    return [1 / (1 + worker / 3) for worker in range(workers)]


def initial(size: int) -> Tensor:
    return torch.linspace(-1, 1, size)


def noise(size: int, rank: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randn(size, generator=generator)


def train(model: Tensor, rank: int, number: int) -> None:
    """What stands for a round: a change that differs by worker and round."""
    model.mul_(0.5).add_(noise(len(model), rank, number).to(model.dtype))
    model[0] = -0.0  # only a sum of nothing but these is one itself


async def asp_server(link: ServerLink, size: int, merge: str) -> dict[str, Any]:
    """Merge each commit as it comes.

    The order in which they came, the final model, and by the number of commits before it what
    was collected now and then for a checkpoint.
    """
    model = GlobalModel(link, initial(size), MERGES[merge])
    model.distribute()
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    for worker in range(1, link.workers + 1):
        link.order(worker, Order(OrderKind.TRAIN))
        await model.send(worker)
    arrivals: list[int] = []
    collected: dict[int, Tensor] = {}
    held: list[Tensor] = []
    while len(arrivals) < ROUNDS * link.workers:
        worker, report = await inbox.next(ReportKind.COMMIT)
        last = report.index == ROUNDS - 1
        link.order(worker, Order(OrderKind.STOP if last else OrderKind.TRAIN))
        await model.merge(worker, factors(link.workers)[worker - 1], reply=not last)
        arrivals.append(worker)
        if len(arrivals) % 2:
            held.append(await model.hold())
            collected[len(arrivals)] = held[-1]
        if len(held) == 2:  # it was not to change while the next commits came
            collected[len(arrivals) - 2] = held[0].clone()
            model.release(held.pop(0))
    await inbox.every(ReportKind.LEAVE)
    final = (await model.hold()).clone()
    model.end()
    return {"arrivals": arrivals, "final": final, "collected": collected}


async def asp_worker(link: WorkerLink, size: int) -> dict[str, Any]:
    """Every model that came back."""
    model = torch.empty(size)
    pulled = []
    order = await link.report(Report(ReportKind.JOIN), model)
    number = 0
    while order.kind == OrderKind.TRAIN:
        pulled.append(model.clone())
        train(model, link.rank, number)
        time.sleep(0.002 * ((link.rank * 7 + number * 5) % 4))  # so that they take turns
        order = await link.exchange(Report(ReportKind.COMMIT, index=number), model)
        number += 1
    await link.leave(Report(ReportKind.LEAVE))
    return {"pulled": pulled}


async def bsp_server(link: ServerLink, size: int) -> dict[str, Any]:
    """Reduce and broadcast; every merged model."""
    weights = reduction_weights(factors(link.workers))
    model = GlobalModel(link, initial(size), MERGES["weighted"])
    model.distribute()
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    for worker in range(1, link.workers + 1):
        link.order(worker, Order(OrderKind.TRAIN))
        await model.send(worker)
    merged = []
    for number in range(ROUNDS):
        await inbox.every(ReportKind.COMMIT)
        for worker, weight in enumerate(weights, 1):
            link.order(worker, Order(OrderKind.REDUCE, weight=weight))
        await model.reduce()
        merged.append(await model.hold())
        kind = OrderKind.STOP if number == ROUNDS - 1 else OrderKind.TRAIN
        for worker in range(1, link.workers + 1):
            link.order(worker, Order(kind))
    await inbox.every(ReportKind.LEAVE)
    model.end()
    return {"merged": merged}


async def bsp_worker(link: WorkerLink, size: int) -> dict[str, Any]:
    """Every model that it committed, and every one that came back."""
    model = torch.empty(size)
    order = await link.report(Report(ReportKind.JOIN), model)
    committed, merged = [], []
    while order.kind == OrderKind.TRAIN:
        train(model, link.rank, len(merged))
        committed.append(model.clone())
        await link.elapse(1.0, 0.0)
        order = await link.report(Report(ReportKind.COMMIT), model)
        merged.append(model.clone())
    await link.leave(Report(ReportKind.LEAVE))
    return {"committed": committed, "merged": merged}


class Inbox:
    """The reports of a server's link by kind: one worker may leave before another commits."""

    def __init__(self, link: ServerLink) -> None:
        self._link = link
        self.kept: list[tuple[int, Report]] = []

    async def next(self, kind: ReportKind) -> tuple[int, Report]:
        """The next report of that kind."""
        while True:
            for item in self.kept:
                if item[1].kind == kind:
                    self.kept.remove(item)
                    return item
            item = await self._link.next_report(0.1)
            if item is not None:
                self.kept.append(item)

    async def every(self, kind: ReportKind) -> None:
        """Wait for a report of that kind from every worker."""
        workers = {(await self.next(kind))[0] for _ in range(self._link.workers)}
        assert len(workers) == self._link.workers, workers
