"""What a user types, and what comes back: output, exit status, and one line for every error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import TIMING, run, succeed
from typer.main import get_command

from hpc_hdb import __version__
from hpc_hdb.cli import app, main

COMMANDS = ["profile", "plan", "schedule", "train", "simulate", "evaluate"]

FIGURES = {
    "--seconds-per-image": "1e-3",
    "--overhead": "1e-2",
    "--large-batch": "64",
    "--samples": "1000",
    "--workers": "4",
    "--small-workers": "1",
    "--time-ratio": "1.1",
}

ONE_RESOLUTION = ["schedule.resolutions=[16]", "schedule.dropout=[0]", "schedule.large_batch=[]"]


class Answer(NamedTuple):
    """What a command leaves with and has printed."""

    status: int
    out: str
    err: str


class Terminal:
    """Runs ``hdb`` as its entry point does, without the seconds that a new process costs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> Answer:
        self._monkeypatch.setattr(sys, "argv", ["hdb", *map(str, words)])
        self._monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as left:
            main()
        out, err = self._capsys.readouterr()
        return Answer(left.value.code or 0, out, err)

    def json(self, *words: str | Path) -> dict:
        answer = self(*words, "--json")
        assert (answer.status, answer.err) == (0, "")
        return json.loads(answer.out)

    def refused(self, *words: str | Path) -> str:
        """The line that a user reads of what cannot be done."""
        answer = self(*words)
        assert_one_line(answer)
        assert "Traceback" not in answer.out
        return answer.err


