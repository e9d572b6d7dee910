"""The server's own steps and averages: their arithmetic, and whole runs with them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import events, succeed
from endings import sets
from programs.lives import Run, settings_for
from programs.runs import KINDS, PROGRAMS, assert_same_bits, final_model
from rich.console import Console
from torch import Tensor, nn

from hpc_hdb.config import Schedule, Server
from hpc_hdb.config_files import load_settings, read_settings
from hpc_hdb.report.progress import Progress
from hpc_hdb.run.build import make_trainer
from hpc_hdb.run.evaluation import evaluate_run
from hpc_hdb.run.serve import STOP_SIGNALS
from hpc_hdb.run.virtually import train_virtually
from hpc_hdb.train.data import open_data
from hpc_hdb.train.server_optimizer import (
    ema_weight,
    pace_of,
    step_nesterov,
    step_slowmo,
    swa_weight,
)

SIZE = 100


def random_models(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SIZE, generator=generator) for _ in range(count)]


def steps_of(step: Callable, *settings: float) -> list[Tensor]:
    """The models that a server's steps make of random merges."""
    start, *merges = random_models(5)
    model, momentum, models = start, torch.zeros(SIZE), []
    for merged in merges:
        out, new_momentum = merged.clone(), torch.full((SIZE,), torch.nan)
        step(model, out, momentum, new_momentum, *settings)
        model, momentum = out, new_momentum
        models.append(out)
    return models


def steps_of_torch(**settings: object) -> list[Tensor]:
    """The same by torch's SGD, which is given the differences as gradients."""
    start, *merges = random_models(5)
    weights = nn.Parameter(start)
    optimizer = torch.optim.SGD([weights], **settings)
    models = []
    for merged in merges:
        weights.grad = weights.detach() - merged
        optimizer.step()
        models.append(weights.detach().clone())
    return models


def test_nesterov_is_torchs() -> None:
    expected = steps_of_torch(lr=0.7, momentum=0.9, nesterov=True)
    torch.testing.assert_close(steps_of(step_nesterov, 0.7, 0.9), expected)


def test_slowmo_at_a_constant_rate_is_torchs_momentum() -> None:
    expected = steps_of_torch(lr=0.8, momentum=0.6)
    torch.testing.assert_close(steps_of(step_slowmo, 0.8, 0.6, 0.05), expected)


def test_slowmo_keeps_its_momentum_in_units_of_the_rate() -> None:
    """Two steps of Wang et al.'s algorithm 1, by hand, the rate being halved in between."""
    model, merged, new = torch.tensor([1.0]), torch.tensor([0.9]), torch.empty(1)
    step_slowmo(model, merged, torch.zeros(1), new, 1.0, 0.5, 0.2)
    assert (merged.item(), new.item()) == pytest.approx((0.9, 0.5))
    model, merged, momentum = merged, torch.tensor([0.8]), new.clone()
    step_slowmo(model, merged, momentum, new, 1.0, 0.5, 0.1)
    # u = 0.5*0.5 + 0.1/0.1 = 1.25, w = 0.9 - 0.1*1.25
    assert (merged.item(), new.item()) == pytest.approx((0.775, 1.25))


def averaged(weights: list[float]) -> list[float]:
    """How much of each version is in the average in the end."""
    shares: list[float] = []
    for weight in weights:
        shares = [share * (1 - weight) for share in shares] + [weight]
    return shares


def test_the_exponential_average_forgets_half_in_a_half_life() -> None:
    shares = averaged([ema_weight(version, 5) for version in range(1, 60)])
    assert sum(shares) == pytest.approx(1)
    assert shares[-6] == pytest.approx(shares[-1] / 2)
    assert shares[0] < 1e-3, "not even the first version is remembered for long"
    early = averaged([ema_weight(version, 5) for version in range(1, 4)])
    assert early == pytest.approx([1 / 3] * 3)


def test_the_stochastic_average_is_the_mean_of_the_last_versions() -> None:
    shares = averaged([swa_weight(version, 4) for version in range(1, 10)])
    assert shares == pytest.approx([0] * 4 + [1 / 5] * 5)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averages_are_paced_in_epochs(average: str) -> None:
    """Whatever the number of versions in an epoch, the same epochs count."""
    server = Server(average=average, average_half_life=2, average_from=6, commits_per_epoch=4)
    shares = {}
    for per_epoch in (4, 16):
        weights = [
            pace_of(0, number / per_epoch, per_epoch, server, Schedule()).weight
            for number in range(1, 10 * per_epoch + 1)
        ]
        own = np.array(averaged(weights)).reshape(10, per_epoch)
        shares[per_epoch] = own.sum(1)
    assert shares[4] == pytest.approx(shares[16], abs=0.01)
    if average == "swa":
        assert shares[4] == pytest.approx([0] * 6 + [0.25] * 4)
    else:
        assert shares[4][-3] == pytest.approx(shares[4][-1] / 2)


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_a_reduction_that_some_workers_miss_makes_a_version_too(workers: int) -> None:
    """The first is of one worker alone; the average is the mean of the versions."""
    server = Server(average="ema", average_half_life=10, commits_per_epoch=4)
    for version, reductions in enumerate([1 / workers, 1 + 1 / workers, 2 + 1 / workers], start=1):
        weight = pace_of(0, reductions / 4, 4, server, Schedule()).weight
        assert weight == pytest.approx(1 / version)


