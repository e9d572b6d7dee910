"""Slow workers: who runs ahead in ASP, and how far in SSP; shares that follow the speeds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import events, succeed
from programs.runs import PROGRAMS, leads
from torch import Tensor, nn

from hpc_hdb.cluster.virtual import VirtualCluster
from hpc_hdb.config import Settings, parse_settings
from hpc_hdb.run.build import make_evaluator, make_trainer
from hpc_hdb.run.planning import known_timing, make_plan
from hpc_hdb.train.checkpoint import Checkpoint, load_checkpoint, note_lost_states
from hpc_hdb.train.data import open_data
from hpc_hdb.train.server import Interrupted, ParameterServer
from hpc_hdb.train.worker import run_worker

SLOWNESS = (1, 1, 6)


def settings_for(
    sync: str, staleness: int = 1, adaptive: bool = False, batch: int = 10, every: int = 1
) -> Settings:
    values = {
        "data": {"source": "synthetic", "synthetic_samples": 60, "synthetic_side": 8},
        "model": {"name": "models:tiny"},
        "plan": {"small_workers": 0, "timing": {"8": [1e-3, 1e-3]}},
        "schedule": {"epochs": 4, "resolutions": [8], "large_batch": [batch]},
        "server": {
            "sync": sync,
            "staleness": staleness,
            "commits_per_epoch": 2,
            "adaptive": adaptive,
        },
        "run": {"checkpoint_every": every},
    }
    return parse_settings(values, "test")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The models are looked for in the current folder; more threads only slow these down."""
    monkeypatch.chdir(PROGRAMS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(Exception):
    """As a SIGKILL: nothing is written after it."""


class Run:
    """One or more lives of a run of three workers; rank 3 is slow."""

    def __init__(self, settings: Settings, folder: Path | None = None) -> None:
        self.settings = settings
        self.folder = folder
        self.commits: list[dict] = []
        self.seconds = 0.0
        self.model = torch.empty(0)

    def live(
        self,
        signal_number: Callable[[], int] = lambda: 0,
        killed_at: int = 0,
        diverges_in: int = 0,
    ) -> None:
        """Train to the end, or until a signal or that commit; then go on.

        Parameters
        ----------
        diverges_in : int
            Step of worker 2 that ends in NaN.
        """
        steps = itertools.count(1)

        def spoil(model: nn.Module, inputs: object, scores: Tensor) -> Tensor:
            return scores * torch.nan if next(steps) == diverges_in else scores

        def emit(name: str, values: dict) -> None:
            if name == "commit":
                self.commits.append(values)
                if values["commit"] == killed_at:
                    raise Killed

        data = open_data(self.settings.data, "train")
        cpu = torch.device("cpu")
        evaluator = make_evaluator(self.settings, cpu, data.classes)
        timing = known_timing(self.settings)
        assert timing is not None
        plan = make_plan(self.settings, len(SLOWNESS), len(data.labels), timing)
        cluster = VirtualCluster(len(SLOWNESS), SLOWNESS, signal_number=signal_number)
        server = ParameterServer(
            cluster.server,
            plan,
            self.settings,
            evaluator.parameters.flat.clone(),
            evaluator,
            emit,
            self.folder,
            signal_number,
            inline=True,
        )
        if self.commits:
            assert self.folder is not None
            checkpoint = load_checkpoint(self.folder, evaluator.parameters.signature)
            assert checkpoint.rounds["commits"] == len(self.commits), "a signal loses nothing"
            server.resume(checkpoint, 0)
        kept = self.settings.run.states_kept
        trainers = [make_trainer(self.settings, data, cpu) for _ in cluster.workers]
        trainers[1].model.register_forward_hook(spoil)
        workers = [
            run_worker(
                link,
                trainer,
                self.settings.server.synchronous,
                self.folder,
                kept,
            )
            for link, trainer in zip(cluster.workers, trainers, strict=True)
        ]
        self.model = cluster.run(server.run(), workers)
        self.seconds = cluster.time


def test_asp_lets_the_fast_run_ahead() -> None:
    run = Run(settings_for("asp"))
    run.live()
    rounds = Counter(commit["worker"] for commit in run.commits)
    assert rounds.total() == 24
    assert min(rounds[1], rounds[2]) >= 4 * rounds[3] > 0
    assert max(leads(run.commits)) > 4


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_ssp_holds_the_fast_at_its_bound(staleness: int) -> None:
    run, free = Run(settings_for("ssp", staleness)), Run(settings_for("asp"))
    run.live()
    free.live()
    assert len(run.commits) == 24
    assert max(leads(run.commits)) == staleness
    assert run.seconds > free.seconds
    waited = Counter()
    for commit in run.commits:
        waited[commit["worker"]] += commit["wait_seconds"]
    assert min(waited[1], waited[2]) > waited[3] == 0


@pytest.mark.parametrize("until", range(1, 24, 3))
def test_ssp_keeps_its_bound_through_a_resume(until: int, tmp_path: Path) -> None:
    run = Run(settings_for("ssp"), tmp_path)
    with pytest.raises(Interrupted):
        run.live(lambda: 15 if len(run.commits) >= until else 0)
    run.live()
    assert [commit["commit"] for commit in run.commits] == list(range(1, 25))
    assert max(leads(run.commits)) == 1


@pytest.mark.parametrize(("sync", "every"), [("asp", 1), ("bsp", 1), ("bsp", 7)])
@pytest.mark.parametrize("questions", range(20, 100, 16))
def test_a_signal_in_the_middle_of_a_round_is_heard_after_a_step(
    sync: str, every: int, questions: int, tmp_path: Path
) -> None:
    """Workers ask for it in each step, of which every round has more than one.

    Where no checkpoint was due, they have kept their states in memory.
    """
    run, asked = Run(settings_for(sync, batch=4, every=every), tmp_path), itertools.count()
    with pytest.raises(Interrupted):
        run.live(lambda: 15 if next(asked) >= questions else 0)
    assert next(asked) < questions + 10
    run.live()
    assert [commit["commit"] for commit in run.commits] == list(range(1, 25))
    if sync == "bsp":
        whole = Run(settings_for(sync, batch=4))
        whole.live()
        assert torch.equal(run.model, whole.model)


def forget_unsaved(run: Run, folder: Path) -> Checkpoint:
    """Leave the commits that the newest checkpoint holds, which is returned."""
    newest = torch.load(max(folder.glob("[0-9]*.pt")), weights_only=True)
    checkpoint = load_checkpoint(folder, newest["signature"])
    del run.commits[checkpoint.rounds["commits"] :]
    return checkpoint


@pytest.mark.parametrize("every", [1, 4, 7])
@pytest.mark.parametrize("commit", [13, 16, 24])
@pytest.mark.parametrize("diverges_in", [0, 4])
def test_each_checkpoint_has_its_states_whenever_a_kill_comes(
    every: int, commit: int, diverges_in: int, tmp_path: Path
) -> None:
    """A round that is refused brings no commit, while those of the others are saved."""
    run = Run(settings_for("bsp", every=every), tmp_path)
    with pytest.raises(Killed):
        run.live(killed_at=commit, diverges_in=diverges_in)
    checkpoint = forget_unsaved(run, tmp_path)
    assert 0 <= commit - checkpoint.rounds["commits"] <= every * len(SLOWNESS)
    lost: list[Path] = []
    note_lost_states(tmp_path, checkpoint.worker_commits, lambda file, *_: lost.append(file))
    assert not lost
    run.live()
    assert [commit["commit"] for commit in run.commits] == list(range(1, 25))
    if not diverges_in:
        whole = Run(settings_for("bsp"))
        whole.live()
        assert torch.equal(run.model, whole.model)


@pytest.mark.parametrize(
    ("sync", "every", "written"),
    [("bsp", 1, [5, 6, 7, 8]), ("bsp", 7, [4, 7, 8]), ("asp", 7, None)],
)
def test_states_are_written_only_where_a_checkpoint_may_need_them(
    sync: str, every: int, written: list[int] | None, tmp_path: Path
) -> None:
    """And as the worker leaves, that before the last; in ASP at each commit of any worker."""
    run = Run(settings_for(sync, every=every), tmp_path)
    run.live()
    commits = sum(commit["worker"] == 1 for commit in run.commits)
    files = sorted(tmp_path.glob("worker-1-*.pt"))
    assert [int(file.stem[-8:]) for file in files] == (written or [*range(1, commits + 1)])


@pytest.mark.parametrize(("sync", "even_epochs"), [("bsp", 1), ("ssp", 2)])
def test_adaptive_shares_make_a_slow_worker_cost_its_own_share_alone(
    sync: str, even_epochs: int
) -> None:
    """In the first epoch it is measured, and in SSP the next has begun by then."""
    adaptive = Run(settings_for(sync, adaptive=True))
    adaptive.live()
    first, *others = (epoch_seconds(adaptive, epoch) for epoch in range(4))
    assert others[: even_epochs - 1] == [pytest.approx(first)] * (even_epochs - 1)
    for seconds in others[even_epochs - 1 :]:  # of three workers, one of which does a sixth
        assert seconds < 1.5 * first / SLOWNESS[2] * 3 / (2 + 1 / SLOWNESS[2])
    assert adaptive.seconds < 1.1 * (first + sum(others))
    if sync == "bsp":
        even = Run(settings_for(sync))
        even.live()
        assert first == pytest.approx(even.seconds / 4)
    else:
        assert max(leads(adaptive.commits)) == 1
    visits = Counter(
        (commit["epoch"], position)
        for commit in adaptive.commits
        for position in range(commit["begin"], commit["end"])
    )
    assert visits == {(epoch, position): 1 for epoch in range(4) for position in range(60)}


@pytest.mark.parametrize("sync", ["bsp", "ssp"])
def test_adaptive_shares_follow_the_speeds_that_are_measured(sync: str, tmp_path: Path) -> None:
    """Real ranks, the last of which needs 0.15 s more for each step."""
    out = tmp_path / "out"
    settings = settings_for(sync, adaptive=True).model_dump(mode="json", exclude_defaults=True)
    settings["model"]["name"] = "models:watched"
    settings["data"]["synthetic_samples"] = 240
    settings["schedule"]["epochs"] = 8
    settings["run"] = {"output": str(out)}
    config = tmp_path / "slow.toml"
    config.write_text(parse_settings(settings, "test").to_toml())
    succeed("hdb", "train", config, ranks=4, cwd=PROGRAMS, SLOW="3", SLOW_SECONDS="0.15")
    shares = Counter[tuple[int, int]]()
    commits = [event for event in events(out) if event["event"] == "commit"]
    for commit in commits:
        shares[commit["epoch"], commit["worker"]] += commit["samples"]
    assert [shares[0, worker] for worker in (1, 2, 3)] == [80, 80, 80]
    for epoch in range(8):
        assert sum(shares[epoch, worker] for worker in (1, 2, 3)) == 240
    for epoch in range(3, 8):
        assert shares[epoch, 3] < 40
    measured = [event["slowness"] for event in events(out) if event["event"] == "adapted"]
    *others, slow = measured[0]
    assert slow > 3 * max(others)


def epoch_seconds(run: Run, epoch: int) -> float:
    """Of the slowest worker's rounds."""
    seconds = Counter[int]()
    for commit in run.commits:
        if commit["epoch"] == epoch:
            seconds[commit["worker"]] += commit["train_seconds"]
    return max(seconds.values())