@pytest.fixture
def hdb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Terminal:
    """The command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys)


def assert_one_line(answer: Answer) -> None:
    assert answer.status == 2
    assert answer.err.startswith("hdb: ")
    assert answer.err.endswith("\n")
    assert answer.err.count("\n") == 1


def figures(**changes: str | None) -> list[str]:
    """Options of ``hdb plan``; an option changed to None is left out."""
    chosen = FIGURES | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    kept = [(option, value) for option, value in chosen.items() if value is not None]
    return [word for pair in kept for word in pair]


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


# ---- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], []], ids=["--help", "-h", "nothing"])
def test_help_lists_every_command(hdb: Terminal, words: list[str]) -> None:
    answer = hdb(*words)
    assert answer.status == 0
    first_words = {line.strip(" │").split(" ")[0] for line in answer.out.splitlines()}
    assert first_words >= {*COMMANDS, *get_command(app).commands}
    assert "cifar10, cifar100, digits, imagenet" in answer.out


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", get_command(app).commands)
def test_every_command_explains_itself(hdb: Terminal, name: str, flag: str) -> None:
    answer = hdb(name, flag)
    assert answer.status == 0
    assert f"Usage: hdb {name} [OPTIONS]" in answer.out


def test_the_installed_command_tells_its_version() -> None:
    assert succeed("hdb", "--version") == f"hdb {__version__}\n"


# ---- plans ------------------------------------------------------------------------------------


def test_a_plan_of_figures_has_the_documented_keys(hdb: Terminal) -> None:
    plan = hdb.json("plan", *figures())
    assert {key: plan[key] for key in plan if key != "epoch_seconds"} == {
        "workers": 4,
        "small_workers": 1,
        "large_batch": 64,
        "large_share": 275,
        "small_share": 175,
        "small_batch": 12,
        "update_factor": 175 / 275,
    }
    assert plan["epoch_seconds"] == pytest.approx(1.1 * (1e-3 + 1e-2 / 64) * 250)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"small_workers": None, "time_ratio": None}, (250, 0, 0, None)),
        ({"small_workers": None}, (250, 0, 0, None)),
        ({"time_ratio": None}, (250, 250, 64, 1.0)),
    ],
)
def test_without_small_workers_or_extra_time_the_plan_is_the_conventional_one(
    hdb: Terminal, changes: dict, expected: tuple
) -> None:
    plan = hdb.json("plan", *figures(**changes))
    keys = ("large_share", "small_share", "small_batch", "update_factor")
    assert tuple(plan[key] for key in keys) == expected


def test_a_plan_of_figures_is_shown_as_a_table(hdb: Terminal) -> None:
    lines = hdb("plan", *figures()).out.splitlines()
    cells = [line.replace("│", " ").split() for line in lines]
    assert ["large", "3", "64", "275", "1"] in cells
    assert ["small", "1", "12", "175", "0.6364"] in cells
    assert "predicted epoch: 0.317969 s" in " ".join(lines)


def test_a_plan_of_a_configuration_has_the_documented_keys(hdb: Terminal, digits: Path) -> None:
    plan = hdb.json("plan", "digits", *sets(TIMING, f"data.path='{digits}'"))
    stages, timing, topology = (plan.pop(key) for key in ("stages", "timing", "topology"))
    assert topology["name"] == "star"
    assert plan == {
        "samples": 1437,
        "workers": 3,
        "small_workers": 1,
        "ranks_per_worker": 1,
        "large_share": 527,
        "small_share": 383,
        "update_factor": 383 / 527,
        "predicted_seconds": pytest.approx(12 * (0.227225625 + 0.385295625)),
    }
    assert timing["24"] == {"seconds_per_image": 7e-4, "overhead": 2e-3}
    assert stages[1] == {
        "start_epoch": 7,
        "end_epoch": 14,
        "learning_rate": 0.1,
        "resolution": 24,
        "dropout": 0.1,
        "large_batch": 64,
        "small_batch": 7,
        "epoch_seconds": pytest.approx(0.385295625),
    }


def test_a_plan_for_other_workers_and_samples_opens_no_data(hdb: Terminal, tmp_path: Path) -> None:
    words = ["plan", "digits", "--workers", "5", "--samples", "1000", *sets(TIMING)]
    plan = hdb.json(*words)
    assert (plan["workers"], plan["samples"], plan["large_share"]) == (5, 1000, 220)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_and_a_schedule_of_a_configuration_are_shown_as_tables(
    hdb: Terminal, digits: Path
) -> None:
    for command in (["plan", "digits", "--samples", "1437"], ["schedule", "digits"]):
        out = hdb(*command, *sets(TIMING, f"data.path='{digits}'")).out
        for epochs in ("0 to 7", "7 to 14", "14 to 17", "17 to 20", "20 to 22", "22 to 24"):
            assert epochs in out


# ---- profile, and a plan of what it measured --------------------------------------------------


def test_a_profile_writes_the_timing_that_a_plan_reads(
    hdb: Terminal, digits: Path, tmp_path: Path
) -> None:
    output = tmp_path / "of[this]" / "timing.json"  # which is no markup
    output.parent.mkdir()
    told = ["profile", "digits", "--bound", "64", "--output", output]
    chosen = sets(*ONE_RESOLUTION, f"data.path='{digits}'")
    assert f"--set plan.timing={output}\n" in succeed("hdb", *told, *chosen)
    measured = json.loads(output.read_text())
    assert {"device", "threads", "model", "precision", "torch"} < set(measured)
    line = measured["resolutions"]["16"]
    assert list(measured["resolutions"]) == ["16"]
    assert line["seconds_per_image"] > 0
    assert line["overhead"] > 0
    assert [size for size, seconds in line["points"] if seconds > 0] == [4, 7, 12, 21, 37, 64]
    plan = hdb.json("plan", "digits", *chosen, *sets(f"plan.timing='{output}'"))
    stage = plan["stages"][0]
    assert stage["large_batch"] == line["large_batch"] == 64
    assert 1 <= stage["small_batch"] <= 64
    share = 1.1 * (line["seconds_per_image"] + line["overhead"] / 64) * 1437 / 3
    assert stage["epoch_seconds"] == pytest.approx(share)


BEYOND = (
    "schedule.large_batch is more than the largest batch of timing.json (64 images at 16 px, "
    "measured 63): it may not fit; --set 'schedule.large_batch=[]' takes what was measured"
)


def write_timing(folder: Path) -> None:
    """Largest batches of 63 images at 16 pixels and 64 at 24."""
    line = {"seconds_per_image": 1e-3, "overhead": 1e-2}
    lines = {side: line | {"large_batch": batch} for side, batch in ((16, 63), (24, 64))}
    (folder / "timing.json").write_text(json.dumps({"resolutions": lines}))


def test_a_plan_says_where_its_batches_are_larger_than_measured_ones(
    hdb: Terminal, tmp_path: Path
) -> None:
    write_timing(tmp_path)
    for words in (["plan", "digits"], ["slurm", "digits", "--force"]):
        words += ["--samples", "1437", *sets("plan.timing=timing.json")]
        assert hdb(*words).out.count(BEYOND) == 1
        for right in (
            sets("schedule.large_batch=[]"),
            sets("schedule.cyclic=false"),
            sets("server.ranks_per_worker=2"),  # of which each trains half of the batch
        ):
            assert "schedule.large_batch" not in hdb(*words, *right).out
        assert BEYOND in hdb(*words, *sets("server.sync=allreduce")).out


@pytest.mark.parametrize(("command", "ranks"), [("simulate", 0), ("train", 3)])
def test_a_run_says_where_its_batches_are_larger_than_measured_ones(
    here: Path, command: str, ranks: int
) -> None:
    write_timing(here)
    out = succeed(
        "hdb", command, "mine.toml", *sets("plan.timing=timing.json"), ranks=ranks, cwd=here
    )
    assert out.count(BEYOND) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"resolutions": {"16": {',
        "[]",
        "{}",
        '{"resolutions": 3}',
        '{"resolutions": {"16": 3}}',
        '{"resolutions": {"small": {"seconds_per_image": 1, "overhead": 1, "large_batch": 64}}}',
        '{"resolutions": {"16": {"seconds_per_image": 1, "large_batch": 64}}}',
        '{"resolutions": {"16": {"seconds_per_image": "?", "overhead": 1, "large_batch": 64}}}',
        '{"resolutions": {"16": {"seconds_per_image": 1, "overhead": 1, "large_batch": null}}}',
        "\udcff",
    ],
)
def test_a_damaged_timing_file_is_refused_by_name(hdb: Terminal, tmp_path: Path, text: str) -> None:
    (tmp_path / "timing.json").write_text(text, errors="surrogateescape")
    told = hdb.refused("plan", "digits", "--samples", "99", "--set", "plan.timing=timing.json")
    assert told.startswith("hdb: timing file timing.json is damaged (")
    assert told.endswith("): write it again with 'hdb profile'\n")


def test_a_plan_counts_synthetic_images_without_making_them(hdb: Terminal) -> None:
    """These would take 150 TB."""
    images = ("data.synthetic_samples=1281167", "data.synthetic_side=3200")
    words = sets(TIMING, "data.source=synthetic", *images)
    assert hdb.json("plan", "digits", *words)["samples"] == 1_281_167


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["plan"],
            "give a CONFIG, or --seconds-per-image, --overhead, --large-batch, --samples, "
            "--workers too",
        ),
        (["plan", *figures(overhead=None)], "give a CONFIG, or --overhead too"),
        (["plan", *figures(samples=None, workers=None)], "give a CONFIG, or --samples, --workers"),
        (["plan", *figures(small_workers="5")], "small_workers = 5 does not fit 4 workers"),
        (["plan", *figures(time_ratio="inf")], "time_ratio must be a number from 1 up, not inf"),
        (["plan", *figures(time_ratio="3")], "use a time_ratio from 1 to 1.309"),
        (["plan", *figures(overhead="0")], "a positive overhead per batch (c), not 0"),
        (["plan", *figures(workers="four")], "'--workers'"),
        (
            ["plan", *figures(workers="0")],
            "Invalid value for '--workers'",
        ),
        (
            ["plan", "digits", "--workers", "0"],
            "Invalid value for '--workers'",
        ),
        (["plan", *figures(), *sets("plan.foo=3")], "--set plan.foo=3 changes a CONFIG: give one"),
        (
            ["plan", "cifar100", *sets("plan.timing={24=[1e-3,1e-2],32=[1e-3,1e-2]}")],
            "cifar100 is not in data, or corrupted: let hdb train download it, put torchvision's "
            "cifar-100-python there, or bring the images as a folder (data.source=folder); or give "
            "their number: --samples",
        ),
        (["plan", "--epochs", "3"], "--epochs"),
        (["plan", "digits"], "'hdb profile', then --set plan.timing=timing.json"),
        (["plan", "digits", "--set", "plan.timing=gone.json"], "no timing file gone.json"),
        (
            ["plan", "digits", "--samples", "9", "--set", "plan.timing={16=[1e-3,1e-2]}"],
            "no timing for resolution 24 (there is one for 16)",
        ),
        (
            ["plan", "digits", "--samples", "9", *sets(TIMING, "server.commits_per_epoch=4")],
            "server.commits_per_epoch = 4 cuts a share of 3 samples into nothing",
        ),
        (["schedule", "digts"], "did you mean 'digits'?"),
        (["schedule", "digits", "--set", "plan.workrs=3"], "did you mean 'plan.workers'?"),
        (["schedule", "digits", "--set", "workers=3"], "write section.key=value"),
        (["schedule", "mine.toml"], "no configuration file mine.toml"),
        (["schedule"], "'CONFIG'"),
        (["trian", "digits"], "'trian'"),
        (["train"], "give a CONFIG to train, or --resume RUN"),
        (
            ["train", "digits", "--resume", "runs/one"],
            "--resume goes on with the run's own configuration: leave out 'digits'",
        ),
        (["train", "--resume", ".", "--set", "run.seed=1"], "leave out --set"),
        (["train", "digits", "--data-copy", "here"], "--data-copy is for ranks under a launcher"),
        (["train", "--resume", "."], "is not a run folder: it has no config.toml"),
        (["train", "--resume", "runs/gone"], "runs/gone"),
        (["simulate", "--resume", "."], "is not a run folder: it has no config.toml"),
        (["evaluate", "."], "is not a run folder: it has no config.toml"),
        (["evaluate", "runs/gone"], "runs/gone is not a run folder"),
        (["evaluate", __file__], "test_command_line.py is not a run folder"),
        (["profile", "digits", "--bound", "1"], "'--bound'"),
        (["profile", "imagenet"], "data.path = 'imagenet' is not a folder"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_an_error_is_one_line_that_says_what_to_do(
    hdb: Terminal, words: list[str], told: str, tmp_path: Path
) -> None:
    assert told in hdb.refused(*words)
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_leaves_with_such_a_line_too() -> None:
    done = run("hdb", "plan", *figures(small_workers="5"))
    assert_one_line(Answer(done.returncode, done.stdout, done.stderr))
    assert "small_workers = 5 does not fit 4 workers" in done.stderr
