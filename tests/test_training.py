"""Whole runs over MPI and on the virtual clock, checked against their own event logs."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import events, succeed
from programs.runs import (
    EPOCHS,
    KINDS,
    PROGRAMS,
    SAMPLES,
    STAGES,
    TIME,
    Done,
    assert_same_bits,
    leads,
)

from hpc_hdb.cluster.messages import Order, OrderKind
from hpc_hdb.cluster.slices import share_of_sum
from hpc_hdb.config_files import read_settings
from hpc_hdb.run.build import make_trainer
from hpc_hdb.train.data import open_data


@pytest.fixture(scope="module")
def train(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """A run over MPI of a kind, trained when first asked for."""
    runs: dict[str, Done] = {}

    def get(name: str) -> Done:
        if name not in runs:
            kind = KINDS[name]
            parent = tmp_path_factory.mktemp(name.replace(" ", "-"))
            (parent / "watch").mkdir()
            succeed(
                *("hdb", "train", *kind.settings(digits, parent / "run")),
                ranks=kind.ranks,
                cwd=PROGRAMS,
                WATCH=str(parent / "watch"),
                SLOW=str(kind.slow_rank),
                SLOW_EVALUATION="0.3" if name == "asp-3" else "0",
            )
            steps = {
                int(file.name) - kind.servers + 1: [
                    json.loads(line) for line in file.read_text().splitlines()
                ]
                for file in (parent / "watch").iterdir()
            }
            runs[name] = Done(kind, parent / "run", events(parent / "run"), steps)
        return runs[name]

    return get


@pytest.fixture(params=KINDS)
def done(request: pytest.FixtureRequest, train: Callable[[str], Done]) -> Done:
    """Each of the runs over MPI."""
    return train(request.param)


@pytest.fixture(scope="module")
def simulate(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """Runs a kind on the virtual clock when first asked for, and `again` where that is said."""

    @functools.cache
    def get(name: str, again: bool = False, **more: object) -> Done:
        folder = tmp_path_factory.mktemp(name) / "run"
        succeed("hdb", "simulate", *KINDS[name].settings(digits, folder, **more), cwd=PROGRAMS)
        return Done(KINDS[name], folder, events(folder), {})

    return get


def test_run_folder_is_complete(done: Done) -> None:
    files = {path.name for path in done.folder.iterdir()}
    complete = {"config.toml", "plan.json", "events.jsonl", "summary.json", "checkpoint"}
    assert complete | {"model.pt"} <= files
    assert not list(done.folder.rglob("*.part"))
    names = [event["event"] for event in done.events]
    assert names[0] == "start" and names[-1] == "end"
    assert names.count("leave") == done.kind.workers


def test_every_epoch_visits_every_sample_once(done: Done) -> None:
    visits = {epoch: np.zeros(SAMPLES, dtype=int) for epoch in range(EPOCHS)}
    for commit in done.commits:
        visits[commit["epoch"]][commit["begin"] : commit["end"]] += 1
        assert commit["samples"] == commit["end"] - commit["begin"]
    assert all((count == 1).all() for count in visits.values())


def test_commits_are_counted(done: Done) -> None:
    kind = done.kind
    assert [commit["commit"] for commit in done.commits] == list(range(1, kind.total + 1))
    groups = {commit["worker"]: commit["group"] for commit in done.commits}
    large = kind.workers - kind.small_workers
    expected = ["large"] * large + ["small"] * kind.small_workers
    assert [groups[worker] for worker in range(1, kind.workers + 1)] == expected


def test_rounds_follow_the_stage_of_the_model_they_start_from(done: Done) -> None:
    batches = json.loads((done.folder / "plan.json").read_text())["stages"]
    for commit in done.commits:
        epoch = commit["pulled_at"] // (done.kind.workers * done.kind.commits_per_epoch)
        rate, resolution, dropout = STAGES[epoch]
        assert commit["stage"] == epoch
        assert commit["learning_rate"] == pytest.approx(rate)
        assert (commit["resolution"], commit["dropout"]) == (resolution, dropout)
        assert commit["batch"] == batches[epoch][f"{commit['trained_as']}_batch"]
        assert commit["steps"] == math.ceil(commit["samples"] / commit["batch"])


def test_the_model_is_given_what_the_log_says(done: Done) -> None:
    """Resolution, batch sizes and dropout as the model itself has seen them."""
    assert sorted(done.steps) == list(range(1, done.kind.workers + 1))
    for worker, steps in done.steps.items():
        rounds = [commit for commit in done.commits if commit["worker"] == worker]
        assert len(steps) == sum(commit["steps"] for commit in rounds)
        remaining = iter(steps)
        for commit in rounds:
            seen = [next(remaining) for _ in range(commit["steps"])]
            sizes = [step["shape"][0] for step in seen]
            assert sum(sizes) == commit["samples"]
            assert max(sizes) <= commit["batch"] and max(sizes) - min(sizes) <= 1
            side = commit["resolution"]
            assert {tuple(step["shape"][1:]) for step in seen} == {(3, side, side)}
            assert [step["dropout"] for step in seen] == [[commit["dropout"]]] * len(seen)


def test_a_round_starts_from_the_newest_model(done: Done) -> None:
    kind = done.kind
    last: dict[int, int] = defaultdict(int)
    for commit in done.commits:
        number, pulled_at, worker = commit["commit"], commit["pulled_at"], commit["worker"]
        if kind.sync == "bsp":
            assert pulled_at == (number - 1) // kind.workers * kind.workers
        elif kind.sync == "asp":
            assert pulled_at == last[worker]
        else:
            assert last[worker] <= pulled_at < number
        last[worker] = number


def test_plan_holds_the_dual_batch_of_the_paper(done: Done) -> None:
    plan = json.loads((done.folder / "plan.json").read_text())
    n, small, ratio = done.kind.workers, done.kind.small_workers, Fraction(11, 10)
    if not small:
        assert plan["large_share"] == SAMPLES
        return
    large_share = round(ratio * SAMPLES / n)
    small_share = round(Fraction(SAMPLES - (n - small) * large_share, small))
    assert (plan["large_share"], plan["small_share"]) == (large_share, small_share)
    assert plan["update_factor"] == pytest.approx(small_share / large_share)
    for stage in plan["stages"]:
        a, c = TIME[stage["resolution"]]
        seconds = 1.1 * (a + c / 64) * SAMPLES / n
        assert stage["small_batch"] == round(c / (seconds / small_share - a))


def test_the_final_model_is_evaluated(done: Done) -> None:
    commits = [evaluation["commit"] for evaluation in done.evaluations]
    assert commits[-1] == done.kind.total
    assert all(earlier < later for earlier, later in pairwise(commits))
    summary = json.loads((done.folder / "summary.json").read_text())
    assert summary["final_accuracy"] == done.evaluations[-1]["accuracy"] > 0.8


def test_commits_are_merged_while_a_model_is_evaluated(train: Callable[[str], Done]) -> None:
    """An evaluation here is two batches, each of which takes 0.3 s."""
    done = train("asp-3")
    first = done.evaluations[0]
    begin, end = first["time"] - first["seconds"], first["time"]
    assert first["seconds"] > 0.6
    meanwhile = [commit for commit in done.commits if begin < commit["time"] < end]
    assert {commit["worker"] for commit in meanwhile} == {1, 2, 3}
    assert meanwhile[-1]["commit"] > first["commit"] + 3


def test_the_demo_is_accurate_and_ends_with_a_table_and_a_report(
    digits: Path, tmp_path: Path
) -> None:
    """What `make demo` trains: the preset of the digits as it is."""
    run = tmp_path / "run"
    settings = [f"data.path={digits}", f"run.output={run}", "run.report=true"]
    words = [word for setting in settings for word in ("--set", setting)]
    out = succeed("hdb", "train", "digits", *words, ranks=4, timeout=300)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_accuracy"] >= 0.97
    assert f"accuracy {summary['final_accuracy']:.2%}" in out
    table = {
        cells[1].strip(): [cell.strip() for cell in cells[2:5]]
        for line in out.splitlines()
        if len(cells := line.split("│")) == 6
    }
    assert table["ranks"] == ["1", "2", "1"]
    for activity in ("waiting", "communicating", "evaluating"):
        assert all(float(cell) >= 0 for cell in table[activity])
        assert float(table[activity][0]) > 0
    assert table["training"][0] == "-" and all(float(c) > 0 for c in table["training"][1:])
    server = summary["roles"]["server"]
    assert server["wait"] + server["communicate"] + server["evaluate"] < 1.2 * summary["seconds"]
    assert out.rstrip().endswith(f"plots and tables: {run / 'report.html'}")
    page = (run / "report.html").read_text()
    assert "Where the time went" in page and "data:image/png" in page
    assert {path.stem for path in (run / "plots").iterdir()} >= {"accuracy", "roles", "stages"}


def test_momentum_is_kept_only_where_asked_and_in_the_end_once(done: Done) -> None:
    kept = list((done.folder / "checkpoint").glob("worker-*.pt"))
    assert len(kept) == (done.kind.workers if done.kind.keep_momentum else 0)


def test_evaluate_finds_the_last_evaluation_again(train: Callable[[str], Done]) -> None:
    done = train("asp-3")
    found = json.loads(succeed("hdb", "evaluate", done.folder, "--json", cwd=PROGRAMS))
    assert found["accuracy"] == done.evaluations[-1]["accuracy"]
    assert found["loss"] == pytest.approx(done.evaluations[-1]["loss"], rel=1e-5)


def test_a_fast_worker_takes_more_rounds_of_its_group(train: Callable[[str], Done]) -> None:
    rounds = Counter(commit["worker"] for commit in train("asp-3").commits)
    assert rounds[2] > rounds[1], "rank 1 is slowed down"


def test_no_worker_runs_further_ahead_than_ssp_allows(train: Callable[[str], Done]) -> None:
    assert set(leads(train("ssp-4").commits)) == {0, 1}
    assert set(leads(train("ssp-3 on 2").commits)) == {0, 1}


@pytest.mark.parametrize("name", ["bsp-1", "bsp-2", "bsp-3", "bsp-4"])
def test_bsp_equals_its_rounds_done_one_after_another(
    train: Callable[[str], Done], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROGRAMS)
    done = train(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = one_after_another(done)
    torch.set_num_threads(threads)
    assert_as_mpi_adds_up(expected, done.model, done.kind.workers)


def assert_as_mpi_adds_up(model: dict, of_mpi: dict, workers: int) -> None:
    """The same bits, of more than two workers where the order of sums is known."""
    if workers <= 2 or "Open MPI" in succeed("mpirun", "--version"):
        assert_same_bits(model, of_mpi)
    else:  # another library may add up in another order, and training amplifies the rounding
        for name, values in of_mpi.items():
            torch.testing.assert_close(model[name], values, rtol=0, atol=1e-2)


def one_after_another(done: Done) -> dict[str, torch.Tensor]:
    """The model of a BSP run's rounds in this process."""
    kind = done.kind
    settings = read_settings(done.folder / "config.toml")
    plan = json.loads((done.folder / "plan.json").read_text())
    data = open_data(settings.data, "train")
    large = kind.workers - kind.small_workers
    shares = [plan["large_share"]] * large + [plan["small_share"]] * kind.small_workers
    cuts = [SAMPLES * sum(shares[:worker]) // sum(shares) for worker in range(kind.workers + 1)]
    factors = [1.0] * large + [plan["small_share"] / plan["large_share"]] * kind.small_workers

    def make_workers() -> list:
        return [make_trainer(settings, data, torch.device("cpu")) for _ in range(kind.workers)]

    workers = make_workers()
    model = workers[0].parameters.flat.clone()
    for epoch, (rate, resolution, dropout) in enumerate(STAGES):
        for part in range(kind.commits_per_epoch):
            if not kind.keep_momentum:
                workers = make_workers()
            trained = []
            for number, (worker, factor) in enumerate(zip(workers, factors, strict=True)):
                small = number >= large
                first, share = cuts[number], cuts[number + 1] - cuts[number]
                order = Order(
                    OrderKind.TRAIN,
                    small=small,
                    epoch=epoch,
                    part=part,
                    slot=number - large if small else number,
                    begin=first + share * part // kind.commits_per_epoch,
                    end=first + share * (part + 1) // kind.commits_per_epoch,
                    resolution=resolution,
                    batch=plan["stages"][epoch]["small_batch" if small else "large_batch"],
                    learning_rate=rate,
                    dropout=dropout,
                )
                worker.parameters.flat.copy_(model)
                worker.train_round(order, lambda: False, lambda report: None)
                trained.append(worker.parameters.flat * (factor / sum(factors)))
            model = torch.cat([ring_sum(trained, share) for share in range(kind.workers)])
    workers[0].parameters.flat.copy_(model)
    state = workers[0].model.state_dict()
    return {name: state[name] for name in done.model}


def ring_sum(models: list[torch.Tensor], share: int) -> torch.Tensor:
    """One of n equal shares of the sum of n models, added up along a ring that it ends."""
    part = share_of_sum(len(models[0]), share, len(models))
    ring = models[share + 1 :] + models[: share + 1]
    return functools.reduce(torch.add, (model[part] for model in ring))


@pytest.mark.parametrize("name", ["bsp-2", "bsp-4"])
def test_bsp_on_the_virtual_clock_gives_the_same_bits(
    name: str, train: Callable[[str], Done], simulate: Callable[..., Done]
) -> None:
    virtual, done = simulate(name), train(name)
    assert_as_mpi_adds_up(virtual.model, done.model, done.kind.workers)
    assert [evaluation["epoch"] for evaluation in virtual.evaluations] == [1, 2, 3, 4]


def test_bsp_on_more_servers_gives_the_same_bits(
    train: Callable[[str], Done], simulate: Callable[..., Done]
) -> None:
    one = train("bsp-2").model
    assert_same_bits(train("bsp-2 on 3").model, one)
    assert_same_bits(simulate("bsp-2", **{"server.servers": 4}).model, one)


@pytest.mark.parametrize("name", ["asp-3", "ssp-4"])
def test_more_servers_give_the_same_on_the_virtual_clock(
    name: str, simulate: Callable[..., Done]
) -> None:
    one, more = simulate(name), simulate(name, **{"server.servers": 3})
    assert_same_bits(more.model, one.model)
    assert without_times(more.commits) == without_times(one.commits)


def test_the_report_counts_the_servers(train: Callable[[str], Done]) -> None:
    summary = json.loads((train("bsp-2 on 3").folder / "summary.json").read_text())
    assert (summary["servers"], summary["roles"]["server"]["workers"]) == (3, 3)


def test_another_seed_gives_another_model(
    train: Callable[[str], Done], simulate: Callable[..., Done]
) -> None:
    other = simulate("bsp-2", **{"run.seed": 1}).model
    assert all(not torch.equal(value, other[name]) for name, value in train("bsp-2").model.items())


def test_asp_on_the_virtual_clock_repeats_itself(simulate: Callable[..., Done]) -> None:
    one, two = simulate("asp-3"), simulate("asp-3", again=True)
    assert_same_bits(one.model, two.model)
    assert without_times(one.commits) == without_times(two.commits)


def without_times(commits: list[dict]) -> list[dict]:
    """Without what the real clock measured."""
    seconds = {"train_seconds", "real_seconds", "data_seconds", "rebuild_seconds"}
    seconds.add("checkpoint_seconds")
    return [{key: commit[key] for key in commit.keys() - seconds} for commit in commits]
