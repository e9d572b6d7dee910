"""The link between server and workers: over real MPI ranks, and its twin on the virtual clock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import succeed
from programs import exchanges
from programs.exchanges import PROGRESS_REPORTS, ROUNDS, SIZES, factors
from torch import Tensor

from hpc_hdb.cluster.virtual import VirtualCluster

PROGRAM = Path(__file__).parent / "programs" / "link_program.py"

Seen = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=[2, 3, 5], ids=lambda ranks: f"{ranks}ranks")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What every rank saw, by rank and scenario, of one program under mpirun."""
    folder = tmp_path_factory.mktemp("link")
    succeed(sys.executable, PROGRAM, folder, ranks=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int32).tolist()


def test_nothing_can_be_pickled_in_these_programs(seen: Seen) -> None:
    assert [rank["pickle"]["refused"] for rank in seen] == ["pickled"] * len(seen)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merge", ["weighted", "compsac"])
def test_asp_merges_in_the_order_of_arrival(seen: Seen, merge: str, size: int) -> None:
    name = f"{merge} {size}"
    workers = len(seen) - 1
    arrivals = seen[0][name]["arrivals"]
    assert sorted(arrivals) == sorted([*range(1, workers + 1)] * ROUNDS)
    pulled = {worker: [exchanges.initial(size).double()] for worker in range(1, workers + 1)}
    model = exchanges.initial(size).double()
    for worker in arrivals:
        commit = pulled[worker][-1].clone()
        exchanges.train(commit, worker, len(pulled[worker]) - 1)
        factor = factors(workers)[worker - 1]
        if merge == "weighted":
            model = (model + factor * commit) / (1 + factor)
        else:
            model = ((2 - factor) * model + factor * commit) / 2
        pulled[worker].append(model)
    torch.testing.assert_close(seen[0][name]["final"].double(), model, rtol=0, atol=2e-6)
    for worker, models in pulled.items():
        received = seen[worker][name]["pulled"]
        # After its last commit a worker is told to stop and gets no model.
        assert len(received) == len(models) - 1 == ROUNDS
        for model32, model64 in zip(received, models, strict=False):
            torch.testing.assert_close(model32.double(), model64, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_bsp_reduces_to_the_weighted_mean(seen: Seen, size: int) -> None:
    server, *workers = [rank[f"bsp {size}"] for rank in seen]
    assert len(server["merged"]) == ROUNDS
    weights = torch.tensor(factors(len(workers)), dtype=torch.float64)
    for number, merged in enumerate(server["merged"]):
        commits = torch.stack([worker["committed"][number] for worker in workers]).double()
        terms = weights[:, None] * commits / weights.sum()
        rounding = (len(workers) + 1) * torch.finfo(torch.float32).eps * terms.abs().sum(0)
        assert ((merged.double() - terms.sum(0)).abs() <= rounding).all()


@pytest.mark.parametrize("size", SIZES)
def test_bsp_gives_every_rank_the_same_bits(seen: Seen, size: int) -> None:
    server, *workers = [rank[f"bsp {size}"]["merged"] for rank in seen]
    expected = [bits(model) for model in server]
    for worker in workers:
        assert [bits(model) for model in worker] == expected


@pytest.mark.parametrize("size", SIZES)
def test_bsp_on_the_virtual_clock_gives_the_same_bits(seen: Seen, size: int) -> None:
    cluster = VirtualCluster(len(seen) - 1)
    workers = [exchanges.bsp_worker(link, size) for link in cluster.workers]
    virtual = cluster.run(exchanges.bsp_server(cluster.server, size), workers)
    merged = [bits(model) for model in virtual["merged"]]
    assert merged == [bits(model) for model in seen[0][f"bsp {size}"]["merged"]]


def test_records_arrive_as_they_were_sent(seen: Seen) -> None:
    server, *workers = [rank["records"] for rank in seen]
    for rank, worker in enumerate(workers, start=1):
        assert worker["received"] == server["sent"][rank]
        assert server["received"][rank] == worker["sent"]
        assert len(set(worker["sent"])) == len(worker["sent"]), "every field has its own value"


def test_progress_waits_for_nobody_and_keeps_its_order(seen: Seen) -> None:
    for reports in seen[0]["progress"]["seen"].values():
        assert reports, "no progress has arrived"
        assert reports == sorted(set(reports))
        assert set(reports) <= set(range(PROGRESS_REPORTS))


def test_an_interrupt_reaches_workers_that_train_and_orders_those_that_wait(seen: Seen) -> None:
    stop = 2
    for rank, worker in enumerate(seen[1:], start=1):
        assert worker["interrupt"]["before"] is False
        assert worker["interrupt"]["order"] == (None if rank % 2 else stop)


def test_a_version_on_its_way_is_not_overwritten(seen: Seen) -> None:
    server = seen[0]["versions"]
    assert server["on its way"], "the model was too small to be still on its way"
    assert [rank["versions"]["received"] for rank in seen[1:]] == [[1.0]] * (len(seen) - 1)


def test_buffers_are_used_again_once_nobody_reads_them(seen: Seen) -> None:
    server = seen[0]["versions"]
    assert not server["still on its way"]
    assert server["held"] == [-4.0], "a version that was held has changed"
    assert server["buffers"] <= 4
