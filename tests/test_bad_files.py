"""Bad images, damaged run folders and failing disks: one line says it, and nothing good is lost."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import events, run, succeed
from endings import (
    LONG,
    SIMULATE,
    TRAIN,
    Job,
    assert_refusal,
    assert_whole,
    checkpoints,
    contents,
    refused,
    sets,
    write_bomb,
    write_configuration,
)
from PIL import Image

IMAGES = sets("data.source=folder", "data.path=images")
BIG = sets("model.name=resnet8", "schedule.epochs=20")  # whose checkpoints fill a small disk


def picture(mode: str = "RGB") -> Image.Image:
    colours = np.random.default_rng(3).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    return Image.fromarray(colours).convert(mode)


@pytest.fixture
def images(here: Path) -> Path:
    """A data set of 60 small images of three classes."""
    for split, count in (("train", 16), ("val", 4)):
        for name in ("ant", "bee", "cat"):
            folder = here / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture().save(folder / f"{number:02d}.jpg")
    return here / "images"


# ---- images -----------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def overwritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20] + bytes(400))


@pytest.mark.parametrize("damage", [cut, overwritten])
def test_a_damaged_image_is_named(images: Path, damage: Callable[[Path], None]) -> None:
    damage(images / "train" / "bee" / "07.jpg")
    told = "cannot decode images/train/bee/07.jpg: "
    refused(*SIMULATE, *IMAGES, told=told, cwd=images.parent)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_that_one_rank_meets_ends_all(images: Path, split: str) -> None:
    (images / split / "bee" / "03.jpg").write_text("no image at all")
    told = f"cannot decode images/{split}/bee/03.jpg: not an image; bring a good copy of it"
    refused(*TRAIN, *IMAGES, told=told, ranks=3, cwd=images.parent)


@pytest.mark.parametrize("processes", [0, 1])
def test_an_image_that_vanishes_is_named(images: Path, processes: int) -> None:
    here = images.parent
    training = Job(*TRAIN, *IMAGES, *LONG, *sets(f"data.threads={processes}"), ranks=3, cwd=here)
    training.until(lambda: len(checkpoints(here / "out")) > 1)
    (images / "train" / "ant" / "05.jpg").unlink()
    assert_refusal(training.end(), "image images/train/ant/05.jpg has vanished since the run")
    assert_whole(here / "out")
    told = "the run was started with 48 training images, and there are 47 now"
    refused("hdb", "train", "--resume", "out", told=told, cwd=here)


def test_images_of_any_kind_train(images: Path) -> None:
    folder = images / "train" / "cat"
    for mode, suffix in [
        ("RGBA", "png"),
        ("P", "png"),
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("1", "bmp"),
        ("I;16", "tif"),
    ]:
        picture(mode).save(folder / f"{mode}.{suffix}")
    succeed(*SIMULATE, *IMAGES, cwd=images.parent)


def test_files_that_are_not_named_as_images_are_told_of(images: Path) -> None:
    """In both splits: while training, packing and evaluating."""
    picture().save(images / "train" / "cat" / "00.gif")
    picture().save(images / "val" / "cat" / "00.tga")
    told = [
        f"images/{split}: files passed over that are not named as images: 1 ({suffix} 1)\n"
        for split, suffix in (("train", ".gif"), ("val", ".tga"))
    ]
    for words, count in (
        ([*SIMULATE, *IMAGES], 2),
        (["hdb", "pack", "images", "packed"], 2),
        (["hdb", "evaluate", "out"], 1),
    ):
        done = run(*words, cwd=images.parent)
        assert done.returncode == 0
        for line in told[-count:]:
            assert (done.stdout + done.stderr).count(line) == 1


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_header_that_claims_absurd_sizes_is_named(images: Path, loader: str) -> None:
    """Without a try to find memory for it."""
    write_bomb(images / "train" / "bee" / "07.png")
    told = "cannot decode images/train/bee/07.png: Image size (3600000000 pixels) exceeds limit"
    refused(*SIMULATE, *IMAGES, *sets(f"data.loader={loader}"), told=told, cwd=images.parent)


@pytest.mark.parametrize(("loader", "start", "ranks"), [("torch", SIMULATE, 0), ("dali", TRAIN, 3)])
def test_bad_images_are_left_out_on_request(
    images: Path, loader: str, start: list[str], ranks: int
) -> None:
    train, held_out = images / "train", images / "val" / "ant" / "01.jpg"
    bad = [train / "ant/03.jpg", train / "bee/00.jpg", train / "cat/05.jpg", train / "cat/99.png"]
    cut(bad[0])
    bad[1].write_text("no image at all")
    bad[2].write_bytes(b"")
    write_bomb(bad[3])
    held_out.write_bytes(b"")
    skipping = sets("data.on_bad_image=skip", f"data.loader={loader}")
    out = succeed(*start, *IMAGES, *skipping, ranks=ranks, cwd=images.parent)
    assert "5 bad images left out: see summary.json" in out
    run_folder = images.parent / "out"
    named = json.loads((run_folder / "summary.json").read_text())["left_out"]
    assert named == sorted(str(file.relative_to(images.parent)) for file in [*bad, held_out])
    trained = sum(e["samples"] for e in events(run_folder) if e["event"] == "commit")
    assert trained == 3 * (48 + 1 - 4)
    succeed("hdb", "report", "out", cwd=images.parent)
    page = (run_folder / "report.html").read_text()
    assert "5 bad images left out" in page
    assert "images/train/cat/99.png" in page


def test_an_image_that_vanishes_is_left_out_on_request(images: Path) -> None:
    here = images.parent
    training = Job(*TRAIN, *IMAGES, *LONG, *sets("data.on_bad_image=skip"), ranks=3, cwd=here)
    training.until(lambda: len(checkpoints(here / "out")) > 1)
    (images / "train" / "ant" / "05.jpg").unlink()
    training.until(lambda: any(event["event"] == "left_out" for event in events(here / "out")))
    training.signal(signal.SIGUSR1)
    training.end()
    left_out = [event for event in events(here / "out") if event["event"] == "left_out"]
    assert [event["file"] for event in left_out] == ["images/train/ant/05.jpg"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: (root / "train/dog").mkdir(), "class folder images/train/dog has no images"),
        (
            lambda root: (root / "val/bee").rename(root / "val/bees"),
            "the classes differ: bee only for training; bees only held out; make train/ and val/",
        ),
        (
            lambda root: (root / "val").rename(root / "elsewhere"),
            "images has no val/ or test/ folder: expected images/val/<class>/<image>",
        ),
    ],
    ids=["a class without images", "other classes held out", "no images held out"],
)
def test_a_data_set_that_does_not_fit_is_refused(
    images: Path, change: Callable[[Path], object], told: str
) -> None:
    change(images)
    refused(*SIMULATE, *IMAGES, told=told, cwd=images.parent)


# ---- run folders ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the run ``out``, which Ctrl-C has ended, and what was printed then."""
    here = tmp_path_factory.mktemp("interrupted")
    write_configuration(here)
    training = Job(*SIMULATE, *LONG, cwd=here)
    training.until(lambda: len(checkpoints(here / "out")) > 1)
    training.signal(signal.SIGINT)
    ending = training.end()
    assert (ending.status, ending.lines) == (130, [])
    return here, ending.out