def test_the_pace_has_the_rate_of_the_round() -> None:
    schedule = Schedule(epochs=10, learning_rate=0.2, decay="linear", warmup=2)
    server = Server(commits_per_epoch=2)
    assert pace_of(0, 0.5, 2, server, schedule).learning_rate == pytest.approx(0.025)
    assert pace_of(0, 0.125, 8, server, schedule).learning_rate > 0
    assert pace_of(0, 6, 2, server, schedule).learning_rate == pytest.approx(0.2 * 4.25 / 8)
    assert pace_of(0, 10, 2, server, schedule).learning_rate > 0


# ---- whole runs -------------------------------------------------------------------------------

OUTER = {
    "server.optimizer": "nesterov",
    "server.outer_rate": 0.7,
    "server.outer_momentum": 0.4,
    "server.average": "ema",
}
EVERYTHING = OUTER | {"server.recalibrate": 100}


@pytest.fixture(scope="module")
def train(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Runs a kind, on the virtual clock or over MPI, when it is first asked for; its folder."""
    folders: dict[str, Path] = {}
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    threads = torch.get_num_threads()

    def get(name: str, ranks: int = 0, **more: object) -> Path:
        key = repr((name, ranks, sorted(more.items())))
        if key not in folders:
            folder = folders[key] = tmp_path_factory.mktemp("runs") / "run"
            words = KINDS[name].settings(digits, folder, **more)
            if ranks:
                succeed("hdb", "train", *words, ranks=ranks, cwd=PROGRAMS)
            else:
                assert simulate(words) == 0
        return folders[key]

    yield get
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


def simulate(words: list[str], resume: Path | None = None) -> int:
    """What ``hdb simulate`` does, without the seconds that a new process costs."""
    settings = load_settings(words[0], ["run.threads=1", *words[2::2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROGRAMS)
        return train_virtually(settings, "test", resume, False, Progress(Console(quiet=True)))


@pytest.mark.parametrize(
    ("name", "optimizer"), [("bsp-2", "nesterov"), ("asp-3", "slowmo"), ("ssp-4", "nesterov")]
)
def test_more_servers_give_the_same_bits(
    train: Callable[..., Path], name: str, optimizer: str
) -> None:
    settings = EVERYTHING | {"server.optimizer": optimizer}
    one = final_model(train(name, **settings))
    assert_same_bits(final_model(train(name, **settings | {"server.servers": 3})), one)


def test_mpi_gives_the_bits_of_the_virtual_clock(train: Callable[..., Path]) -> None:
    over_mpi = final_model(train("bsp-2 on 3", ranks=5, **EVERYTHING))
    assert_same_bits(over_mpi, final_model(train("bsp-2", **EVERYTHING)))


def test_ssp_is_asp_where_its_bound_never_holds(train: Callable[..., Path]) -> None:
    rates = {"decay": "cosine", "warmup": 1, "scale_with_workers": "sqrt"}
    settings = EVERYTHING | {f"schedule.{key}": value for key, value in rates.items()}
    ssp = settings | {"server.sync": "ssp", "server.staleness": 99}
    asp = final_model(train("asp-3", **settings))
    assert_same_bits(final_model(train("asp-3", **ssp)), asp)
    bound = final_model(train("asp-3", **ssp | {"server.staleness": 0}))
    assert not torch.equal(bound["fc.1.weight"], asp["fc.1.weight"])


@pytest.mark.parametrize("sync", ["asp", "ssp", "allreduce"])
def test_a_single_worker_has_a_server_optimizer_too(train: Callable[..., Path], sync: str) -> None:
    """Which then goes from where it was to where the worker has come, and beyond or not so far."""
    with_it, without = (
        final_model(train("asp-1", **outer, **{"server.sync": sync})) for outer in (OUTER, {})
    )
    assert all(value.isfinite().all() for value in with_it.values())
    assert not torch.equal(with_it["fc.1.weight"], without["fc.1.weight"])


def short(train: Callable[..., Path], epochs: int, **more: object) -> Path:
    """A BSP run of so many epochs, one commit each."""
    settings = {"schedule.epochs": epochs, "schedule.milestones": [], "schedule.cyclic": "false"}
    return train("bsp-3", **settings | more)


def is_parameter(name: str) -> bool:
    return "running" not in name


def test_nesterov_goes_on_beyond_the_average(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one commit parameters are at w0 - eta*(1 + mu)*(w0 - w_merged), statistics averaged."""
    folder = short(train, 1)
    merged = final_model(folder)
    outer = {
        "server.optimizer": "nesterov",
        "server.outer_rate": 0.8,
        "server.outer_momentum": 0.25,
    }
    stepped = final_model(short(train, 1, **outer))
    monkeypatch.chdir(PROGRAMS)
    settings = read_settings(folder / "config.toml")
    data = open_data(settings.data, "train")
    start = make_trainer(settings, data, torch.device("cpu")).model.state_dict()
    for name, value in stepped.items():
        expected = merged[name]
        if is_parameter(name):
            expected = start[name] - 0.8 * 1.25 * (start[name] - merged[name])
        torch.testing.assert_close(value, expected, msg=name)


def test_the_result_is_the_average_of_the_versions(train: Callable[..., Path]) -> None:
    """Workers go on from the model itself, so its versions are those of a run without average."""
    first, second = (final_model(short(train, epochs)) for epochs in (1, 2))
    mean = final_model(short(train, 2, **{"server.average": "swa"}))
    for name, value in mean.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, msg=name)


