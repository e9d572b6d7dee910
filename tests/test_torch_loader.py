"""The torch loader: the samples asked for, in order, whichever process decodes them."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipelines.augmentation import PLAIN, Augmentation, crop_boxes
from hpc_hdb.config import Data, Settings
from hpc_hdb.errors import UserError
from hpc_hdb.run.build import note_loading
from hpc_hdb.train.augment import normalise
from hpc_hdb.train.data import ImageArray, ImageFiles, open_data
from hpc_hdb.train.loader import TorchLoader, draws_of, make_loader

CPU = torch.device("cpu")

BROKEN = 5
"""Position of the image that cannot be decoded, among those of `loaders`."""

AUGMENTED = Augmentation(flip=True, rotation=18, zoom=0.25)


@pytest.fixture(scope="module")
def loaders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TorchLoader]:
    """Loaders of the same twelve files, by the number of processes that decode for them."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(8)
    paths = [folder / f"{number:02d}.jpg" for number in range(12)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    paths[BROKEN].write_text("no image")
    files = ImageFiles(["a", "b", "c"], np.arange(12) % 3, [str(path) for path in paths])
    return {processes: TorchLoader(files, processes, AUGMENTED, CPU) for processes in (0, 1)}


def indexed_images(count: int = 10) -> ImageArray:
    """Images whose every pixel is their position in the data set."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 4, 4)
    return ImageArray(["even", "odd"], np.arange(count) % 2, images)


@pytest.mark.parametrize("resolution", [4, 8])
@pytest.mark.parametrize(
    ("indices", "sizes"),
    [([3, 1, 4, 0, 5], [2, 2, 1]), ([9], [1]), ([7, 7, 2], [3]), (list(range(10)), [4, 3, 3])],
)
def test_a_loader_gives_the_samples_in_the_order_and_batches_asked_for(
    indices: list[int], sizes: list[int], resolution: int
) -> None:
    loader = make_loader(indexed_images(), Data(loader="torch"), PLAIN, CPU)
    batches = list(loader.batches(np.array(indices), sizes, resolution, seed=0))
    assert [len(images) for images, _ in batches] == sizes
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert labels.tolist() == [index % 2 for index in indices]
    assert labels.dtype == torch.int64
    asked = torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1)
    assert torch.equal(images, normalise(asked.expand(-1, 3, resolution, resolution)))


def test_a_loader_goes_from_round_to_round_and_resolution_to_resolution() -> None:
    loader = TorchLoader(indexed_images(), 0, PLAIN, CPU)
    for indices, resolution in (([1, 2], 4), ([3, 4, 5], 8), ([0], 4)):
        [(images, labels)] = loader.batches(np.array(indices), [len(indices)], resolution, 0)
        assert images.shape == (len(indices), 3, resolution, resolution)
        assert labels.tolist() == [index % 2 for index in indices]


def test_without_augmentation_the_seed_changes_nothing() -> None:
    data = open_data(Data(source="synthetic", synthetic_samples=10), "train")
    loader = TorchLoader(data, 0, PLAIN, CPU)
    [(first, _)], [(second, _)] = (loader.batches(np.arange(4), [4], 32, s) for s in (1, 2))
    assert torch.equal(first, second)
    assert torch.equal(first, normalise(data.images[:4]))


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_another_process_decodes_the_same_batches(loaders: dict[int, TorchLoader]) -> None:
    for indices, sizes, resolution, seed in (
        ([11, 0, 3, 7, 2], [2, 2, 1], 16, 1),
        ([1, 2, 3], [3], 24, 2),
        ([1, 2, 3], [3], 24, 3),
    ):
        alone, beside = (
            list(loaders[processes].batches(np.array(indices), sizes, resolution, seed))
            for processes in (0, 1)
        )
        assert_same(alone, beside)


@pytest.mark.parametrize("processes", [0, 1])
def test_the_same_seed_gives_the_same_batches(
    loaders: dict[int, TorchLoader], processes: int
) -> None:
    first, again, other = (
        list(loaders[processes].batches(np.array([0, 1, 2]), [2, 1], 16, seed))
        for seed in (1, 1, 2)
    )
    assert_same(first, again)
    assert not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize("processes", [0, 1])
def test_a_round_that_is_given_up_leaves_nothing_behind(
    loaders: dict[int, TorchLoader], processes: int
) -> None:
    given_up = loaders[processes].batches(np.arange(5), [1] * 5, 16, 1)
    next(given_up)
    batches = list(loaders[processes].batches(np.array([9, 8, 7]), [1, 2], 16, 2))
    assert_same(batches, list(loaders[0].batches(np.array([9, 8, 7]), [1, 2], 16, 2)))


@pytest.mark.parametrize("processes", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_by_any_process(
    loaders: dict[int, TorchLoader], processes: int
) -> None:
    batches = loaders[processes].batches(np.array([0, BROKEN, 1]), [1, 1, 1], 16, 1)
    next(batches)
    with pytest.raises(UserError) as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert f"/{BROKEN:02d}.jpg: not an image" in str(caught.value)
    assert len(list(loaders[processes].batches(np.array([2]), [1], 16, 1))) == 1


def test_random_crops_are_those_that_were_drawn(loaders: dict[int, TorchLoader]) -> None:
    """Of files as Pillow cuts and resizes them; of images in memory nearly so."""
    how = Augmentation(False, 0, 0, crop_area=0.3)
    side, resolution, sizes, seed = 40, 24, [3, 2], 4
    coarse = torch.rand(5, 3, 5, 5, generator=torch.Generator().manual_seed(3)) * 255
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    data = ImageArray(["a"], np.zeros(5, dtype=np.int64), images.clamp(0, 255).to(torch.uint8))
    loader = TorchLoader(data, 0, how, CPU)
    given = torch.cat([batch for batch, _ in loader.batches(np.arange(5), sizes, resolution, seed)])
    crops = np.concatenate([drawn.crops for drawn in draws_of(how, sizes, seed)])
    for number, box in enumerate(crop_boxes(crops, np.full((5, 2), side)).tolist()):
        top, left, tall, wide = box
        picture = Image.fromarray(data.read(number, resolution))
        box = (left, top, left + wide, top + tall)
        cut = picture.resize((resolution, resolution), Image.Resampling.BILINEAR, box)
        expected = normalise(torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None])
        # Pillow smooths where it reduces; the sampling of images in memory does not.
        assert (given[number] - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("installed", "encoded", "device", "loader", "told"),
    [
        (False, True, "cuda", "auto", True),
        (True, True, "cuda", "auto", False),
        (False, False, "cuda", "auto", False),
        (False, True, "cpu", "auto", False),
        (False, True, "cuda", "torch", False),
    ],
)
def test_where_dali_would_be_faster_its_absence_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    encoded: bool,
    device: str,
    loader: str,
    told: bool,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    files = ImageFiles(["a"], np.zeros(1, dtype=np.int64), ["a.jpg"])
    data = files if encoded else indexed_images()
    settings = Settings(data=Data(loader=loader))
    notes: list[str] = []
    note_loading(data, settings, torch.device(device), notes.append)
    assert len(notes) == told
    assert all("slower" in note and "hpc-hdb[dali]" in note for note in notes)