@pytest.fixture
def copy(interrupted: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(interrupted[0], tmp_path / "copy"))


def test_an_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(
    interrupted: tuple[Path, str],
) -> None:
    here, printed = interrupted
    assert printed.endswith("hdb train --resume out\n")
    assert_whole(here / "out")
    assert events(here / "out")[-1]["event"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_processes_that_decode_do_not_hear_the_signal(images: Path, number: int) -> None:
    here = images.parent
    training = Job(*SIMULATE, *IMAGES, *LONG, *sets("data.threads=1"), cwd=here)
    training.until(lambda: len(checkpoints(here / "out")) > 1)
    training.signal(number)
    ending = training.end()
    assert (ending.status, ending.lines) == (128 + number, [])


def test_simulated_workers_leave_after_the_step_they_are_in(here: Path) -> None:
    """Each of the two would sleep for five seconds more in its round."""
    slow = sets("model.name=mine:sleepy", "schedule.large_batch=[6]", "plan.small_workers=0")
    training = Job(*SIMULATE, *slow, cwd=here)
    training.until(lambda: (here / "out" / "events.jsonl").exists())
    training.signal(signal.SIGTERM)
    asked = time.monotonic()
    ending = training.end()
    assert (ending.status, ending.lines) == (128 + signal.SIGTERM, [])
    assert time.monotonic() - asked < 4
    assert [event["event"] for event in events(here / "out")][-3:] == [
        "leave",
        "leave",
        "interrupted",
    ]


def test_an_interrupt_of_mpirun_leaves_a_checkpoint(here: Path) -> None:
    """mpirun passes nothing on that a rank prints from then on."""
    training = Job(*TRAIN, *LONG, ranks=3, cwd=here)
    training.until(lambda: len(checkpoints(here / "out")) > 1)
    training.signal(signal.SIGINT)
    ending = training.end()
    assert (ending.status != 0, ending.lines) == (True, [])
    assert_whole(here / "out")


def rate_in_plan(out: Path) -> None:
    """Another learning rate, where it would count for nothing."""
    plan = json.loads((out / "plan.json").read_text())
    plan["stages"][0]["learning_rate"] = 0.01
    (out / "plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda out: (out / "config.toml").write_bytes(b"\xff\xfe"), "config.toml is damaged"),
        (lambda out: cut(out / "plan.json"), "out/plan.json is damaged (JSONDecodeError"),
        (lambda out: (out / "plan.json").write_text("[]"), "out/plan.json is damaged (TypeErr"),
        (lambda out: (out / "plan.json").unlink(), "out/plan.json is missing"),
        (rate_in_plan, "out/plan.json has other learning rates than out/config.toml, whose [sche"),
        (lambda out: [cut(path) for path in checkpoints(out)], "no older whole one"),
    ],
    ids=[
        "settings of bytes",
        "plan cut",
        "plan a list",
        "plan gone",
        "plan's rates",
        "checkpoints cut",
    ],
)
def test_a_damaged_run_folder_is_refused_as_it_is(
    copy: Path, damage: Callable[[Path], object], told: str
) -> None:
    damage(copy / "out")
    before = contents(copy) | {"out/.lock": b""}
    refused("hdb", "simulate", "--resume", "out", told=told, cwd=copy)
    assert contents(copy) | {"out/.lock": b""} == before


