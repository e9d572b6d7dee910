"""Run by test_link.py under mpirun: what can happen on the MPI link, without data or a model.

Each rank writes what it saw of every scenario to ``FOLDER/<rank>.pt``.
"""

from __future__ import annotations

import asyncio
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import exchanges
import torch
from exchanges import PROGRESS_REPORTS, Inbox
from mpi4py import MPI

from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.cluster.mpi import MpiServerLink, MpiWorkerLink, world
from hpc_hdb.train.versions import Versions

LARGE = 4_000_000
"""Floats of a model that MPI cannot send before its receiver is there."""


def refuse(*_: Any) -> Any:
    raise RuntimeError("pickled")


def forbid_pickle() -> dict[str, Any]:
    """From here on MPI can pickle nothing."""
    MPI.pickle.__init__(refuse, refuse)
    try:
        MPI.COMM_SELF.bcast({}, 0)
    except RuntimeError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def random_record(kind: type[Report] | type[Order], seed: int, first: int) -> Any:
    """A record with a value of its own in every field."""
    source = random.Random(seed)
    values = {
        field.name: source.uniform(-1e9, 1e-9)
        if field.type == "float"
        else source.randrange(-(2**62), 2**62)
        for field in fields(kind)
    }
    return kind(**values | {"kind": int(first)})


async def records_server(link: MpiServerLink, comm: MPI.Intracomm) -> dict[str, Any]:
    """Orders and reports with a value in every field arrive as they were sent."""
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    model = torch.zeros(4)
    sent, received = {}, {}
    for worker in range(1, link.workers + 1):
        order = random_record(Order, worker, OrderKind.TRAIN)
        sent[worker] = astuple(order)
        link.reply(worker, order, model)
    for _ in range(link.workers):
        worker, report = await inbox.next(ReportKind.COMMIT)
        await link.receive(worker, torch.empty(4))
        received[worker] = astuple(report)
        link.reply(worker, Order(OrderKind.STOP), None)
    await inbox.every(ReportKind.LEAVE)
    return {"sent": sent, "received": received}


async def records_worker(link: MpiWorkerLink, comm: MPI.Intracomm) -> dict[str, Any]:
    model = torch.empty(4)
    order = await link.join(model)
    report = random_record(Report, 100 + link.rank, ReportKind.COMMIT)
    await link.exchange(report, model)
    await link.leave(Report(ReportKind.LEAVE))
    return {"sent": astuple(report), "received": astuple(order)}


async def progress_server(link: MpiServerLink, comm: MPI.Intracomm) -> dict[str, Any]:
    """No report is taken before every worker has sent all its progress."""
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    model = torch.zeros(LARGE)
    for worker in range(1, link.workers + 1):
        link.reply(worker, Order(OrderKind.TRAIN), model)
    comm.Barrier()
    for _ in range(link.workers):
        worker, _ = await inbox.next(ReportKind.COMMIT)
        await link.receive(worker, torch.empty(LARGE))
        link.reply(worker, Order(OrderKind.STOP), None)
    await inbox.every(ReportKind.LEAVE)
    seen: dict[int, list[int]] = {worker: [] for worker in range(1, link.workers + 1)}
    for worker, report in inbox.kept:
        seen[worker].append(report.samples)
    return {"seen": seen}


async def progress_worker(link: MpiWorkerLink, comm: MPI.Intracomm) -> dict[str, Any]:
    model = torch.empty(LARGE)
    await link.join(model)
    for number in range(PROGRESS_REPORTS):
        link.tell(Report(ReportKind.PROGRESS, samples=number))
    comm.Barrier()
    await link.exchange(Report(ReportKind.COMMIT), model)
    await link.leave(Report(ReportKind.LEAVE))
    return {}


async def interrupt_server(link: MpiServerLink, comm: MPI.Intracomm) -> dict[str, Any]:
    """Workers of odd rank train for ever, those of even rank wait for an order."""
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    model = torch.zeros(4)
    waiting = range(2, link.workers + 1, 2)
    for worker in range(1, link.workers + 1):
        link.reply(worker, Order(OrderKind.TRAIN), model)
    comm.Barrier()
    for _ in waiting:
        worker, _ = await inbox.next(ReportKind.COMMIT)
        await link.receive(worker, torch.empty(4))
    link.interrupt()
    for worker in waiting:
        link.reply(worker, Order(OrderKind.STOP), None)
    await inbox.every(ReportKind.LEAVE)
    return {}


async def interrupt_worker(link: MpiWorkerLink, comm: MPI.Intracomm) -> dict[str, Any]:
    model = torch.empty(4)
    await link.join(model)
    before = link.interrupted()
    comm.Barrier()
    if link.rank % 2:
        while not link.interrupted():
            pass
        order = None
    else:
        order = await link.exchange(Report(ReportKind.COMMIT), model)
    await link.leave(Report(ReportKind.LEAVE))
    return {"before": before, "order": None if order is None else int(order.kind)}


async def versions_server(link: MpiServerLink, comm: MPI.Intracomm) -> dict[str, Any]:
    """New versions are made while the first one is still on its way to everybody."""
    versions = Versions(torch.full((LARGE,), 1.0), link)
    first = versions.current
    for worker in range(1, link.workers + 1):
        link.reply(worker, Order(OrderKind.TRAIN), versions.current)
    on_its_way = link.sending(first)
    addresses = set()
    for number in range(5):
        buffer = versions.spare()
        addresses.add(buffer.data_ptr())
        buffer.fill_(-number)
        versions.publish(buffer)
    comm.Barrier()
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    held = versions.hold()
    for _ in range(link.workers):
        worker, _ = await inbox.next(ReportKind.COMMIT)
        buffer = versions.spare()
        addresses.add(buffer.data_ptr())
        await link.receive(worker, buffer)
        versions.publish(buffer)
        link.reply(worker, Order(OrderKind.STOP), None)
    await inbox.every(ReportKind.LEAVE)
    return {
        "on its way": on_its_way,
        "still on its way": link.sending(first),
        "buffers": len(addresses),
        "held": held.unique().tolist(),
    }


async def versions_worker(link: MpiWorkerLink, comm: MPI.Intracomm) -> dict[str, Any]:
    comm.Barrier()
    model = torch.empty(LARGE)
    await link.join(model)
    received = model.unique().tolist()
    await link.exchange(Report(ReportKind.COMMIT), model.fill_(7))
    await link.leave(Report(ReportKind.LEAVE))
    return {"received": received}


def main(folder: Path) -> None:
    comm = world()
    seen: dict[str, Any] = {"pickle": forbid_pickle()}

    def play(name: str, server: Callable, worker: Callable, *arguments: Any) -> None:
        link: Any = MpiServerLink(comm) if comm.rank == 0 else MpiWorkerLink(comm)
        part = server if comm.rank == 0 else worker
        # Over MPI the coroutines never suspend, so any event loop will do.
        seen[name] = asyncio.run(part(link, *arguments))

    for size in exchanges.SIZES:
        for merge in ("weighted", "compsac"):

            async def asp_server(link: MpiServerLink, size: int, merge: str = merge) -> dict:
                return await exchanges.asp_server(link, size, merge)

            play(f"{merge} {size}", asp_server, exchanges.asp_worker, size)
        play(f"bsp {size}", exchanges.bsp_server, exchanges.bsp_worker, size)
    play("records", records_server, records_worker, comm)
    play("progress", progress_server, progress_worker, comm)
    play("interrupt", interrupt_server, interrupt_worker, comm)
    play("versions", versions_server, versions_worker, comm)
    torch.save(seen, folder / f"{comm.rank}.pt")
    comm.Free()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)
