"""The link between server and workers: over real MPI ranks, and its twin on the virtual clock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import succeed
from programs import exchanges
from programs.exchanges import CLUSTERS, PROGRESS_REPORTS, ROUNDS, SIZES, factors
from torch import Tensor

from hpc_hdb.cluster.link import ServerLink
from hpc_hdb.cluster.virtual import VirtualCluster
from hpc_hdb.train.global_model import follow_root
from hpc_hdb.train.merge import MERGES

PROGRAM = Path(__file__).parent / "programs" / "link_program.py"

Seen = list[dict[str, dict[str, Any]]]


Cluster = tuple[int, int]


@pytest.fixture(scope="module")
def all_seen(tmp_path_factory: pytest.TempPathFactory) -> dict[Cluster, Seen]:
    """What root and workers saw, by scenario, of one program under mpirun."""
    folder = tmp_path_factory.mktemp("link")
    succeed(sys.executable, PROGRAM, folder, ranks=5)

    def read(servers: int, workers: int) -> Seen:
        ranks = [0, *range(servers, servers + workers)]
        files = [folder / f"{servers}+{workers}-{rank}.pt" for rank in ranks]
        return [torch.load(file, weights_only=True) for file in files]

    return {cluster: read(*cluster) for cluster in CLUSTERS}


@pytest.fixture(params=CLUSTERS, ids=lambda cluster: "{} servers, {} workers".format(*cluster))
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """Number of servers and of workers."""
    return request.param


@pytest.fixture
def seen(cluster: Cluster, all_seen: dict[Cluster, Seen]) -> Seen:
    """What root and workers saw in one cluster."""
    return all_seen[cluster]


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
    collected = seen[0][name]["collected"]
    assert len(collected) == (len(arrivals) + 1) // 2
    for number, worker in enumerate(arrivals, start=1):
        commit = pulled[worker][-1].clone()
        exchanges.train(commit, worker, len(pulled[worker]) - 1)
        factor = factors(workers)[worker - 1]
        if merge == "weighted":
            model = (model + factor * commit) / (1 + factor)
        else:
            model = ((2 - factor) * model + factor * commit) / 2
        pulled[worker].append(model)
        if number in collected:
            torch.testing.assert_close(collected[number].double(), model, rtol=0, atol=2e-6)
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
def test_bsp_on_the_virtual_clock_gives_the_same(seen: Seen, cluster: Cluster, size: int) -> None:
    """The same bits for two workers; MPI may add up those of more in another order."""
    servers, workers = cluster
    virtual = simulate(servers, workers, exchanges.bsp_server, exchanges.bsp_worker, size)
    merged = zip(virtual["merged"], seen[0][f"bsp {size}"]["merged"], strict=True)
    for ours, theirs in merged:
        if workers <= 2:
            assert bits(ours) == bits(theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("workers", [2, 3])
def test_bsp_gives_the_same_bits_with_more_servers(
    all_seen: dict[Cluster, Seen], workers: int, size: int
) -> None:
    found = [
        [bits(model) for model in all_seen[cluster][0][f"bsp {size}"]["merged"]]
        for cluster in CLUSTERS
        if cluster[1] == workers
    ]
    assert len(found) > 1
    assert all(merged == found[0] for merged in found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merge", ["weighted", "compsac"])
def test_asp_gives_the_same_bits_with_more_servers(merge: str, size: int) -> None:
    """On the virtual clock, where the order of commits is the same too."""

    async def server(link: ServerLink, size: int) -> dict[str, Any]:
        return await exchanges.asp_server(link, size, merge)

    one, *more = [simulate(n, 3, server, exchanges.asp_worker, size, merge) for n in (1, 2, 5)]
    for other in more:
        assert other["arrivals"] == one["arrivals"]
        assert bits(other["final"]) == bits(one["final"])
        assert other["collected"].keys() == one["collected"].keys()
        for number, model in other["collected"].items():
            assert bits(model) == bits(one["collected"][number])


def simulate(
    servers: int,
    workers: int,
    server: Callable,
    worker: Callable,
    size: int,
    merge: str = "weighted",
) -> dict[str, Any]:
    """The same exchange on the virtual clock; what its root saw."""
    cluster = VirtualCluster(workers, servers=servers)
    return cluster.run(
        server(cluster.server, size),
        [worker(link, size) for link in cluster.workers],
        [follow_root(link, MERGES[merge]) for link in cluster.followers],
    )


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


def test_a_version_on_its_way_is_not_overwritten(all_seen: dict[Cluster, Seen]) -> None:
    seen = all_seen[1, 4]
    server = seen[0]["versions"]
    assert server["on its way"], "the model was too small to be still on its way"
    assert [rank["versions"]["received"] for rank in seen[1:]] == [[1.0]] * (len(seen) - 1)


def test_buffers_are_used_again_once_nobody_reads_them(all_seen: dict[Cluster, Seen]) -> None:
    seen = all_seen[1, 4]
    server = seen[0]["versions"]
    assert not server["still on its way"]
    assert server["held"] == [-4.0], "a version that was held has changed"
    assert server["buffers"] <= 4