def test_a_checkpoint_of_another_model_is_refused(copy: Path) -> None:
    settings = copy / "out" / "config.toml"
    settings.write_text(settings.read_text().replace("mine:net", "resnet8"))
    told = "belongs to another model than out/config.toml makes now: undo what has changed since"
    refused("hdb", "train", "--resume", "out", told=told, ranks=3, cwd=copy)
    assert_whole(copy / "out")


def test_where_the_newest_checkpoint_is_cut_short_the_one_before_counts(copy: Path) -> None:
    before, newest = checkpoints(copy / "out")
    cut(newest)
    done = run("hdb", "evaluate", "out", cwd=copy)
    assert done.stdout.startswith(f"out/checkpoint/{before.name}: accuracy")
    assert done.stderr == (
        f"out/checkpoint/{newest.name} cannot be used (it is cut short, or no file of hpc-hdb): "
        f"going on with {before.name}\n"
    )


def test_a_folder_that_holds_a_run_is_not_begun_again(copy: Path) -> None:
    before = contents(copy)
    told = "out already holds a run: go on with it by --resume out, or choose another run.output"
    refused(*TRAIN, told=told, ranks=3, cwd=copy)
    assert contents(copy) == before


def test_a_folder_whose_run_was_killed_before_it_began_is_free(copy: Path) -> None:
    """The plan is written, and the settings not yet."""
    for path in (copy / "out").rglob("*"):
        if path.is_file() and path.name not in ("plan.json", ".lock"):
            path.unlink()
    (copy / "out" / "checkpoint").rmdir()
    (copy / "out" / "config.toml.part").write_text("[data]\nsou")
    told = "out is not a run folder: it has no config.toml"
    refused("hdb", "simulate", "--resume", "out", told=told, cwd=copy)
    succeed(*SIMULATE, cwd=copy)
    assert json.loads((copy / "out" / "summary.json").read_text())["state"] == "finished"
    assert not list((copy / "out").rglob("*.part"))


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(here: Path) -> None:
    first = Job(*SIMULATE, *sets("schedule.epochs=200"), cwd=here)
    first.until((here / "out" / "config.toml").exists)
    first.signal(signal.SIGSTOP)
    before = contents(here)
    told = f"out is in use by a run (process {first.process.pid} on "
    refused(*TRAIN, told=told, ranks=3, cwd=here)
    refused("hdb", "train", "--resume", "out", told=told, cwd=here)
    assert contents(here) == before
    first.signal(signal.SIGCONT)
    assert first.end().status == 0


