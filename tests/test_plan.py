"""The method's arithmetic: the authors' plans, the schedule, and who trains which sample when."""

from __future__ import annotations

import contextlib
import csv
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import TIMING, succeed
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hpc_hdb.cli import app
from hpc_hdb.config_files import load_settings
from hpc_hdb.errors import InfeasiblePlan, UserError
from hpc_hdb.plan import (
    BatchTime,
    DualBatchPlan,
    Group,
    RoundBook,
    TrainingPlan,
    cut_stages,
    fit_batch_time,
    fit_timings,
    plan_dual_batch,
    plan_training,
    stage_index,
)
from hpc_hdb.plan.cuts import epoch_bounds, split_evenly
from hpc_hdb.train.profile import largest_batch, sweep_sizes

FIGURES = {
    "--seconds-per-image": "seconds_per_image",
    "--overhead": "seconds_per_batch_overhead",
    "--large-batch": "large_batch",
    "--samples": "samples",
    "--workers": "workers",
    "--small-workers": "small_workers",
    "--time-ratio": "k",
}
"""Options of ``hdb plan``, and the columns of plans.csv that they take."""

GTX1080_32 = BatchTime(5.0563588585e-4, 1.5562114075e-2)
"""The authors' time model of CIFAR-100 at 32x32 on a GTX 1080."""


