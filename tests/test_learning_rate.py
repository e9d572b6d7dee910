"""The learning rate: its arithmetic beside torch's schedulers, and what each step is given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import events, succeed
from endings import sets
from programs.runs import PROGRAMS
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from hpc_hdb.cluster.messages import Order, OrderKind
from hpc_hdb.config import Schedule
from hpc_hdb.config_files import load_settings, parse_settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import RateSchedule
from hpc_hdb.run.build import make_trainer
from hpc_hdb.train.data import open_data

EPOCHS = 30


def torchs(make: Callable[[SGD], LRScheduler]) -> list[float]:
    """The rates of torch's scheduler, from 0.2, at the start of every epoch and at the end."""
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=0.2)
    scheduler = make(optimizer)
    rates = []
    for _ in range(EPOCHS + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "peer"),
    [
        (
            RateSchedule(0.2, EPOCHS, "step", (10, 25), 0.3),
            lambda optimizer: MultiStepLR(optimizer, [10, 25], 0.3),
        ),
        (
            RateSchedule(0.2, EPOCHS, "cosine"),
            lambda optimizer: CosineAnnealingLR(optimizer, EPOCHS),
        ),
        (
            RateSchedule(0.2, EPOCHS, "linear"),
            lambda optimizer: LinearLR(optimizer, 1.0, 0.0, EPOCHS),
        ),
        (
            RateSchedule(0.2, EPOCHS, "cosine", warmup=5),
            lambda optimizer: SequentialLR(
                optimizer,
                [LinearLR(optimizer, 1e-9, 1.0, 5), CosineAnnealingLR(optimizer, EPOCHS - 5)],
                [5],
            ),
        ),
    ],
    ids=["step", "cosine", "linear", "warm-up and cosine"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_the_rate_is_that_of_torchs_scheduler(
    schedule: RateSchedule, peer: Callable[[SGD], LRScheduler]
) -> None:
    own = [schedule.of_round(epoch, epoch)[0] for epoch in range(EPOCHS + 1)]
    assert own == pytest.approx(torchs(peer), abs=1e-8)


def test_a_round_keeps_the_factor_of_its_start() -> None:
    steps = RateSchedule(0.2, 20, "step", (10,), 0.1)
    assert steps.of_round(9.5, 10.5) == (0.2, 0.2)
    assert steps.of_round(10, 10.5) == (0.02, 0.02)
    assert RateSchedule(0.2, 20, "linear").of_round(19.5, 21) == pytest.approx((0.005, 0))


@pytest.mark.parametrize(
    ("settings", "workers", "batch", "scale"),
    [
        ({}, 4, 64, 1),
        ({"scale_with_workers": "linear"}, 4, 64, 4),
        ({"scale_with_workers": "sqrt"}, 4, 64, 2),
        ({"scale_with_batch": "linear", "reference_batch": 256}, 4, 64, 0.25),
        ({"scale_with_batch": "sqrt", "reference_batch": 256}, 4, 64, 0.5),
        (
            {"scale_with_workers": "sqrt", "scale_with_batch": "linear", "reference_batch": 32},
            9,
            64,
            6,
        ),
        ({"reference_batch": 32}, 4, 64, 1),
    ],
)
def test_the_rate_grows_with_workers_and_batch(
    settings: dict, workers: int, batch: int, scale: float
) -> None:
    assert Schedule(**settings).rate_scale(workers, batch) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["schedule.warmup=24"], "schedule.warmup = 24 does not end before training"),
        (["schedule.warmup=-1"], "schedule.warmup: input should be greater than or equal to 0"),
        (["schedule.decay=cosin"], "schedule.decay: there is no 'cosin'; did you mean 'cosine'?"),
        (
            ["schedule.scale_with_batch=sqrt"],
            'schedule.scale_with_batch = "sqrt" needs schedule.reference_batch',
        ),
        (["schedule.scale_with_workers=on"], "schedule.scale_with_workers: there is no 'on'"),
        (["train.label_smoothing=1"], "train.label_smoothing: input should be less than 1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings("digits", overrides)
    assert told in str(caught.value)


# ---- whole runs -------------------------------------------------------------------------------

DECAY = 0.5
RUN = sets(
    "data.source=synthetic",
    "data.synthetic_classes=1",  # nothing to learn: only weight decay moves the weights
    "data.synthetic_samples=60",
    "data.synthetic_side=8",
    "model.name=models:recorded",
    "plan.timing={8=[1e-3,1e-3]}",
    "schedule.learning_rate=0.1",
    "schedule.resolutions=[8]",
    "schedule.dropout=[0]",
    "schedule.large_batch=[10]",
    "server.sync=bsp",
    "server.commits_per_epoch=2",
    "train.momentum=0",
    f"train.weight_decay={DECAY}",
)


def simulate(output: Path, *overrides: str, **env: str) -> list[dict]:
    """A run on the virtual clock; its commits."""
    words = [*RUN, *sets(*overrides, f"run.output={output}")]
    succeed("hdb", "simulate", "digits", *words, cwd=PROGRAMS, **env)
    return [event for event in events(output) if event["event"] == "commit"]


def rates_of_steps(file: Path) -> list[float]:
    """The rate of each step but the last, from what it did to the weights."""
    size = 12 * 27 + 12 + 12 + 12 * 16 + 1
    weights = np.fromfile(file, dtype=np.float32).reshape(-1, size)
    norms = np.linalg.norm(weights.astype(np.float64), axis=1)
    return ((1 - norms[1:] / norms[:-1]) / DECAY).tolist()


def test_each_step_has_the_rate_of_its_moment(tmp_path: Path) -> None:
    """One worker: warm-up over two of six epochs, then cosine decay; six steps an epoch."""
    commits = simulate(
        tmp_path / "run",
        *("plan.workers=1", "plan.small_workers=0", "schedule.epochs=6"),
        *("schedule.milestones=[3]", "schedule.decay=cosine", "schedule.warmup=2"),
        WATCH=str(tmp_path),
        RANK="1",
    )
    assert [commit["steps"] for commit in commits] == [3] * 12

    def rate(epoch: float) -> float:
        if epoch <= 2:
            return 0.1 * epoch / 2
        return 0.1 * (1 + math.cos(math.pi * (epoch - 2) / 4)) / 2

    assert [commit["learning_rate"] for commit in commits] == pytest.approx(
        [rate(number / 2) for number in range(12)], abs=1e-12
    )
    expected = []
    for number in range(12):
        start, end = rate(number / 2), rate((number + 1) / 2)
        expected += [start + (end - start) * share for share in (1 / 6, 3 / 6, 5 / 6)]
    assert rates_of_steps(tmp_path / "1") == pytest.approx(expected[:-1], abs=2e-6)


@pytest.mark.parametrize("sync", ["asp", "ssp", "bsp"])
def test_small_batches_and_more_workers_change_the_rate(tmp_path: Path, sync: str) -> None:
    commits = simulate(
        tmp_path / "run",
        *("plan.workers=3", "plan.small_workers=1", "schedule.epochs=2", f"server.sync={sync}"),
        *("schedule.milestones=[]", "schedule.scale_with_workers=linear"),
        *("schedule.scale_with_batch=sqrt", "schedule.reference_batch=10"),
    )
    seen = {commit["group"]: commit["learning_rate"] for commit in commits}
    batches = {commit["group"]: commit["batch"] for commit in commits}
    assert batches["large"] == 10 > batches["small"]
    assert seen["large"] == pytest.approx(0.3)
    assert seen["small"] == pytest.approx(0.3 * math.sqrt(batches["small"] / 10))


def test_all_reduce_scales_with_its_global_batch(tmp_path: Path) -> None:
    commits = simulate(
        tmp_path / "run",
        *("plan.workers=3", "schedule.epochs=2", "server.sync=allreduce"),
        *("schedule.milestones=[]", "schedule.scale_with_workers=linear"),
        *("schedule.scale_with_batch=linear", "schedule.reference_batch=10"),
    )
    assert {commit["batch"] for commit in commits} == {30}
    assert [commit["learning_rate"] for commit in commits] == pytest.approx([0.3] * len(commits))


def test_the_schedule_says_what_becomes_of_the_rates() -> None:
    overrides = sets(
        *("schedule.decay=cosine", "schedule.warmup=2.5", "schedule.scale_with_workers=sqrt"),
        *("schedule.scale_with_batch=linear", "schedule.reference_batch=64", "plan.workers=4"),
    )
    shown = succeed("hdb", "schedule", "digits", *overrides)
    assert (
        "learning rate: as a stage begins; times 2 with 4 workers, in proportion to the batch, "
        "from 64 images on, warmed up over 2.5 epochs, cosine decay to zero"
    ) in shown
    stages = json.loads(succeed("hdb", "schedule", "digits", *overrides, "--json"))
    done = [(stage["start_epoch"] - 2.5) / 21.5 for stage in stages[1:]]
    expected = [0.1, *(0.05 * (1 + math.cos(math.pi * share)) for share in done)]
    assert [stage["learning_rate"] for stage in stages] == pytest.approx(expected)
    assert "learning rate:" not in succeed("hdb", "schedule", "digits")


def test_a_run_begins_with_what_becomes_of_its_rates_and_of_idle_settings(tmp_path: Path) -> None:
    words = sets(
        *("plan.workers=2", "plan.small_workers=0", "schedule.epochs=1", "schedule.milestones=[]"),
        *("schedule.warmup=0.5", "schedule.scale_with_workers=linear", "server.outer_rate=0.5"),
        *("server.commits_per_epoch=1", f"run.output={tmp_path / 'run'}"),
    )
    told = succeed("hdb", "simulate", "digits", *RUN, *words, cwd=PROGRAMS)
    below_table = told.partition("epoch time as predicted")[2]
    assert (
        "\nlearning rate: as a stage begins; times 2 with 2 workers, warmed up over 0.5 epochs\n"
        'server.outer_rate = 0.5 does nothing: it is for server.optimizer = "nesterov" or "slowmo"'
        "\n"
    ) in below_table


@pytest.mark.parametrize(("workers", "told"), [(8, False), (9, True)])
def test_a_rate_scaled_further_than_was_measured_is_told(workers: int, told: bool) -> None:
    words = sets(
        *("plan.timing={16=[4e-4,2e-3],24=[7e-4,2e-3]}", "plan.small_workers=0"),
        "schedule.scale_with_workers=linear",
    )
    shown = succeed("hdb", "plan", "digits", *words, "--samples", "3000", "--workers", str(workers))
    assert (f"measured with up to 8 workers, not {workers}: if" in shown) is told


@pytest.mark.parametrize("decay_norms", [True, False])
def test_norms_and_biases_decay_only_if_they_are_to(
    monkeypatch: pytest.MonkeyPatch, decay_norms: bool
) -> None:
    """There is one class, so that nothing else moves the weights."""
    monkeypatch.chdir(PROGRAMS)
    words = ["train.device=cpu", f"train.decay_norms={str(decay_norms).lower()}"]
    settings = load_settings("digits", [*RUN[1::2], *words])
    trainer = make_trainer(settings, open_data(settings.data, "train"), torch.device("cpu"))
    nn.init.ones_(trainer.model.norm.bias)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    order = Order(OrderKind.TRAIN, end=20, resolution=8, batch=10, learning_rate=0.1)
    trainer.train_round(order, lambda: False, lambda _: None)
    for name, value in trainer.model.named_parameters():
        decays = decay_norms or name in ("conv.weight", "fc.1.weight")
        left = (1 - 0.1 * DECAY) ** 2 if decays else 1
        torch.testing.assert_close(value, left * before[name], msg=name)


def test_label_smoothing_spreads_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROGRAMS)
    values = {
        "data": {"source": "synthetic", "synthetic_samples": 20, "synthetic_side": 8},
        "model": {"name": "models:tiny"},
        "train": {"label_smoothing": 0.2, "device": "cpu"},
    }
    settings = parse_settings(values, "test")
    trainer = make_trainer(settings, open_data(settings.data, "train"), torch.device("cpu"))
    images, labels = next(trainer.sample_batches(8, [20], seed=0))
    with torch.no_grad():
        chances = functional.log_softmax(trainer.model.train()(images), dim=1)
    targets = torch.full_like(chances, 0.2 / 10)
    targets[torch.arange(20), labels] += 0.8
    total, _ = trainer.step(images, labels, 20).totals.tolist()
    assert total == pytest.approx(-(targets * chances).sum().item(), rel=1e-5)