def test_a_killed_run_leaves_no_lock_and_no_process(images: Path) -> None:
    here = images.parent
    killed = Job(*SIMULATE, *IMAGES, *LONG, *sets("data.threads=1"), cwd=here)
    killed.until(lambda: checkpoints(here / "out"))
    killed.process.kill()
    ending = killed.end()
    assert (ending.lines, ending.seconds) == ([], 0)
    again = Job("hdb", "simulate", "--resume", "out", cwd=here)
    again.until(lambda: any(event["event"] == "resume" for event in events(here / "out")))
    again.signal(signal.SIGINT)
    assert again.end().status == 130


# ---- disks ------------------------------------------------------------------------------------


def test_a_full_disk_is_told_once_and_the_run_goes_on_later(
    here: Path, disk: Callable[[str], Path]
) -> None:
    out = disk("size=3m") / "out"
    ending = Job(*TRAIN, *BIG, *sets(f"run.output={out}"), ranks=3, cwd=here).end()
    assert_refusal(ending, f"run folder {out}: No space left on device", "make room there, then go")
    assert_whole(out)
    disk("remount,size=64m")
    succeed("hdb", "train", "--resume", out, ranks=3, cwd=here)


def test_a_disk_that_cannot_be_written_is_refused(here: Path, disk: Callable[[str], Path]) -> None:
    told = "cannot use the run folder disk/out: Read-only file system (disk/out): choose a run."
    disk("ro")
    refused(*TRAIN, *sets("run.output=disk/out"), told=told, ranks=3, cwd=here)


def test_a_disk_without_room_for_a_run_is_refused(here: Path, disk: Callable[[str], Path]) -> None:
    told = "cannot use the run folder disk/out: No space left on device"
    folder = disk("size=4k")
    refused(*SIMULATE, *sets("run.output=disk/out"), told=told, cwd=here)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kilobytes", [2, 200], ids=["events", "checkpoints"])
def test_a_file_that_may_not_grow_is_told(here: Path, kilobytes: int) -> None:
    words = " ".join([*SIMULATE, *BIG])
    done = run("bash", "-c", f"ulimit -f {kilobytes}; exec {words}", cwd=here)
    assert done.returncode == 2
    assert done.stderr == (
        "hdb: run folder out: File too large: raise the limit on file sizes (ulimit -f), then go "
        "on with hdb train --resume out\n"
    )
    assert checkpoints(here / "out") == []
    assert not list((here / "out").rglob("*.part")), "they take room for nothing"
    succeed("hdb", "simulate", "--resume", "out", cwd=here)
