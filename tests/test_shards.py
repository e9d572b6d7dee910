"""Packed image folders: what ``hdb pack`` writes is whole, readable by others, and trains."""

from __future__ import annotations

import gc
import io
import json
import shutil
import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import events, succeed
from endings import SIMULATE, TRAIN, Job, contents, refused, sets, write_bomb
from PIL import Image

from dali_pipelines.augmentation import Augmentation
from dali_pipelines.shards import ShardError, Shards

SHARDS = sets("data.source=shards", "data.path=packed")


def picture(seed: int, size: tuple[int, int] = (60, 48)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def here(here: Path) -> Path:
    """With ``images`` as well: 3 classes of 20, and 6 held out."""
    for split, count in (("train", 20), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = here / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture(100 * label + number).save(folder / f"{number:02d}.jpg")
    return here


def pack(here: Path, *options: str) -> str:
    return succeed("hdb", "pack", "images", "packed", *options, cwd=here)


def test_the_originals_are_packed_byte_for_byte(here: Path) -> None:
    out = pack(here, "--per-shard", "16")
    assert "packed/train: 60 images, 4 shards" in out
    shards = Shards(here / "packed/train")
    assert shards.classes == ["ant", "bee", "cat"]
    assert np.bincount(shards.labels).tolist() == [20, 20, 20]
    seen = set()
    for sample, label in enumerate(shards.labels):
        file = shards.name(sample, 32).partition(" in ")[0]
        assert file.split("/")[0] == shards.classes[label]
        assert shards.read(sample, 32).tobytes() == (here / "images/train" / file).read_bytes()
        seen.add(file)
    assert len(seen) == 60
    assert sorted(shards.labels) != list(shards.labels), "the classes are not mixed"


def test_a_crop_comes_from_the_smallest_copy_that_has_its_pixels(here: Path) -> None:
    """Whose crop then looks like that of the original."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from dali_pipelines.cyclic import Cycle, CyclicLoader

    pack(here, "--side", "20", "--side", "30", "--side", "40")

    class Watched(Shards):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.used: set[str] = set()

        def read(self, sample: int, side: int) -> np.ndarray:
            self.used.add(self.variant(side))
            return super().read(sample, side)

    packed, originals = Watched(here / "packed/train"), Watched(here / "packed/train")
    originals.sides = []
    how = Augmentation(rotation=0, zoom=0, crop_area=0.1)
    cycles = [Cycle(0, 1, 16, 20)]
    batches, expected = (
        torch.cat(
            [images for _, _, images, _ in CyclicLoader(data, cycles, augmentation=how).batches()]
        )
        for data in (packed, originals)
    )
    assert packed.used == {"20", "30", "40", "original"}
    assert originals.used == {"original"}
    assert (batches - expected).abs().mean() < 0.15  # 8 of 255 levels
    assert (batches - expected.flip(0)).abs().mean() > 0.5


def test_many_threads_open_a_shard_at_once(here: Path) -> None:
    """Each may have opened it for itself: none's file is closed under its hands."""
    pack(here)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(100):
            shards = Shards(here / "packed/train")
            read = threads.map(lambda sample, of=shards: of.read(sample, 32), range(16))
            assert all(image.size for image in read)


def test_many_threads_need_an_index_at_once(here: Path) -> None:
    """Also where Python tidies up, and so changes threads, while it parses an index's header."""
    pack(here, "--side", "20", "--side", "30", "--side", "40")

    def change_threads(*_: object) -> None:
        time.sleep(0)

    usual = gc.get_threshold()
    gc.callbacks.append(change_threads)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(8) as threads:
            for _ in range(100):
                shards = Shards(here / "packed/train")
                read = threads.map(lambda side, of=shards: of.read(0, side), [8, 25, 35, 99] * 4)
                assert all(image.size for image in read)
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(change_threads)


def test_other_tools_read_the_shards(here: Path) -> None:
    """DALI's own WebDataset reader with the index, and plain tar."""
    pipeline = pytest.importorskip("nvidia.dali.pipeline", reason="DALI is not installed")
    from nvidia.dali import fn

    pack(here, "--per-shard", "16")
    shards = Shards(here / "packed/train")
    tars = sorted((here / "packed/train/original").glob("*.tar"))

    @pipeline.pipeline_def(batch_size=60, num_threads=1, device_id=None)
    def reading() -> tuple:
        return tuple(
            fn.readers.webdataset(
                paths=[str(tar) for tar in tars],
                index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
                ext=["jpg", "cls"],
            )
        )

    images, labels = reading().run()
    assert [int(labels.at(i).tobytes()) for i in range(60)] == shards.labels.tolist()
    assert [images.at(i).tobytes() for i in range(60)] == [
        shards.read(sample, 32).tobytes() for sample in range(60)
    ]
    with tarfile.open(tars[0]) as tar:
        names = tar.getnames()
    assert len(names) == 32
    assert names[0].endswith(".jpg")
    assert names[1] == names[0].replace(".jpg", ".cls")


def test_smaller_copies_serve_the_low_resolutions(here: Path) -> None:
    picture(7, (20, 20)).save(here / "images/train/ant/tiny.png")
    pack(here, "--side", "24", "--side", "32")
    shards = Shards(here / "packed/train")
    wanted = {16: 24, 24: 24, 25: 32, 32: 32, 33: 48}
    for resolution, shorter_side in wanted.items():
        sizes = {
            min(Image.open(io.BytesIO(shards.read(sample, resolution))).size)
            for sample in range(len(shards))
        }
        assert sizes == {20, shorter_side}
    for sample in range(len(shards)):
        big, small = (
            np.asarray(
                Image.open(io.BytesIO(shards.read(sample, resolution)))
                .convert("RGB")
                .resize((12, 12), Image.Resampling.BOX),
                dtype=float,
            )
            for resolution in (48, 24)
        )
        assert np.abs(big - small).mean() < 10, "another picture"


def test_unreadable_images_are_left_out_and_listed(here: Path) -> None:
    train = here / "images/train"
    whole = (train / "ant/00.jpg").read_bytes()
    bad = {
        "ant/zero.jpg": b"",
        "bee/text.jpg": b"no image at all\n",
        "cat/cut.jpg": whole[: len(whole) // 2],
    }
    for file, data in bad.items():
        (train / file).write_bytes(data)
    write_bomb(train / "cat/huge.png")
    out = pack(here)
    assert "packed/train: 60 images, 4 left out, 1 shards" in out
    listed = dict(json.loads((here / "packed/train/manifest.json").read_text())["skipped"])
    assert set(listed) == {*bad, "cat/huge.png"}
    assert listed["cat/huge.png"].startswith("Image size (3600000000 pixels) exceeds limit")
    for file, reason in listed.items():
        assert f"left out: {file}: {reason}" in out


@pytest.mark.parametrize(("loader", "start", "ranks"), [("torch", SIMULATE, 0), ("dali", TRAIN, 3)])
def test_a_run_trains_on_shards(here: Path, loader: str, start: list[str], ranks: int) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    pack(here, "--side", "16")
    succeed(*start, *SHARDS, *sets(f"data.loader={loader}"), ranks=ranks, cwd=here)
    commits = [event for event in events(here / "out") if event["event"] == "commit"]
    assert sum(commit["samples"] for commit in commits) == 3 * 60


def test_a_killed_packing_goes_on(here: Path) -> None:
    """SIGKILL of all its processes, twice; the result is that of one that was left alone."""
    folder = here / "images/train/ant"
    for number in range(200):
        (folder / f"more{number:03d}.jpg").write_bytes((folder / "00.jpg").read_bytes())
    words = ["hdb", "pack", "images", "packed", "--per-shard", "8", "--side", "24"]
    records = here / "packed/train/parts"
    for written in (2, 12):
        job = Job(*words, cwd=here)
        job.until(lambda written=written: len(list(records.glob("0*.json"))) >= written)
        job.signal(signal.SIGKILL)
        assert job.end().status == -signal.SIGKILL
        assert not (here / "packed/train/manifest.json").exists()
        refused(*SIMULATE, *SHARDS, told="packing it has not ended", cwd=here)
    before = {path: path.stat().st_mtime_ns for path in (here / "packed/train/24").glob("*.tar")}
    assert len(before) >= 12
    assert Job(*words, cwd=here).end().status == 0
    kept = [path for path, written in before.items() if path.stat().st_mtime_ns == written]
    assert len(kept) >= 12, "whole shards were written again"
    succeed("hdb", "pack", "images", "whole", *words[4:], cwd=here)
    assert contents(here / "packed") == contents(here / "whole")


def test_verify_finds_every_kind_of_damage(here: Path) -> None:
    pack(here, "--per-shard", "16")
    assert succeed("hdb", "verify", "packed", cwd=here).endswith("packed: all shards are whole\n")
    folder = here / "packed/train/original"
    flipped = bytearray((folder / "00000.tar").read_bytes())
    flipped[700] ^= 1
    (folder / "00000.tar").write_bytes(flipped)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:-10])
    (folder / "00002.tar").unlink()
    (folder / "00003.idx").unlink()
    ending = Job("hdb", "verify", "packed", cwd=here).end()
    assert ending.status == 2
    told = ["not match its checksum", "bytes instead of", "No such file", "idx: No such file"]
    assert len(ending.lines) == 5
    for number, words in enumerate(told):
        assert f"packed/train/original/0000{number}." in ending.lines[number]
        assert words in ending.lines[number]
    assert "4 files are damaged or missing" in ending.lines[4]
    shards = Shards(here / "packed/train")
    with pytest.raises(ShardError, match=r"shorter than its index|No such file"):
        for sample in range(60):
            shards.read(sample, 32)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["images", "packed", "--side", "24"], "packed/train is packed already, from other images"),
        (["images/train", "other"], "images/train has no train/, val/ or test/ folder"),
        (["images", "images"], "images/train is not empty: pack into a new folder"),
        (["images", "new", "--no-originals"], "--no-originals leaves nothing to pack"),
        (["images", "new", "--side", "4"], "Invalid value for '--side'"),
    ],
)
def test_what_cannot_be_packed_is_refused(here: Path, words: list[str], told: str) -> None:
    pack(here)
    before = contents(here)
    refused("hdb", "pack", *words, told=told, cwd=here)
    assert contents(here) == before


