"""Run by test_link.py under mpirun: what can happen on the MPI link, without data or a model.

Each rank writes what it saw of every scenario to ``FOLDER/<servers>+<workers>-<rank>.pt``.
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
from exchanges import CLUSTERS, PROGRESS_REPORTS, Inbox
from mpi4py import MPI

from hpc_hdb.cluster.messages import Order, OrderKind, Report, ReportKind
from hpc_hdb.cluster.mpi import world
from hpc_hdb.cluster.mpi_server import MpiFollowerLink, MpiServerLink
from hpc_hdb.cluster.mpi_worker import MpiWorkerLink
from hpc_hdb.train.global_model import GlobalModel, follow_root
from hpc_hdb.train.merge import MERGES
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


def distributed(link: MpiServerLink, initial: torch.Tensor) -> GlobalModel:
    model = GlobalModel(link, initial, MERGES["weighted"])
    model.distribute()
    return model


async def records_server(link: MpiServerLink) -> dict[str, Any]:
    """Orders and reports with a value in every field arrive as they were sent."""
    model = distributed(link, torch.zeros(4))
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    sent, received = {}, {}
    for worker in range(1, link.workers + 1):
        order = random_record(Order, worker, OrderKind.TRAIN)
        sent[worker] = astuple(order)
        link.order(worker, order)
        await model.send(worker)
    for _ in range(link.workers):
        worker, report = await inbox.next(ReportKind.COMMIT)
        received[worker] = astuple(report)
        link.order(worker, Order(OrderKind.STOP))
        await model.drop(worker)
    await inbox.every(ReportKind.LEAVE)
    model.end()
    return {"sent": sent, "received": received}


async def records_worker(link: MpiWorkerLink) -> dict[str, Any]:
    model = torch.empty(4)
    order = await link.report(Report(ReportKind.JOIN), model)
    report = random_record(Report, 100 + link.rank, ReportKind.COMMIT)
    await link.exchange(report, model)
    await link.leave(Report(ReportKind.LEAVE))
    return {"sent": astuple(report), "received": astuple(order)}


async def progress_server(link: MpiServerLink, meeting: MPI.Comm) -> dict[str, Any]:
    """No report is taken before every worker has sent all its progress."""
    model = distributed(link, torch.zeros(LARGE))
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    for worker in range(1, link.workers + 1):
        link.order(worker, Order(OrderKind.TRAIN))
        await model.send(worker)
    meeting.Barrier()
    for _ in range(link.workers):
        worker, _ = await inbox.next(ReportKind.COMMIT)
        link.order(worker, Order(OrderKind.STOP))
        await model.drop(worker)
    await inbox.every(ReportKind.LEAVE)
    model.end()
    seen: dict[int, list[int]] = {worker: [] for worker in range(1, link.workers + 1)}
    for worker, report in inbox.kept:
        seen[worker].append(report.samples)
    return {"seen": seen}


async def progress_worker(link: MpiWorkerLink, meeting: MPI.Comm) -> dict[str, Any]:
    model = torch.empty(LARGE)
    await link.report(Report(ReportKind.JOIN), model)
    for number in range(PROGRESS_REPORTS):
        link.tell(Report(ReportKind.PROGRESS, samples=number))
    meeting.Barrier()
    await link.exchange(Report(ReportKind.COMMIT), model)
    await link.leave(Report(ReportKind.LEAVE))
    return {}


async def interrupt_server(link: MpiServerLink, meeting: MPI.Comm) -> dict[str, Any]:
    """Workers of odd rank train for ever, those of even rank wait for an order."""
    model = distributed(link, torch.zeros(4))
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    waiting = range(2, link.workers + 1, 2)
    for worker in range(1, link.workers + 1):
        link.order(worker, Order(OrderKind.TRAIN))
        await model.send(worker)
    meeting.Barrier()
    for _ in waiting:
        worker, _ = await inbox.next(ReportKind.COMMIT)
        await model.drop(worker)
    link.interrupt()
    for worker in waiting:
        link.order(worker, Order(OrderKind.STOP))
    await inbox.every(ReportKind.LEAVE)
    model.end()
    return {}


async def interrupt_worker(link: MpiWorkerLink, meeting: MPI.Comm) -> dict[str, Any]:
    model = torch.empty(4)
    await link.report(Report(ReportKind.JOIN), model)
    before = link.interrupted()
    meeting.Barrier()
    if link.rank % 2:
        while not link.interrupted():
            pass
        order = None
    else:
        order = await link.exchange(Report(ReportKind.COMMIT), model)
    await link.leave(Report(ReportKind.LEAVE))
    return {"before": before, "order": None if order is None else int(order.kind)}


async def versions_server(link: MpiServerLink, meeting: MPI.Comm) -> dict[str, Any]:
    """New versions are made while the first one is still on its way to everybody."""
    versions = Versions(link.distribute(torch.full((LARGE,), 1.0)), link)
    first = versions.current
    for worker in range(1, link.workers + 1):
        link.order(worker, Order(OrderKind.TRAIN))
        for part in link.parts:
            link.send(worker, versions.current, part)
    on_its_way = link.sending(first)
    addresses = set()
    for number in range(5):
        buffer = versions.spare()
        addresses.add(buffer.data_ptr())
        buffer.fill_(-number)
        versions.publish(buffer)
    meeting.Barrier()
    inbox = Inbox(link)
    await inbox.every(ReportKind.JOIN)
    held = versions.hold()
    for _ in range(link.workers):
        worker, _ = await inbox.next(ReportKind.COMMIT)
        buffer = versions.spare()
        addresses.add(buffer.data_ptr())
        link.order(worker, Order(OrderKind.STOP))
        async for _ in link.receive(worker, buffer):
            pass
        versions.publish(buffer)
    await inbox.every(ReportKind.LEAVE)
    return {
        "on its way": on_its_way,
        "still on its way": link.sending(first),
        "buffers": len(addresses),
        "held": held.unique().tolist(),
    }


async def versions_worker(link: MpiWorkerLink, meeting: MPI.Comm) -> dict[str, Any]:
    meeting.Barrier()
    model = torch.empty(LARGE)
    await link.report(Report(ReportKind.JOIN), model)
    received = model.unique().tolist()
    await link.exchange(Report(ReportKind.COMMIT), model.fill_(7))
    await link.leave(Report(ReportKind.LEAVE))
    return {"received": received}


def play_all(comm: MPI.Intracomm, servers: int) -> dict[str, Any]:
    """Every scenario, with the first `servers` ranks as servers; what this rank saw."""
    seen: dict[str, Any] = {}
    meeting = comm.Split(MPI.UNDEFINED if 0 < comm.rank < servers else 0)

    def play(
        name: str, server: Callable, worker: Callable, *arguments: Any, merge: str = "weighted"
    ) -> None:
        # Over MPI the coroutines never suspend, so any event loop will do.
        if comm.rank == 0:
            link = MpiServerLink(comm, servers)
            seen[name] = asyncio.run(server(link, *arguments))
            link.close()
        elif comm.rank < servers:
            follower = MpiFollowerLink(comm, servers)
            asyncio.run(follow_root(follower, MERGES[merge]))
            follower.close()
        else:
            seen[name] = asyncio.run(worker(MpiWorkerLink(comm, servers), *arguments))

    for size in exchanges.SIZES:
        for merge in ("weighted", "compsac"):

            async def asp_server(link: MpiServerLink, size: int, merge: str = merge) -> dict:
                return await exchanges.asp_server(link, size, merge)

            play(f"{merge} {size}", asp_server, exchanges.asp_worker, size, merge=merge)
        play(f"bsp {size}", exchanges.bsp_server, exchanges.bsp_worker, size)
    play("records", records_server, records_worker)
    play("progress", progress_server, progress_worker, meeting)
    play("interrupt", interrupt_server, interrupt_worker, meeting)
    if servers == 1:
        play("versions", versions_server, versions_worker, meeting)
    if meeting:
        meeting.Free()
    return seen


def main(folder: Path) -> None:
    everyone = world()
    pickle = forbid_pickle()
    for servers, workers in CLUSTERS:
        comm = everyone.Split(0 if everyone.rank < servers + workers else MPI.UNDEFINED)
        if comm != MPI.COMM_NULL:
            seen = {"pickle": pickle} | play_all(comm, servers)
            torch.save(seen, folder / f"{servers}+{workers}-{comm.rank}.pt")
            comm.Free()
    everyone.Free()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)
