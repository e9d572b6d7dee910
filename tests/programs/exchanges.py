"""Servers and workers that only exchange vectors: over MPI (link_program.py) and virtually."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hpc_hdb.cluster.link import ServerLink, WorkerLink
from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.train.merge import MERGES, reduction_weights
from hpc_hdb.train.versions import Versions

ROUNDS = 4
PROGRESS_REPORTS = 300
SIZES = (10007, 3)
"""The second is less than the most workers: some of their slices are empty."""


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
    """Merge each commit as it comes; the order in which they came, and the final model."""
    versions = Versions(initial(size), link)
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    for worker in range(1, link.workers + 1):
        link.reply(worker, Order(OrderKind.TRAIN), versions.current)
    arrivals: list[int] = []
    while len(arrivals) < ROUNDS * link.workers:
        worker, report = await inbox.next(ReportKind.COMMIT)
        buffer = versions.spare()
        await link.receive(worker, buffer)
        factor = factors(link.workers)[worker - 1]
        MERGES[merge](versions.current, buffer, factor, buffer)
        versions.publish(buffer)
        arrivals.append(worker)
        last = report.index == ROUNDS - 1
        kind = OrderKind.STOP if last else OrderKind.TRAIN
        link.reply(worker, Order(kind), None if last else versions.current)
    await inbox.every(ReportKind.LEAVE)
    return {"arrivals": arrivals, "final": versions.current}


async def asp_worker(link: WorkerLink, size: int) -> dict[str, Any]:
    """Every model that came back."""
    model = torch.empty(size)
    pulled = []
    order = await link.join(model)
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
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    model = initial(size)
    for worker in range(1, link.workers + 1):
        link.reply(worker, Order(OrderKind.TRAIN), model)
    merged = []
    for number in range(ROUNDS):
        await inbox.every(ReportKind.COMMIT)
        kind = OrderKind.STOP if number == ROUNDS - 1 else OrderKind.TRAIN
        orders = {worker: Order(kind, weight=weight) for worker, weight in enumerate(weights, 1)}
        out = torch.full((size,), float("nan"))
        await link.reduce(orders, out)
        await link.broadcast(out)
        merged.append(out)
    await inbox.every(ReportKind.LEAVE)
    return {"merged": merged}


async def bsp_worker(link: WorkerLink, size: int) -> dict[str, Any]:
    """Every model that it committed, and every one that came back."""
    model = torch.empty(size)
    order = await link.join(model)
    committed, merged = [], []
    while order.kind == OrderKind.TRAIN:
        train(model, link.rank, len(merged))
        committed.append(model.clone())
        await link.elapse(1.0, 0.0)
        order = await link.reduce(Report(ReportKind.COMMIT), model)
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