def test_another_task_does_not_go_on_with_this_one(here: Path) -> None:
    folder = here / "packed/train/parts"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text("{}")
    refused("hdb", "pack", "images", "packed", told="begun with other images", cwd=here)


@pytest.mark.parametrize("ending", ["killed", "val removed", "not at all"])
def test_splits_that_are_packed_stay_when_the_command_is_started_again(
    here: Path, ending: str
) -> None:
    words = ["hdb", "pack", "images", "packed", "--per-shard", "4", "--side", "24"]
    val = here / "packed/val"
    if ending == "killed":
        for number in range(200):
            picture(number).save(here / f"images/val/ant/more{number:03d}.jpg")
        job = Job(*words, cwd=here)
        job.until(lambda: list((val / "parts").glob("0*.json")))
        job.signal(signal.SIGKILL)
        assert job.end().status == -signal.SIGKILL
        assert not (val / "manifest.json").exists()
    else:
        succeed(*words, cwd=here)
    if ending == "val removed":
        shutil.rmtree(val)
    before = contents(here / "packed/train")
    out = succeed(*words, cwd=here)
    assert "packed/train: packed already, 60 images, 15 shards" in out
    assert ("packed/val: packed already" in out) == (ending == "not at all")
    assert contents(here / "packed/train") == before
    assert succeed("hdb", "verify", "packed", cwd=here).endswith("all shards are whole\n")
    (here / "images/train/ant/another.jpg").write_bytes(b"")
    refused(*words, told="packed/train is packed already, from other images", cwd=here)


def test_a_damaged_packed_folder_does_not_train(here: Path) -> None:
    pack(here)
    (here / "packed/train/manifest.json").write_text("{")
    refused(*SIMULATE, *SHARDS, told="packed/train/manifest.json is damaged", cwd=here)
