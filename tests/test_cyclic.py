"""The cyclic loader: every sample once an epoch, at the right resolution, and no gap between."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed: its loader was not tested")

from dali_pipelines.augmentation import Augmentation
from dali_pipelines.cyclic import Cycle, CyclicLoader
from dali_pipelines.feed import Feed

HOW = Augmentation(crop_area=0.3)
CYCLES = [Cycle(0, 2, 16, 8), Cycle(2, 3, 24, 5), Cycle(3, 5, 16, 8), Cycle(5, 6, 24, 5)]


class Pictures:
    """Forty JPEG files of one colour each; a label is the picture's number."""

    encoded = True

    def __init__(self, folder: Path) -> None:
        self.labels = np.arange(40)
        self._paths = [folder / f"{label}.jpg" for label in self.labels]
        for label, path in zip(self.labels, self._paths, strict=True):
            Image.new("RGB", (40, 36), (int(label) * 6, 100, 50)).save(path, quality=95)

    def read(self, sample: int, side: int) -> np.ndarray:
        return np.fromfile(self._paths[sample], dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    return Pictures(tmp_path)


def test_every_sample_once_an_epoch_over_all_shares(pictures: Pictures) -> None:
    seen: dict[int, list[int]] = {}
    shares = [(0, 17), (17, 18), (18, 40)]
    for share in shares:
        for epoch, _, images, labels in CyclicLoader(pictures, CYCLES, share).batches():
            seen.setdefault(epoch, []).extend(labels.tolist())
            cycle = next(cycle for cycle in CYCLES if cycle.start_epoch <= epoch < cycle.end_epoch)
            assert images.shape[1:] == (3, cycle.resolution, cycle.resolution)
            assert len(images) == len(labels) <= cycle.batch
            red = (images[:, 0] * 0.229 + 0.485).mean((1, 2)) * 255 / 6
            assert (red - labels).abs().max() < 0.7, "an image has another one's label"
    assert sorted(seen) == list(range(6))
    assert all(sorted(labels) == list(range(40)) for labels in seen.values())
    assert seen[0] != seen[1]


def test_a_resumed_loader_goes_on_at_the_right_sample(pictures: Pictures) -> None:
    """The same batches, augmentation included, from any step on."""
    loader = CyclicLoader(pictures, CYCLES, (3, 30), seed=5, augmentation=HOW)
    whole = list(loader.batches())
    assert len(whole) == sum((c.end_epoch - c.start_epoch) * loader.steps(c) for c in CYCLES)
    for epoch, step in ((0, 0), (1, 3), (2, 2), (2, 5), (4, 1), (5, 5)):
        start = next(i for i, batch in enumerate(whole) if batch[:2] == (epoch, step))
        again = CyclicLoader(pictures, CYCLES, (3, 30), seed=5, augmentation=HOW)
        rest = list(again.batches(epoch, step))
        assert len(rest) == len(whole) - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert one[:2] == other[:2]
            assert torch.equal(one[2], other[2])
            assert torch.equal(one[3], other[3])


def test_another_seed_gives_other_batches(pictures: Pictures) -> None:
    one, other = (
        next(CyclicLoader(pictures, CYCLES, seed=seed, augmentation=Augmentation()).batches())
        for seed in (0, 1)
    )
    assert not torch.equal(one[3], other[3])


def test_the_next_pipeline_is_ready_when_the_resolution_changes(pictures: Pictures) -> None:
    """It has decoded its first batch by then, and never are more than two alive."""
    gc.collect()
    before = alive()
    most, changes, last = 0, 0, 16
    batches = CyclicLoader(pictures, CYCLES).batches()
    for _, _, images, _ in batches:
        most = max(most, alive() - before)
        changes += images.shape[-1] != last
        last = images.shape[-1]
    assert changes == 3
    assert most == 2
    del batches
    gc.collect()
    assert alive() == before


def alive() -> int:
    return sum(type(thing) is Feed for thing in gc.get_objects())


def test_a_read_error_reaches_the_caller(pictures: Pictures) -> None:
    pictures._paths[21].unlink()
    with pytest.raises(FileNotFoundError, match=r"21\.jpg"):
        list(CyclicLoader(pictures, CYCLES).batches())


@pytest.mark.parametrize(
    ("cycles", "share", "told"),
    [
        ([], None, "every cycle needs an epoch"),
        ([Cycle(0, 0, 16, 8)], None, "every cycle needs an epoch"),
        ([Cycle(0, 2, 16, 8), Cycle(3, 4, 24, 8)], None, "ends at epoch 2, the next starts at 3"),
        (CYCLES, (0, 41), "share 0 to 41 is not within 40 samples"),
        (CYCLES, (7, 7), "share 7 to 7"),
    ],
)
def test_what_does_not_fit_is_refused(
    pictures: Pictures, cycles: list[Cycle], share: tuple[int, int] | None, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        CyclicLoader(pictures, cycles, share)
