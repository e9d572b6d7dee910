"""Timing of many workers: the simulation against closed forms, and what a user reads of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TIMING
from test_command_line import Terminal, assert_one_line, hdb, sets

from hpc_hdb.cluster.timing import time_commits
from hpc_hdb.plan import BatchTime, cut_stages
from hpc_hdb.plan.network import (
    Network,
    all_reduce_seconds,
    commit_cost,
    fit_network,
    reduction_seconds,
)
from hpc_hdb.plan.topology import Topology
from hpc_hdb.plan.workload import Workload

__all__ = ["hdb"]

MODEL = 40_000_000
NETWORK = Network(
    latency=1e-5,
    bandwidth=1e9,
    merge_rate=4e9,
    overhead=1e-4,
    commit_rate=0.4e9,
    server_rate=0.8e9,
    reduce_rate=0.4e9,
    exchange_rate=1e9,
    fabric_rate=None,
    node_latency=1e-6,
    node_bandwidth=1e10,
)
ALONE = 4 * 1e-5 + 1e-4 + 0.1
"""Of a commit, by the constants above: ``C``."""
PERIOD = 1e-4 + 0.05
"""From commit to commit at a server that is never idle: ``P``."""

STAR = Topology("star")
SHARDED = Topology("sharded", servers=4)
TREE = Topology("tree", fan_out=8)


def simulate(workers: int, train: float, topology: Topology = STAR, sync: str = "asp", **options):
    return time_commits(
        NETWORK, topology, MODEL, [train] * workers, [0.0] * workers, sync, **options
    )


# ---- the simulation against closed forms ------------------------------------------------------


def test_a_commit_alone_and_a_server_that_is_never_idle() -> None:
    cost = commit_cost(NETWORK, MODEL)
    assert (cost.alone, cost.period) == pytest.approx((ALONE, PERIOD))


def test_servers_share_the_merge_but_not_a_workers_link() -> None:
    link = MODEL / NETWORK.bandwidth
    several = [commit_cost(NETWORK, MODEL, servers) for servers in (1, 2, 4, 64)]
    assert [cost.period for cost in several] == pytest.approx(
        [1e-4 + max(link, 0.05 / servers) for servers in (1, 2, 4, 64)]
    )
    assert [cost.alone for cost in several] == sorted((c.alone for c in several), reverse=True)
    assert several[-1].alone > link


@pytest.mark.parametrize("sync", ["asp", "ssp"])
@pytest.mark.parametrize("workers", [1, 2, 5, 16, 64, 300])
@pytest.mark.parametrize("topology", [STAR, SHARDED], ids=lambda topology: topology.name)
def test_rounds_follow_the_asymptotes_of_a_closed_queue(
    topology: Topology, workers: int, sync: str
) -> None:
    train, cost = 1.0, commit_cost(NETWORK, MODEL, topology.servers)
    timing = simulate(workers, train, topology, sync)
    expected = max(train + cost.alone, workers * cost.period)
    assert timing.round_seconds == pytest.approx(expected, rel=1e-6)
    assert timing.server_load == pytest.approx(workers * cost.period / expected, rel=1e-6)
    assert timing.train_seconds == pytest.approx(train)
    assert timing.communicate_seconds == pytest.approx(cost.alone)
    assert timing.wait_seconds == pytest.approx(expected - train - cost.alone, abs=1e-6)


def test_sixteen_thousand_workers_on_one_server() -> None:
    timing = simulate(16384, 30.0)
    assert timing.round_seconds == pytest.approx(16384 * PERIOD)
    assert timing.server_load == pytest.approx(1)


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_a_bulk_synchronous_round_is_the_slowest_worker_and_the_merge(workers: int) -> None:
    train = [1.0] * (workers - 1) + [1.5]
    timing = time_commits(NETWORK, STAR, MODEL, train, [0.0] * workers, "bsp")
    merge, _ = reduction_seconds(NETWORK, STAR, MODEL, workers)
    assert timing.round_seconds == pytest.approx(1.5 + merge)
    assert timing.communicate_seconds == pytest.approx(merge)
    assert timing.wait_seconds == pytest.approx(1.5 - sum(train) / workers)


def test_a_reduction_on_a_shared_fabric_grows_with_every_worker() -> None:
    shared = replace(NETWORK, latency=1e-12, overhead=1e-12, fabric_rate=0.5e9)
    seconds = [reduction_seconds(shared, STAR, MODEL, n)[0] for n in (1, 2, 16, 32)]
    assert seconds == pytest.approx([0.1, 0.16, 16 * 0.08, 32 * 0.08])


def test_a_worker_of_many_ranks_commits_for_all_of_them() -> None:
    alone = simulate(8, 0.1)
    grouped = time_commits(
        NETWORK, Topology("grouped", ranks_per_worker=4), MODEL, [0.1] * 2, [0.02] * 2, "asp"
    )
    assert alone.round_seconds == pytest.approx(8 * PERIOD)
    assert grouped.round_seconds == pytest.approx(0.12 + ALONE)
    assert grouped.communicate_seconds == pytest.approx(0.02 + ALONE)


def test_a_ring_all_reduce_moves_each_byte_almost_twice() -> None:
    assert all_reduce_seconds(NETWORK, MODEL, 1) == 0
    assert all_reduce_seconds(NETWORK, MODEL, 4) == pytest.approx(2 * 3 * (MODEL / 4e10 + 1e-6))


@pytest.mark.parametrize("sync", ["asp", "ssp", "bsp"])
def test_a_tree_of_one_level_is_a_star(sync: str) -> None:
    assert simulate(8, 1.0, TREE, sync, jitter=0.1) == simulate(8, 1.0, STAR, sync, jitter=0.1)


def test_a_tree_bears_any_number_of_workers() -> None:
    timings = {workers: simulate(workers, 1.0, TREE) for workers in (64, 512, 4096)}
    for workers, timing in timings.items():
        assert timing.round_seconds < 1.0 + 8 * PERIOD + 4 * ALONE < workers * PERIOD
        assert timing.server_load < 0.4


@pytest.mark.parametrize(
    ("workers", "levels", "servers"),
    [(8, [8], 1), (9, [9, 2], 3), (64, [64, 8], 9), (65, [65, 9, 2], 12)],
)
def test_levels_of_a_tree(workers: int, levels: list[int], servers: int) -> None:
    assert TREE.levels(workers) == levels
    assert TREE.server_ranks(workers) == servers
    # Uneven rows are served too, each worker as often as any other.
    assert simulate(workers, 1.0, TREE).round_seconds < 1.0 + 8 * PERIOD + 4 * ALONE


# ---- waiting ----------------------------------------------------------------------------------


def test_the_bound_of_ssp_keeps_fast_workers_with_the_slowest() -> None:
    train = [1.0, 1.0, 1.0, 4.0]
    asp, ssp = (
        time_commits(NETWORK, STAR, MODEL, train, [0.0] * 4, sync, staleness=2)
        for sync in ("asp", "ssp")
    )
    assert ssp.round_seconds == pytest.approx(4.0 + ALONE, rel=1e-2)
    assert asp.round_seconds == pytest.approx((3 * 1.0 + 4.0) / 4 + ALONE, rel=1e-2)
    assert ssp.wait_seconds == pytest.approx(4.0 - 1.75, rel=2e-2)


def test_jitter_costs_bsp_the_slowest_of_all_and_asp_nothing() -> None:
    waits = {
        sync: [simulate(n, 100.0, sync=sync, jitter=0.05).wait_seconds for n in (4, 64, 1024)]
        for sync in ("asp", "ssp", "bsp")
    }
    # The expected greatest of n standard normal values is about 1.03, 2.39 and 3.25.
    assert waits["bsp"] == pytest.approx([5.15, 11.9, 16.2], rel=0.1)
    assert waits["asp"][0] < 0.1
    assert all(
        a <= s <= b for a, s, b in zip(waits["asp"], waits["ssp"], waits["bsp"], strict=True)
    )


def test_a_seed_repeats_a_simulation() -> None:
    first, second, other = (simulate(16, 1.0, jitter=0.1, seed=seed) for seed in (1, 1, 2))
    assert first == second != other


# ---- a workload, and where servers saturate ---------------------------------------------------


def workload(**changes) -> Workload:
    stages = cut_stages(2, 0.1, [], 0.1, [16, 24], [0.0, 0.0], [64, 32], True)
    timing = {16: BatchTime(1e-3, 1e-2), 24: BatchTime(2e-3, 1e-2)}
    return replace(Workload(stages, timing, 100_000, 0.0, 1.0, 1, MODEL), **changes)


def test_a_round_is_averaged_over_the_epochs() -> None:
    (group,) = workload().rounds(100)
    assert group.steps == (16 + 32) / 2
    assert group.seconds == pytest.approx((1.0 + 0.16 + 2.0 + 0.32) / 2)


def test_large_and_small_batches_take_the_same_time() -> None:
    large, small = workload(small_share=0.25, time_ratio=1.1).rounds(100)
    assert (large.workers, small.workers) == (75, 25)
    assert small.steps > 2 * large.steps
    assert small.seconds == pytest.approx(large.seconds, rel=0.03)


def test_all_workers_take_large_batches_where_no_plan_has_small_ones() -> None:
    (group,) = workload(small_share=0.25, time_ratio=1.5).rounds(100)
    assert group.workers == 100


@pytest.mark.parametrize("commits", [1, 4])
@pytest.mark.parametrize("topology", [STAR, SHARDED, Topology("grouped", ranks_per_worker=8)])
def test_the_server_is_busy_all_the_time_from_saturation_on(
    topology: Topology, commits: int
) -> None:
    load = workload(commits_per_epoch=commits)
    limit = load.saturation(NETWORK, topology, "asp")
    assert limit is not None
    size = topology.ranks_per_worker

    def simulated(ranks: int) -> float:
        members = load.members(NETWORK, topology, ranks // size * size)
        return time_commits(NETWORK, topology, MODEL, *members, "asp").server_load

    assert simulated(limit) == pytest.approx(1, abs=1e-3)
    assert simulated(limit // 2) < 0.5


def test_bsp_is_limited_where_merging_takes_longer_than_training() -> None:
    load = workload()
    limit = load.saturation(NETWORK, STAR, "bsp")
    assert limit is not None
    for ranks, longer in ((limit - 1, False), (limit, True)):
        merge, _ = reduction_seconds(NETWORK, STAR, MODEL, ranks)
        (group,) = load.rounds(ranks)
        assert (merge >= group.seconds) == longer


@pytest.mark.parametrize("commits", [1, 32, 200])
def test_small_shares_that_so_many_commits_would_cut_into_nothing_are_not_asked_for(
    commits: int,
) -> None:
    load = workload(small_share=0.75, time_ratio=1.05, samples=50_000, commits_per_epoch=commits)
    assert load.saturation(NETWORK, STAR, "asp") is not None


def test_a_tree_saturates_with_a_full_server_or_never() -> None:
    slow = workload(timing={16: BatchTime(1.0, 1.0), 24: BatchTime(1.0, 1.0)})
    assert slow.saturation(NETWORK, TREE, "asp") is None
    assert slow.saturation(NETWORK, STAR, "asp") is not None


# ---- constants from measurements --------------------------------------------------------------


@pytest.mark.parametrize("fabric", [None, 0.3e9])
def test_a_fit_finds_the_constants_behind_what_was_measured(fabric: float | None) -> None:
    truth = replace(NETWORK, fabric_rate=fabric)
    cost = commit_cost(truth, MODEL)

    def transfers(latency: float, bandwidth: float) -> list[tuple[int, float]]:
        return [(0, latency), *((n, latency + n / bandwidth) for n in (MODEL // 4, MODEL))]

    fitted = fit_network(
        MODEL,
        transfers(truth.latency, truth.bandwidth),
        transfers(truth.node_latency, truth.node_bandwidth),
        MODEL / truth.merge_rate,
        truth.overhead,
        {1: cost.alone, 7: 7 * cost.period},
        {
            n: reduction_seconds(
                replace(truth, fabric_rate=fabric if n > 2 else None), STAR, MODEL, n
            )[0]
            for n in (1, 2, 7)
        },
    )
    for name, value in vars(truth).items():
        assert getattr(fitted, name) == (None if value is None else pytest.approx(value)), name


def test_noise_larger_than_a_small_model_leaves_constants_that_can_be_used() -> None:
    quick = [(4, 1e-4), (1000, 0.9e-4), (4000, 0.8e-4)]
    reductions = {1: 1e-4, 2: 0.9e-4, 3: 0.8e-4}
    fitted = fit_network(4000, quick, quick, 1e-6, 1e-3, {1: 1e-4, 3: 1e-4}, reductions)
    assert all(math.isfinite(value) and value > 0 for value in vars(fitted).values() if value)


def test_two_ranks_give_constants_too() -> None:
    points = [(4, 1e-5), (MODEL, 0.04)]
    fitted = fit_network(MODEL, points, points, 0.01, 1e-4, {1: 0.1}, {1: 0.1})
    assert fitted.server_rate == pytest.approx(MODEL / 0.05, rel=1e-2)
    assert fitted.fabric_rate is None


# ---- what a user reads ------------------------------------------------------------------------

DIGITS = ["digits", "--samples", "1437", *sets(TIMING)]


def test_simulated_timing_as_json(hdb: Terminal) -> None:
    shown = hdb.json("simulate", *DIGITS, "--timing-only", "--workers", "64,4,1024")
    assert shown["network"]["source"].startswith("10 Gbit/s assumed")
    assert [topology["name"] for topology in shown["topologies"]] == [
        "star",
        "sharded",
        "grouped",
        "tree",
    ]
    star, sharded, grouped, tree = shown["topologies"]
    assert [row["workers"] for row in star["rows"]] == [4, 64, 1024]
    assert [row["workers"] for row in grouped["rows"]] == [64, 1024]
    assert [row["server_ranks"] for row in tree["rows"]] == [1, 3, 33]
    assert sharded["servers"] == 4
    for row in (row for topology in shown["topologies"] for row in topology["rows"]):
        parts = ("train_seconds", "communicate_seconds", "wait_seconds")
        assert sum(row[part] for part in parts) == pytest.approx(row["round_seconds"])
        assert 0 < row["server_load"] <= 1
    assert star["rows"][-1]["server_load"] > 0.99


def test_simulated_timing_as_tables(hdb: Terminal) -> None:
    answer = hdb("simulate", *DIGITS, "--timing-only", "--workers", "4,16384", "--fan-out", "16")
    assert answer.status == 0
    for title in ("Star, one server: saturates at", "Sharded, 4 servers", "Tree, 16 to a server"):
        assert title in answer.out
    assert "with more than 4 workers there is not a sample for each commit" in answer.out
    assert list(Path().iterdir()) == []


def test_a_measured_network_is_found_beside_the_timing_and_by_name(
    hdb: Terminal, tmp_path: Path
) -> None:
    values = vars(NETWORK) | {"ranks": 3}
    (tmp_path / "network.json").write_text(json.dumps(values))
    words = ["simulate", *DIGITS, "--timing-only", "--workers", "4"]
    assert hdb.json(*words)["network"] == vars(NETWORK) | {
        "source": "measured with 3 ranks, network.json"
    }
    (tmp_path / "network.json").rename(tmp_path / "other[one].json")
    assert "assumed" in hdb.json(*words)["network"]["source"]
    source = "measured with 3 ranks, other[one].json"
    named = sets("plan.network=other[one].json")
    assert hdb.json(*words, *named)["network"]["source"] == source
    for command in (words, ["plan", *DIGITS]):
        assert source in hdb(*command, *named).out


def test_a_plan_says_where_commits_cut_the_batches(hdb: Terminal) -> None:
    words = ["plan", *DIGITS, *sets("plan.small_workers=0")]
    assert "commits:" not in hdb(*words).out
    cut = hdb(*words, *sets("server.commits_per_epoch=6")).out
    images = round(1437 / 3) / 6
    assert f"commits: a round of {images:.0f} images is 2 steps of {images / 2:.0f} at " in cut
    assert "where batches of 64 are planned" in cut


def test_a_plan_says_nothing_of_batches_that_nobody_trains(hdb: Terminal) -> None:
    one = sets("schedule.resolutions=[16]", "schedule.dropout=[0]", "schedule.large_batch=[64]")
    words = ["plan", "digits", "--samples", "50000", *sets(TIMING), *one]
    commits = sets("server.commits_per_epoch=620")  # of rounds of 27 images, the small batch
    assert "where batches of 64 are planned" in hdb(*words, *commits).out
    assert "commits:" not in hdb(*words, *commits, *sets("plan.small_workers=3")).out


def test_a_plan_recommends_the_simplest_topology_that_is_fast(
    hdb: Terminal, tmp_path: Path
) -> None:
    fast = replace(NETWORK, bandwidth=1e11, commit_rate=1e11, server_rate=1e11)
    merging = replace(NETWORK, bandwidth=1e12, merge_rate=2e7, commit_rate=2e7, server_rate=2e7)
    linked = replace(NETWORK, bandwidth=1e7, commit_rate=1e7, server_rate=1e7)
    told = []
    for network in (fast, merging, linked):
        (tmp_path / "network.json").write_text(json.dumps(vars(network) | {"ranks": 3}))
        answer = hdb("plan", *DIGITS, "--workers", "64", *sets("plan.small_workers=0"))
        assert answer.status == 0
        told.append(answer.out.splitlines()[-1])
    assert told[0].startswith("topology: one server: it is busy ")
    assert told[1].startswith("topology: server.servers = ")
    assert told[2].startswith("topology: server.ranks_per_worker = 8")
    advice = hdb.json("plan", *DIGITS, "--workers", "64", *sets("plan.small_workers=0"))["topology"]
    assert (advice["name"], advice["ranks_per_worker"]) == ("grouped", 8)
    assert advice["epoch_seconds"] < advice["star_epoch_seconds"]


def test_ranks_that_share_a_batch_are_timed_as_so_many_of_a_part_of_it(hdb: Terminal) -> None:
    words = ["digits", "--samples", "50000", *sets(TIMING)]
    shared = sets("server.ranks_per_worker=8", "plan.workers=16", "plan.small_workers=4")
    alone = sets("schedule.large_batch=[8,8]", "plan.workers=128", "plan.small_workers=32")
    simulate = ["simulate", *words, "--timing-only", "--workers", "4,128"]
    assert hdb.json(*simulate, *shared) == hdb.json(*simulate, *alone)
    plan = hdb.json("plan", *words, *shared)
    assert (plan["workers"], plan["ranks_per_worker"]) == (16, 8)
    assert plan["topology"] == hdb.json("plan", *words, *alone)["topology"]
    assert "with 128 workers of one rank" in hdb("plan", *words, *shared).out


def test_a_measured_batch_is_a_ranks_however_many_share_it(hdb: Terminal, tmp_path: Path) -> None:
    line = {"seconds_per_image": 1e-3, "overhead": 1e-2, "large_batch": 32}
    (tmp_path / "timing.json").write_text(json.dumps({"resolutions": {"16": line, "24": line}}))
    measured = sets("plan.timing=timing.json", "schedule.large_batch=[]")
    words = ["simulate", *DIGITS[:3], *measured, "--timing-only", "--workers", "4"]
    assert hdb.json(*words) == hdb.json(*words, *sets("server.ranks_per_worker=8"))


def test_all_reduce_has_a_plan_and_no_topology(hdb: Terminal) -> None:
    words = ["plan", *DIGITS, *sets("server.sync=allreduce")]
    plan = hdb.json(*words)
    assert (plan["workers"], plan["ranks_per_worker"], plan["topology"]) == (1, 3, None)
    answer = hdb(*words)
    assert answer.status == 0
    assert "topology" not in answer.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*DIGITS, "--workers", "many"], "--workers many: give numbers from 1 up"),
        ([*DIGITS, "--workers", "4,0"], "--workers 4,0: give numbers from 1 up"),
        ([*DIGITS, "--workers", "5000"], "1437 training samples cannot be shared by 5000 workers"),
        (["digits"], "'hdb profile', then --set plan.timing=timing.json"),
        ([], "--timing-only takes a CONFIG"),
        ([*DIGITS, *sets("plan.network=gone.json")], "no network file gone.json"),
        ([*DIGITS, *sets("plan.network=bad.json")], "network file bad.json is damaged (KeyError"),
        ([*DIGITS, *sets("plan.network=not.json")], "network file not.json is damaged (JSON"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_an_error_is_one_line_that_says_what_to_do(
    hdb: Terminal, words: list[str], told: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text('{"ranks": 3, "latency": 1e-5}')
    (tmp_path / "not.json").write_text("{")
    assert told in hdb.refused("simulate", *words, "--timing-only")


@pytest.mark.parametrize("option", ["--workers=8", "--jitter=0.05", "--json"])
def test_options_of_the_timing_are_not_ignored(hdb: Terminal, option: str) -> None:
    told = hdb.refused("simulate", "digits", option)
    assert told.startswith(f"hdb: {option.partition('=')[0]} goes with --timing-only")


def test_the_network_has_no_batches(hdb: Terminal) -> None:
    told = hdb.refused("profile", "digits", "--network", "--bound", "64")
    assert told.startswith("hdb: --bound is of batch times, not of the network")


def test_the_network_cannot_be_measured_without_a_launcher(hdb: Terminal) -> None:
    answer = hdb("profile", "digits", "--network")
    assert_one_line(answer)
    assert "mpirun -n RANKS hdb profile CONFIG --network" in answer.err