def hdb(*words: str) -> str:
    """What the command prints, without starting a process for it."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def options(row: dict[str, str]) -> list[str]:
    return [word for option, column in FIGURES.items() for word in (option, row[column])]


def printed(plan: dict) -> dict[str, str]:
    """The figures of a plan as plans.csv prints them."""
    factor = plan["update_factor"]
    return {
        "large_share": str(plan["large_share"]),
        "small_share": str(plan["small_share"]),
        "small_batch": str(plan["small_batch"]),
        "update_factor": "" if factor is None else f"{factor:.6f}",
        "epoch_seconds": f"{plan['epoch_seconds']:.6f}",
    }


def expected(row: dict[str, str]) -> dict[str, str]:
    return {column: row[column] for column in printed(dict.fromkeys(row, 0))}


# ---- the authors' plans -----------------------------------------------------------------------


def test_every_plan_of_the_authors_is_reproduced(reference: Path) -> None:
    plans = rows(reference / "plans.csv")
    assert len(plans) == 208
    for row in plans:
        plan = plan_dual_batch(
            BatchTime(float(row["seconds_per_image"]), float(row["seconds_per_batch_overhead"])),
            int(row["large_batch"]),
            int(row["samples"]),
            int(row["workers"]),
            int(row["small_workers"]),
            float(row["k"]),
        )
        assert printed(vars(plan)) == expected(row), row


def test_the_command_reproduces_every_plan_of_the_authors(reference: Path) -> None:
    for row in rows(reference / "plans.csv"):
        plan = json.loads(hdb("plan", *options(row), "--json"))
        assert printed(plan) == expected(row), row


@pytest.mark.parametrize("number", [3, 60, 180], ids=["cifar100", "rtx3090", "gtx1080"])
def test_the_installed_command_plans_as_the_authors_did(reference: Path, number: int) -> None:
    row = rows(reference / "plans.csv")[number]
    plan = json.loads(succeed("hdb", "plan", *options(row), "--json"))
    assert printed(plan) == expected(row)


def test_a_preset_with_the_authors_timing_gives_their_plan(reference: Path) -> None:
    timing, theirs = {}, {}
    for row in rows(reference / "plans.csv"):
        if (row["dataset"], row["workers"], row["small_workers"]) != ("cifar100", "4", "3"):
            continue
        timing[row["resolution"]] = (row["seconds_per_image"], row["seconds_per_batch_overhead"])
        if row["k"] == "1.1":
            theirs[int(row["resolution"])] = expected(row)
    inline = ", ".join(f"{side} = [{a}, {c}]" for side, (a, c) in timing.items())
    inline = f"plan.timing={{{inline}}}"
    plan = json.loads(hdb("plan", "cifar100", "--samples", "50000", "--set", inline, "--json"))
    assert len(theirs) == 2
    for stage in plan["stages"]:
        assert printed(plan | stage) == theirs[stage["resolution"]]


@pytest.mark.parametrize(
    ("dataset", "gpu", "precision", "timing"),
    [
        ("cifar100", "gtx1080", "fp32", "gtx1080"),
        ("imagenet", "rtx3090", "amp", "rtx3090-amp"),
        ("imagenet", "gtx1080", "amp", "gtx1080-amp"),
    ],
)
def test_the_authors_raw_timings_give_their_coefficients(
    reference: Path, dataset: str, gpu: str, precision: str, timing: str
) -> None:
    coefficients = {
        row["resolution"]: (row["seconds_per_image"], row["seconds_per_batch_overhead"])
        for row in rows(reference / "plans.csv")
        if (row["dataset"], row["timing"]) == (dataset, timing)
    }
    assert coefficients
    for resolution, (seconds_per_image, overhead) in coefficients.items():
        times: dict[int, list[float]] = {}
        for row in rows(reference / "batch_times.csv"):
            wanted = (dataset, gpu, precision, resolution)
            if wanted == tuple(row[k] for k in ("dataset", "gpu", "precision", "resolution")):
                times.setdefault(int(row["batch_size"]), []).append(float(row["seconds_per_batch"]))
        assert all(len(of_nodes) == 4 for of_nodes in times.values())
        line = fit_batch_time(list(times), [sum(each) / 4 for each in times.values()]).line
        assert line.seconds_per_image == pytest.approx(float(seconds_per_image), rel=1e-5)
        assert line.overhead == pytest.approx(float(overhead), rel=1e-5)


# ---- the time model ---------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
def test_points_on_a_line_give_that_line(relative: bool) -> None:
    line = BatchTime(2e-3, 3e-2)
    sizes = [1, 4, 16, 64]
    fit = fit_batch_time(sizes, [line.of_batch(size) for size in sizes], relative)
    assert fit.line.seconds_per_image == pytest.approx(2e-3)
    assert fit.line.overhead == pytest.approx(3e-2)
    assert fit.worst_error == pytest.approx(0, abs=1e-12)
    assert fit.points == 4


def test_a_fit_says_how_far_its_points_lie_from_it() -> None:
    fit = fit_batch_time([1, 2, 3], [1.0, 2.6, 3.0])  # the line 0.2 + b: 1.2, 2.2, 3.2
    assert fit.line.of_batch(2) == pytest.approx(2.2)
    assert fit.worst_error == pytest.approx(0.2)
    assert fit.mean_error == pytest.approx((0.2 / 1 + 0.4 / 2.6 + 0.2 / 3) / 3)


def test_relative_errors_weigh_every_size_alike() -> None:
    sizes, seconds = [1, 2, 4, 100], [0.011, 0.0118, 0.0143, 0.15]
    slope, intercept = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))
    line = fit_batch_time(sizes, seconds, relative=True).line
    assert (line.seconds_per_image, line.overhead) == pytest.approx((slope, intercept))
    assert line != fit_batch_time(sizes, seconds).line


@pytest.mark.parametrize(
    ("sizes", "seconds", "words"),
    [
        ([8, 16], [0.2, 0.1], "positive seconds per image"),
        ([8, 16], [0.1, 0.3], "positive overhead"),
        ([8, 8], [0.1, 0.1], "two different batch sizes"),
        ([], [], "two different batch sizes"),
        ([8, 16], [0.1], "one measured time for each batch size"),
    ],
)
def test_timings_that_make_no_line_are_refused(
    sizes: list[int], seconds: list[float], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        fit_batch_time(sizes, seconds)


@given(seed=st.integers(0, 10**6), seconds=st.floats(1e-4, 1.0))
def test_steps_that_take_the_same_at_any_size_are_all_overhead(seed: int, seconds: float) -> None:
    """As on a GPU that waits for launches: about half of such fits have a negative slope."""
    sizes = [16, 28, 48, 84, 147, 256]
    noise = np.random.default_rng(seed).normal(1, 0.01, len(sizes))
    fit = fit_timings(sizes, seconds * noise)
    assert fit.line.overhead == pytest.approx(seconds, rel=0.05)
    assert fit.line.seconds_per_image * 256 < 0.1 * seconds
    assert fit.worst_error < 0.1


@pytest.mark.parametrize(("sizes", "seconds"), [([8, 16], [0.08, 0.17]), ([8], [0.08])])
def test_an_overhead_that_cannot_be_told_is_that_of_an_image(
    sizes: list[int], seconds: list[float]
) -> None:
    assert fit_timings(sizes, seconds).line == BatchTime(0.01, 0.01)


def test_timings_that_make_a_line_give_it() -> None:
    line = BatchTime(2e-3, 3e-2)
    sizes = [2, 8, 32]
    times = [line.of_batch(size) for size in sizes]
    assert fit_timings(sizes, times) == fit_batch_time(sizes, times, relative=True)


def test_time_of_a_batch_of_samples_and_of_steps() -> None:
    line = BatchTime(seconds_per_image=0.001, overhead=0.01)
    assert line.of_batch(50) == pytest.approx(0.06)
    assert line.of_samples(1000, 50) == pytest.approx(1.2)
    assert line.of_steps(1000, 20) == pytest.approx(1.2)


@given(capacity=st.integers(2, 5000), bound=st.integers(2, 5000))
def test_the_search_finds_the_largest_batch_that_fits(capacity: int, bound: int) -> None:
    found = largest_batch(lambda size: size <= capacity, bound)
    largest = min(capacity, bound)
    assert found <= largest < found + max(2, found // 50 + 1)


@pytest.mark.parametrize("capacity", [0, 1])
def test_a_device_that_holds_no_batch_at_all_is_an_error(capacity: int) -> None:
    with pytest.raises(UserError, match="not even a batch of two images fits"):
        largest_batch(lambda size: size <= capacity, 64)


@given(st.integers(2, 20_000))
def test_a_sweep_spans_a_sixteenth_to_the_largest_batch(largest: int) -> None:
    sizes = sweep_sizes(largest)
    assert sizes[0] == (max(2, largest // 16) if largest > 2 else 1)
    assert sizes[-1] == largest
    assert 2 <= len(sizes) == len(set(sizes)) <= 6


# ---- the dual-batch plan ----------------------------------------------------------------------


@st.composite
def feasible_plans(draw: st.DrawFn) -> tuple[DualBatchPlan, BatchTime, int, float]:
    """A plan with its time model, number of samples and time ratio."""
    time = BatchTime(draw(st.floats(1e-6, 1e-1)), draw(st.floats(1e-5, 1.0)))
    workers = draw(st.integers(1, 64))
    small = draw(st.integers(0, workers))
    samples = draw(st.integers(workers, 2_000_000))
    highest = workers / (workers - small) if small < workers else 3
    ratio = 1 + draw(st.floats(0, 1)) * (highest - 1)
    try:
        plan = plan_dual_batch(time, draw(st.integers(1, 4096)), samples, workers, small, ratio)
    except InfeasiblePlan:
        assume(False)
    return plan, time, samples, ratio


@given(feasible_plans())
def test_the_shares_add_up_to_the_data_set(case: tuple) -> None:
    plan, _, samples, _ = case
    shared = plan.large_workers * plan.large_share + plan.small_workers * plan.small_share
    rounded = plan.small_workers or plan.workers  # shares that are rounded to whole samples
    assert abs(shared - samples) <= rounded / 2


@given(feasible_plans())
def test_a_small_worker_has_the_smaller_batch_share_and_weight(case: tuple) -> None:
    plan, *_ = case
    if plan.small_workers == 0:
        assert (plan.small_batch, plan.small_share, plan.update_factor) == (0, 0, None)
        return
    assert 1 <= plan.small_batch <= plan.large_batch
    # d_S <= d_L but for the rounding of batch and share: 12501 against 12500 of 50001 samples
    rounding = (1 + 0.5 / plan.large_batch) * (1 + 0.5 / plan.large_share)
    assert 0 < plan.update_factor <= rounding
    assert plan.update_factor == plan.small_share / plan.large_share


@given(feasible_plans())
def test_a_small_worker_is_done_when_a_large_one_is(case: tuple) -> None:
    plan, time, samples, ratio = case
    seconds = ratio * time.of_samples(samples / plan.workers, plan.large_batch)
    if plan.small_workers == 0:
        assert plan.epoch_seconds == pytest.approx(seconds / ratio)
        return
    assert plan.epoch_seconds == pytest.approx(seconds)
    # B_S is rounded: half an image more is faster, half an image less is slower
    faster = time.of_samples(plan.small_share, plan.small_batch + 0.5)
    slower = time.of_samples(plan.small_share, plan.small_batch - 0.5)
    assert faster * (1 - 1e-9) <= plan.epoch_seconds <= slower * (1 + 1e-9)


@given(feasible_plans())
def test_a_large_worker_takes_the_predicted_time_within_its_last_batch(case: tuple) -> None:
    plan, time, *_ = case
    if plan.large_workers == 0:
        return
    predicted = time.of_samples(plan.large_share, plan.large_batch)
    half_a_sample = time.of_samples(0.5, plan.large_batch)  # by which the share is rounded
    assert abs(plan.epoch_seconds - predicted) <= half_a_sample * (1 + 1e-6)
    in_whole_batches = time.of_steps(plan.large_share, -(-plan.large_share // plan.large_batch))
    assert abs(plan.epoch_seconds - in_whole_batches) <= time.of_batch(plan.large_batch)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_ratio": 1.5, "small_workers": 1}, "3 large-batch workers take all 50000 samples"),
        ({"time_ratio": 70, "small_workers": 4}, "time to spare even with one image per batch"),
        ({"samples": 5, "time_ratio": 1, "large_batch": 2}, "(3) would exceed the large one (2)"),
        ({"samples": 10, "time_ratio": 1, "small_workers": 2}, "3 samples cannot be trained in"),
        ({"time_ratio": 1.5}, "use a time_ratio from 1 to 1.325, or small_workers from 2 to 4"),
        (
            {"samples": 1500, "workers": 1000, "time_ratio": 1},
            "and leave none for the small-batch group; use small_workers from 334 to 999",
        ),
        ({"samples": 0}, "at least 1 training sample, not 0"),
        ({"small_workers": 5}, "small_workers = 5 does not fit 4 workers: use 0 to 4"),
        ({"small_workers": -1}, "small_workers = -1 does not fit 4 workers: use 0 to 4"),
        ({"workers": 0}, "at least 1 worker, not 0"),
        ({"samples": 3}, "use at most 3 workers"),
        ({"large_batch": 0}, "the large batch must be at least 1 image, not 0"),
        ({"time_ratio": 0.99}, "time_ratio must be a number from 1 up, not 0.99"),
        ({"time_ratio": float("nan")}, "time_ratio must be a number from 1 up, not nan"),
        ({"time_ratio": float("inf")}, "time_ratio must be a number from 1 up, not inf"),
    ],
)
def test_an_infeasible_plan_says_which_input_makes_it_so(changes: dict, words: str) -> None:
    inputs = {"large_batch": 560, "samples": 50_000, "workers": 4, "small_workers": 1}
    with pytest.raises(InfeasiblePlan, match=re.escape(words)):
        plan_dual_batch(GTX1080_32, **(inputs | {"time_ratio": 1.05} | changes))


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((60, 7, 6, 30), "use 7 and a time_ratio from 1.05 to 1.07"),
        ((22, 16, 5, 1.1), "nor with another number but 0; use more samples or fewer workers"),
    ],
)
def test_where_no_time_ratio_works_other_small_workers_may(figures: tuple, words: str) -> None:
    with pytest.raises(InfeasiblePlan, match=r"no time_ratio works with \d small_workers") as error:
        plan_dual_batch(BatchTime(1e-3, 1e-5), 16, *figures)
    assert str(error.value).endswith(words)


@pytest.mark.parametrize(
    ("time", "bad"), [((0, 0.01), "seconds per image"), ((1e-3, -1), "overhead per batch")]
)
def test_a_time_model_without_a_positive_coefficient_is_refused(
    time: tuple[float, float], bad: str
) -> None:
    with pytest.raises(UserError, match=bad):
        BatchTime(*time)


NUMBERS = r"(?:from|of) ([\d.]+)(?: to ([\d.]+))?"


def named(words: str, text: str) -> list[float]:
    """The ends of the range that follows `words`; none where they do not occur."""
    found = re.search(f"{words} {NUMBERS}", text)
    return [float(number) for number in found.groups() if number] if found else []


@settings(max_examples=100)
@given(
    time=st.builds(BatchTime, st.floats(1e-6, 1e-2), st.floats(1e-5, 1e-1)),
    large_batch=st.integers(1, 64),
    samples=st.integers(16, 200) | st.integers(16, 3000),
    workers=st.integers(1, 16),
    small=st.integers(1, 16),
    ratio=st.floats(1, 2) | st.floats(1, 30),
)
@example(BatchTime(0.007084872964751372, 0.00010134628566187263), 64, 60, 7, 7, 1.0)
def test_what_a_refusal_names_works_and_what_it_does_not_name_does_not(
    time: BatchTime, large_batch: int, samples: int, workers: int, small: int, ratio: float
) -> None:
    inputs, small = (time, large_batch, samples, workers), min(small, workers)
    try:
        plan_dual_batch(*inputs, small, ratio)
        assume(False)
    except InfeasiblePlan as error:
        refusal = str(error)

    def works(small_workers: int, time_ratio: float) -> bool:
        with contextlib.suppress(InfeasiblePlan):
            return plan_dual_batch(*inputs, small_workers, time_ratio).small_batch >= 1
        return False

    other = re.search(r"use (\d+) and", refusal)
    ratios = named("a time_ratio", refusal)
    assert all(works(int(other[1]) if other else small, bound) for bound in ratios)
    counts = named("small_workers", refusal)
    assert all(works(int(bound), ratio) for bound in counts)
    elsewhere = [count for count in range(1, workers + 1) if works(count, ratio)]
    assert [elsewhere[0], elsewhere[-1]] == [counts[0], counts[-1]] if elsewhere else not counts
    for other_ratio in np.linspace(1, 3, 21):
        if ratios and not other:
            assert ratios[0] <= other_ratio <= ratios[-1] or not works(small, other_ratio)
        else:
            assert not works(small, other_ratio)


# ---- the schedule -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("presets", "stages"),
    [
        (
            ["cifar100", "paper-cifar100"],
            [
                (0, 40, 0.2, 24, 0.1, 600),
                (40, 80, 0.2, 32, 0.2, 560),
                (80, 100, 0.02, 24, 0.1, 600),
                (100, 120, 0.02, 32, 0.2, 560),
                (120, 130, 0.002, 24, 0.1, 600),
                (130, 140, 0.002, 32, 0.2, 560),
            ],
        ),
        (
            ["paper-imagenet"],
            [
                (0, 20, 0.2, 160, 0.1, 2330),
                (20, 40, 0.2, 224, 0.2, 1110),
                (40, 60, 0.2, 288, 0.3, 740),
                (60, 70, 0.02, 160, 0.1, 2330),
                (70, 80, 0.02, 224, 0.2, 1110),
                (80, 90, 0.02, 288, 0.3, 740),
                (90, 95, 0.002, 160, 0.1, 2330),
                (95, 100, 0.002, 224, 0.2, 1110),
                (100, 105, 0.002, 288, 0.3, 740),
            ],
        ),
    ],
)
def test_presets_have_the_schedule_of_the_paper(presets: list[str], stages: list[tuple]) -> None:
    keys = ("start_epoch", "end_epoch", "learning_rate", "resolution", "dropout", "large_batch")
    expected = [dict(zip(keys, stage, strict=True)) for stage in stages]
    for preset in presets:
        assert json.loads(hdb("schedule", preset, "--json")) == expected


def test_a_schedule_shows_the_small_batches_once_the_timing_is_known(digits: Path) -> None:
    data = f"data.path='{digits}'"
    shown = json.loads(hdb("schedule", "digits", "--set", TIMING, "--set", data, "--json"))
    batches = [(s["resolution"], s["large_batch"], s["small_batch"]) for s in shown]
    assert batches == [(16, 64, 10), (24, 64, 7)] * 3


def test_without_cycling_only_the_highest_resolution_is_trained() -> None:
    stages = load_settings("paper-imagenet", ["schedule.cyclic=false"]).schedule.stages()
    shown = [(stage.start_epoch, stage.end_epoch, stage.resolution) for stage in stages]
    assert shown == [(0, 60, 288), (60, 90, 288), (90, 105, 288)]


@given(lengths=st.lists(st.integers(3, 40), min_size=1, max_size=5), resolutions=st.integers(1, 3))
def test_a_schedule_has_no_gap_and_every_stage_an_epoch(
    lengths: list[int], resolutions: int
) -> None:
    ends = np.cumsum(lengths).tolist()
    sides = [16, 24, 32][:resolutions]
    stages = cut_stages(ends[-1], 0.1, ends[:-1], 0.5, sides, [0.0] * resolutions)
    assert [stages[0].start_epoch, stages[-1].end_epoch] == [0, ends[-1]]
    assert all(earlier.end_epoch == later.start_epoch for earlier, later in pairwise(stages))
    assert all(stage.start_epoch < stage.end_epoch for stage in stages)
    for epoch in range(ends[-1]):
        stage = stages[stage_index(stages, epoch)]
        assert stage.start_epoch <= epoch < stage.end_epoch
        assert stage.learning_rate == pytest.approx(0.1 * 0.5 ** sum(e <= epoch for e in ends))
    assert stage_index(stages, ends[-1]) == len(stages) - 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolutions": []}, "schedule.resolutions is empty"),
        ({"resolutions": [32, 24]}, "schedule.resolutions must rise, not [32, 24]"),
        ({"resolutions": [32, 32]}, "schedule.resolutions must rise, not [32, 32]"),
        ({"dropout": [0.1]}, "schedule.dropout has 1 values for 2 resolutions"),
        ({"large_batch": [64]}, "schedule.large_batch has 1 values for 2 resolutions"),
        ({"milestones": [8, 4]}, "must rise and lie between 1 and 9 for 10 epochs, not [8, 4]"),
        ({"milestones": [10]}, "must rise and lie between 1 and 9 for 10 epochs, not [10]"),
        ({"milestones": [0]}, "must rise and lie between 1 and 9 for 10 epochs, not [0]"),
        ({"milestones": [9]}, "from epoch 9 to 10 is too short to cycle through 2 resolutions"),
    ],
)
def test_a_schedule_that_cannot_be_cut_says_why(changes: dict, words: str) -> None:
    inputs = {
        "epochs": 10,
        "learning_rate": 0.1,
        "milestones": [5],
        "factor": 0.1,
        "resolutions": [24, 32],
        "dropout": [0.1, 0.2],
    }
    with pytest.raises(UserError, match=re.escape(words)):
        cut_stages(**(inputs | changes))


# ---- the plan of a run ------------------------------------------------------------------------

STAGES = cut_stages(8, 0.1, [4], 0.1, [16, 24], [0.0, 0.1], [64, 48])
TIMES = {16: BatchTime(4e-4, 2e-3), 24: BatchTime(7e-4, 2e-3)}


def test_a_run_has_a_plan_for_each_resolution_with_the_same_shares() -> None:
    plan = plan_training(STAGES, TIMES, samples=1437, workers=3, small_workers=1, time_ratio=1.1)
    for number, stage in enumerate(plan.stages):
        alone = plan_dual_batch(TIMES[stage.resolution], stage.large_batch, 1437, 3, 1, 1.1)
        assert plan.plans[number] == alone
        assert plan.batch(number, Group.LARGE) == stage.large_batch
        assert plan.batch(number, Group.SMALL) == stage.small_batch == alone.small_batch
    assert len({(p.large_share, p.small_share, p.update_factor) for p in plan.plans}) == 1


def test_the_predicted_time_is_that_of_the_epochs_still_to_train() -> None:
    plan = plan_training(STAGES, TIMES, 1437, 3, 1, 1.1)
    low, high = plan.plans[0].epoch_seconds, plan.plans[1].epoch_seconds
    assert plan.predicted_seconds() == pytest.approx(4 * low + 4 * high)
    assert plan.predicted_seconds(3.5) == pytest.approx(2 * low + 2.5 * high)
    assert plan.predicted_seconds(8) == 0


@pytest.mark.parametrize(("small", "ratio"), [(0, 1.0), (1, 1.1), (3, 1.05)])
def test_a_plan_comes_back_whole_from_its_json(small: int, ratio: float) -> None:
    plan = plan_training(STAGES, TIMES, 1437, 3, small, ratio)
    assert TrainingPlan.from_dict(json.loads(json.dumps(plan.to_dict())), ratio) == plan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timing": {16: TIMES[16]}}, "no timing for resolution 24 (there is one for 16)"),
        ({"timing": {}}, "no timing for resolution 16 (there is one for none)"),
        ({"stages": cut_stages(8, 0.1, [], 0.1, [16], [0.0])}, "no large batch for resolution 16"),
        ({"time_ratio": 2.0}, "resolution 16: no dual-batch plan"),
    ],
)
def test_a_run_without_a_plan_names_the_resolution(changes: dict, words: str) -> None:
    inputs = {"stages": STAGES, "timing": TIMES, "samples": 1437, "workers": 3}
    with pytest.raises(UserError, match=re.escape(words)):
        plan_training(**(inputs | {"small_workers": 1, "time_ratio": 1.1} | changes))


# ---- who trains which sample when -------------------------------------------------------------


@st.composite
def shares(draw: st.DrawFn) -> DualBatchPlan:
    """Any plan, whether or not its shares make sense."""
    workers = draw(st.integers(1, 6))
    small = draw(st.integers(0, workers))
    large_share, small_share = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return DualBatchPlan(workers, small, 64, 8, large_share, small_share, 0.5, 1.0)


@given(shares(), st.integers(1, 1000))
def test_an_epoch_is_cut_whole_and_in_proportion(plan: DualBatchPlan, samples: int) -> None:
    wanted = [plan.large_share] * plan.large_workers + [plan.small_share] * plan.small_workers
    bounds = epoch_bounds(plan, samples)
    assert (bounds[0], bounds[-1]) == (0, samples)
    for (start, end), share in zip(pairwise(bounds), wanted, strict=True):
        assert abs((end - start) - samples * share / sum(wanted)) < 1


@given(shares(), st.integers(1, 1000), st.integers(0, 8), st.data())
def test_the_slowest_worker_is_left_with_something(
    plan: DualBatchPlan, samples: int, least: int, data: st.DataObject
) -> None:
    speeds = st.floats(1e-3, 1e3)
    slowness = data.draw(st.lists(speeds, min_size=plan.workers, max_size=plan.workers))
    bounds = epoch_bounds(plan, samples, slowness, least)
    assert (bounds[0], bounds[-1]) == (0, samples)
    sizes = [end - start for start, end in pairwise(bounds)]
    assert min(sizes) >= min(least, samples // plan.workers) - 1
    wanted = [plan.large_share] * plan.large_workers + [plan.small_share] * plan.small_workers
    fair = [share / slow for share, slow in zip(wanted, slowness, strict=True)]
    if min(fair) / sum(fair) * samples >= least:
        assert sizes == pytest.approx([samples * each / sum(fair) for each in fair], abs=1)


@given(st.integers(1, 5000), st.integers(1, 600))
def test_batches_are_even_and_none_is_too_large(samples: int, largest: int) -> None:
    sizes = split_evenly(samples, largest)
    assert sum(sizes) == samples
    assert max(sizes) <= largest
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-samples // largest)


@given(
    plan=shares(),
    samples=st.integers(1, 60),
    parts=st.integers(1, 4),
    epochs=st.integers(2, 5),
    chance=st.randoms(use_true_random=False),
    crashes=st.booleans(),
)
def test_every_sample_of_every_epoch_is_committed_once(
    plan: DualBatchPlan,
    samples: int,
    parts: int,
    epochs: int,
    chance: random.Random,
    crashes: bool,
) -> None:
    """Whichever worker is free when, and from whichever checkpoint the run went on."""
    stages = cut_stages(epochs, 0.1, [], 0.1, [16, 24], [0.0, 0.0])
    book = RoundBook(plan, stages, samples, parts)
    groups = [Group.LARGE] * plan.large_workers + [Group.SMALL] * plan.small_workers
    working: dict[int, object] = {}
    committed: Counter[tuple[int, int]] = Counter()
    checkpoint = (json.dumps(book.state()), committed.copy())
    idle: set[int] = set()
    assert book.total == epochs * plan.workers * parts
    while not book.finished:
        assert len(idle) < plan.workers, "all wait for work, and some is left"
        if crashes and chance.random() < 0.05:
            checkpoint = (json.dumps(book.state()), committed.copy())
        if crashes and chance.random() < 0.03:
            if chance.random() < 0.5:  # else the same book goes back
                book = RoundBook(plan, stages, samples, parts)
            book.restore(json.loads(checkpoint[0]))
            committed = checkpoint[1].copy()
            working, idle = {}, set()
            continue
        worker = chance.choice([number for number in range(plan.workers) if number not in idle])
        if worker not in working:
            work = book.hand_out(groups[worker])
            if work is None:
                idle.add(worker)
            else:
                working[worker] = work
            continue
        done = working.pop(worker)
        epoch = book.commits // (plan.workers * parts)
        assert stages[book.stage].start_epoch <= epoch < stages[book.stage].end_epoch
        book.commit(done.group, done.index)
        committed.update((done.epoch, position) for position in range(done.begin, done.end))
    assert not working
    assert book.commits == book.total
    assert book.stage == len(stages) - 1
    assert [book.hand_out(group) for group in Group] == [None, None]
    every = {(epoch, position) for epoch in range(epochs) for position in range(samples)}
    assert committed == dict.fromkeys(every, 1)


def test_in_lockstep_the_next_stage_is_that_of_the_next_round() -> None:
    plan = DualBatchPlan(2, 1, 64, 8, 10, 10, 1.0, 1.0)
    book = RoundBook(plan, STAGES, 20, 2)
    expected = None
    while not book.finished:
        assert expected in (None, book.stage)
        rounds = [book.hand_out(group) for group in Group]
        expected = book.next_stage
        for work in rounds:
            book.commit(work.group, work.index)
    assert expected == book.stage == len(STAGES) - 1


def test_a_round_that_nobody_was_given_cannot_be_committed() -> None:
    plan = DualBatchPlan(2, 1, 64, 8, 10, 10, 1.0, 1.0)
    book = RoundBook(plan, STAGES, 20)
    work = book.hand_out(Group.LARGE)
    book.commit(work.group, work.index)
    with pytest.raises(KeyError):
        book.commit(work.group, work.index)
    with pytest.raises(KeyError):
        book.commit(Group.SMALL, 0)
    assert book.commits == 1
