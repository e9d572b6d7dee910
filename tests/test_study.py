"""The study of accuracy, as `make study` starts it, on a few images of digits.

Its runs are real; but the first, the study itself runs within the tests' process, which has torch.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import succeed

from hpc_hdb.config_files import load_settings, parse_settings, tomllib

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "benchmarks/accuracy/study.py"
SCALES = tomllib.loads((STUDY.parent / "rows.toml").read_text())["scales"]
IMAGES = 20


class Ending(NamedTuple):
    status: int
    out: str
    err: str


Study = Callable[..., Ending]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """Options for two rows of the study, and what was printed when they were trained."""
    here = tmp_path_factory.mktemp("study")
    for split in ("train", "test"):
        for folder in (digits / "digits" / split).iterdir():
            own = here / "digits" / split / folder.name
            own.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:IMAGES]:
                (own / image.name).symlink_to(image)

    options = ["--small", "--data", f"{here}/digits", "--work", f"{here}/work"]
    options += ["--rows", "paper-conventional-asp", "ours"]
    return options, succeed(sys.executable, STUDY, *options)


@pytest.fixture
def study(
    trained: tuple[list[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Study:
    """Runs the study again, with other options after those of `trained`; where that keeps runs."""
    monkeypatch.syspath_prepend(STUDY.parent.parent)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from accuracy.study import main

    def start(*words: str) -> Ending:
        status = 0
        monkeypatch.setattr(sys, "argv", [str(STUDY), *trained[0], *words])
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print("" if status == 2 else end.code, file=sys.stderr)
        return Ending(status, *capfd.readouterr())

    start.work = Path(trained[0][trained[0].index("--work") + 1])
    return start


def figures(output: str) -> dict[str, list[str]]:
    """The cells of each row of the printed table."""
    lines = [line for line in output.splitlines() if line.startswith(("paper-", "ours "))]
    return {line.split()[0]: line.split("  ") for line in lines}


def test_rows_are_trained_once_and_shown_side_by_side(
    trained: tuple[list[str], str], study: Study
) -> None:
    table = figures(trained[1])
    assert list(table) == ["paper-conventional-asp", "ours"]
    work = study.work / "small-test"
    events = {path: path.stat().st_mtime_ns for path in work.glob("*/events.jsonl")}
    assert len(events) == 2
    for row in table:
        summary = json.loads((work / f"{row}-0" / "summary.json").read_text())
        assert summary["mode"] == "virtual"
        assert f"{summary['final_accuracy']:.2%}" in " ".join(table[row])
        assert f"{summary['seconds']:.1f} s" in " ".join(table[row])
    again = study()
    assert figures(again.out) == table
    assert {path: path.stat().st_mtime_ns for path in events} == events, "skipped"
    assert "goal: ours 5 points above conventional" in again.out


def test_an_interrupted_row_goes_on(study: Study) -> None:
    table = figures(study("--only-table").out)
    folder = study.work / "small-test" / "ours-0"
    (folder / "summary.json").unlink()
    (folder / "model.pt").unlink()
    assert figures(study().out) == table
    assert "resume" in (folder / "events.jsonl").read_text()


def test_a_row_whose_settings_have_changed_is_not_taken_for_done(study: Study) -> None:
    config = study.work / "small-test" / "ours-0" / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("label_smoothing = 0.1", "label_smoothing = 0.2"))
    refused = [study(), study("--only-table")]
    config.write_text(text)
    for one in refused:
        assert one.status == 1
        assert "ours-0 was made with other settings: remove it" in one.err


def test_validation_images_are_taken_from_those_that_train(study: Study) -> None:
    done = study("--split", "validation", "--rows", "paper-conventional-asp")
    assert done.status == 0, done.err
    images = study.work / "small-validation" / "images"
    held_out, trained = (
        {path.resolve() for path in (images / split).glob("*/*")} for split in ("test", "train")
    )
    assert not held_out & trained
    assert {path.parent.parent.name for path in held_out | trained} == {"train"}
    assert (len(held_out), len(trained)) == (10 * IMAGES // 10, 10 * IMAGES * 9 // 10)


def test_studies_started_at_once_share_their_images(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(STUDY.parent.parent)
    from accuracy.study import images_of

    with ThreadPoolExecutor(4) as studies:
        list(
            studies.map(
                lambda _: images_of(digits / "digits", tmp_path / "images", "test", 0), range(4)
            )
        )
    for split in ("train", "test"):
        there = {path.name for path in (tmp_path / "images" / split).glob("*/*")}
        assert there == {path.name for path in (digits / "digits" / split).glob("*/*")}
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_is_a_configuration(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STUDY.parent.parent)
    from accuracy.study import read_study, rows_of, settings_of

    study = read_study()
    rows = rows_of(study, scale)
    assert ("try-base" in rows) == (scale == "half")
    assert ("ours-less-smoothing" in rows) == (scale in ("gpu", "small")), "cpu's has none"
    for row in rows:
        settings = parse_settings(settings_of(study, scale, row), row)
        assert settings.schedule.epochs == study["scales"][scale]["set"]["schedule"]["epochs"]
        if not study["rows"][row].get("candidate"):
            assert settings.plan.workers == (1 if row.startswith("one-") else 4)
        # Or a GPU would wait for torch to decode, without a word, where DALI is not installed.
        assert (settings.data.loader == "dali") == (scale == "gpu")


def test_the_preset_is_ours_at_the_gpu_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STUDY.parent.parent)
    from accuracy.study import read_study, settings_of

    studied = parse_settings(settings_of(read_study(), "gpu", "ours"), "ours")
    preset = load_settings("cifar10")
    for key in ("model", "server"):
        assert getattr(preset, key) == getattr(studied, key)
    for key in ("workers", "small_workers", "time_ratio"):
        assert getattr(preset.plan, key) == getattr(studied.plan, key)
    assert preset.schedule.rates() == studied.schedule.rates()
    assert preset.schedule.stages() == studied.schedule.stages()
    assert preset.run.checkpoint_every == studied.run.checkpoint_every
    assert preset.schedule.scale_with_workers == studied.schedule.scale_with_workers
    for key in ("momentum", "weight_decay", "label_smoothing", "flip", "rotation", "zoom"):
        assert getattr(preset.train, key) == getattr(studied.train, key)


def test_an_unknown_row_is_refused(study: Study) -> None:
    refused = study("--rows", "our")
    assert refused.status == 2
    assert "no row our; there are one-large" in refused.err


def test_table_figure_and_logs_are_saved(study: Study, tmp_path: Path) -> None:
    (tmp_path / "accuracy-small-test-20200101.txt").touch()
    saved = study("--only-table", "--save", str(tmp_path))
    assert saved.status == 0, saved.err
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert "ours, BSP" in files[".txt"].read_text()
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    with tarfile.open(files[".xz"]) as archive:
        assert "ours-0/events.jsonl" in archive.getnames()


@pytest.mark.parametrize("name", ["cpu-test", "half-validation"])
def test_the_committed_tables_come_from_the_committed_logs(
    name: str, study: Study, tmp_path: Path
) -> None:
    results = ROOT / "benchmarks/results"
    (committed,) = results.glob(f"accuracy-{name}-*.txt")
    _command, *lines = committed.read_text().splitlines()
    with tarfile.open(results / f"accuracy-{name}-events.tar.xz") as archive:
        archive.extractall(tmp_path / name)
    words = ["--scale", name.split("-")[0], "--split", name.split("-")[1], "--only-table"]
    again = study("--work", str(tmp_path), "--rows", *rows_in(lines), *words)
    assert again.status == 0, again.err
    assert again.out.splitlines()[1:] == lines[1:]


def rows_in(lines: list[str]) -> list[str]:
    """The rows of a printed table."""
    table = lines[lines.index("") + 2 :]
    return [line.split()[0] for line in table[: table.index("")]]