@pytest.mark.parametrize("name", ["asp-3", "ssp-4"])
def test_what_is_evaluated_is_what_is_saved(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = train(name, **EVERYTHING)
    last = [event for event in events(folder) if event["event"] == "evaluation"][-1]
    monkeypatch.chdir(PROGRAMS)
    (folder / "model.pt").rename(folder / "model")
    _, of_checkpoint = evaluate_run(folder, False, print)  # as of a run that goes on
    (folder / "model").rename(folder / "model.pt")
    _, of_model = evaluate_run(folder, False, print)
    for again in (of_checkpoint, of_model):
        assert (again.accuracy, again.loss) == (last["accuracy"], pytest.approx(last["loss"]))


def test_recalibration_changes_the_statistics_alone(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all training images, they are those of what the normalisation is given."""
    folder = train("bsp-2", **{"server.recalibrate": 10**6, "run.evaluation_batch": 1437})
    with_it, without = final_model(folder), final_model(train("bsp-2"))
    parameters = [name for name in with_it if is_parameter(name)]
    assert_same_bits(
        {name: with_it[name] for name in parameters}, {name: without[name] for name in parameters}
    )
    monkeypatch.chdir(PROGRAMS)
    settings = read_settings(folder / "config.toml")
    plain = settings.train.model_copy(update={"flip": False, "rotation": 0.0, "zoom": 0.0})
    settings = settings.model_copy(update={"train": plain})
    trainer = make_trainer(settings, open_data(settings.data, "train"), torch.device("cpu"))
    images, _ = next(trainer.sample_batches(24, [1437], seed=0))
    with torch.no_grad():
        maps = nn.functional.conv2d(images, with_it["conv.weight"], stride=2, padding=1)
    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3))
    torch.testing.assert_close(with_it["norm.running_mean"], mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(with_it["norm.running_var"], variance, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(without["norm.running_var"], variance, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("beside_models")
def test_an_average_begins_without_the_worker_that_diverged(tmp_path: Path) -> None:
    """The first reduction is of one worker of two."""
    run = Run(settings_for("bsp", average="ema"), tmp_path)
    run.live(slowness=(1, 1), diverging={2: [1]})
    first, second, *_ = run.commits
    assert [refused["worker"] for refused in run.named("refused")] == [2]
    assert (first["worker"], second["pulled_at"]) == (1, 1)
    assert len(run.commits) == 16
    assert run.model.isfinite().all()


RESUMED = sets(
    "data.source=synthetic",
    "data.synthetic_samples=240",
    "data.synthetic_side=16",
    "model.name=models:tiny",
    "plan.workers=2",
    "plan.timing={12=[4e-4,2e-3],16=[7e-4,2e-3]}",
    "schedule.resolutions=[12,16]",
    "schedule.dropout=[0.0,0.2]",
    "schedule.large_batch=[8,8]",
    "schedule.epochs=6",
    "schedule.milestones=[4]",
    "schedule.decay=cosine",
    "server.sync=bsp",
    "server.commits_per_epoch=2",
    "train.weight_decay=0.05",
    "train.decay_norms=false",  # whose optimizer has two groups of parameters
    *(f"{key}={value}" for key, value in OUTER.items()),
)


@pytest.mark.parametrize("servers", [1, 3])
def test_an_interrupt_loses_no_momentum_and_no_average(
    train: Callable[..., Path], tmp_path: Path, servers: int
) -> None:
    folder = tmp_path / "run"
    words = ["digits", *RESUMED, *sets(f"server.servers={servers}", f"run.output={folder}")]
    log = folder / "events.jsonl"

    def interrupt() -> None:
        while not log.exists() or log.read_text().count('{"event": "commit"') < 8:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert simulate(words) == 128 + signal.SIGTERM
    assert simulate(words, resume=folder) == 0
    assert simulate(["digits", *RESUMED, *sets(f"run.output={tmp_path / 'whole'}")]) == 0
    assert_same_bits(final_model(folder), final_model(tmp_path / "whole"))
