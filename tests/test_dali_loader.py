"""The DALI loader: the same batches as the torch loader, and its failures in the user's words."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed: its loader was not tested")

from dali_pipelines.augmentation import PLAIN, STD, Augmentation
from dali_pipelines.classification import Form
from dali_pipelines.feed import Feed
from hpc_hdb.config import Data
from hpc_hdb.errors import BadImage, UserError
from hpc_hdb.train.dali_loader import DaliLoader
from hpc_hdb.train.data import ImageArray, ImageFiles, scan_folder
from hpc_hdb.train.folders import IMAGE_SUFFIXES
from hpc_hdb.train.loader import TorchLoader, make_loader

CPU = torch.device("cpu")
LEVEL = 1 / (255 * min(STD))
"""One of 256 levels of brightness after normalisation."""
FORMATS: list[tuple[str, str, dict]] = [
    ("baseline.jpg", "RGB", {"quality": 90}),
    ("progressive.jpg", "RGB", {"quality": 90, "progressive": True}),
    ("grey.jpg", "L", {"quality": 90}),
    ("cmyk.jpg", "CMYK", {"quality": 90}),
    ("lossless.png", "RGB", {}),
    ("transparent.png", "RGBA", {}),
    ("really_png.jpg", "RGB", {"format": "PNG"}),
]
RARER_FORMATS: list[tuple[str, str, dict]] = [
    ("a.bmp", "RGB", {}),
    ("a.webp", "RGB", {"quality": 90}),
    ("a.tif", "RGB", {}),
    ("packed.tiff", "L", {"compression": "tiff_lzw"}),
    ("cmyk.tif", "CMYK", {}),
    ("a.jp2", "RGB", {}),
    ("a.ppm", "RGB", {}),
    ("a.pgm", "L", {}),
    ("a.pbm", "1", {}),
    ("a.pnm", "RGB", {}),
]
SIZES = [(48, 48), (60, 49), (45, 71), (31, 40)]  # not twice 32: Pillow would decode at half size


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Soft coloured blobs; each seed's its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Two classes, each of every format in every size: 56 files."""
    for seed, (name, mode, options) in enumerate(FORMATS * len(SIZES) * 2):
        path = tmp_path / f"class{seed % 2}" / f"{seed:02d}_{name}"
        path.parent.mkdir(exist_ok=True)
        size = SIZES[seed // len(FORMATS) % len(SIZES)]
        picture(*size, seed).convert(mode).save(path, **options)
    rotated = Image.Exif()
    rotated[0x112] = 6  # a camera held sideways, which Pillow does not put right
    picture(40, 60, 99).save(tmp_path / "class0" / "exif.jpg", quality=90, exif=rotated)
    return scan_folder(tmp_path)


def collect(
    loader: DaliLoader | TorchLoader,
    indices: np.ndarray,
    sizes: list[int],
    seed: int = 0,
    side: int = 32,
) -> tuple:
    """All images and labels of a round."""
    batches = list(loader.batches(indices, sizes, side, seed))
    assert [len(labels) for _, labels in batches] == sizes
    shapes = [tuple(images.shape) for images, _ in batches]
    assert shapes == [(size, 3, side, side) for size in sizes]
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def shuffled(files: ImageFiles, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(files.paths))


@pytest.mark.parametrize("side", [32, 113])  # DALI resizes, torch does
@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_gives_what_torch_gives(files: ImageFiles, threads: int, side: int) -> None:
    indices, sizes = shuffled(files), [15, 14, 14, 14]
    images, labels = collect(DaliLoader(files, threads, PLAIN, CPU), indices, sizes, side=side)
    torchs = TorchLoader(files, 0, PLAIN, CPU)
    expected, expected_labels = collect(torchs, indices, sizes, side=side)
    assert images.dtype == torch.float32
    assert torch.equal(labels, expected_labels)
    errors = (images - expected).abs().mean(dim=(1, 2, 3))
    worst = files.paths[indices[errors.argmax()]]
    assert errors.max() < LEVEL, worst


@pytest.mark.parametrize("how", [PLAIN, Augmentation(flip=True, rotation=0, zoom=0, crop_area=0.5)])
def test_every_suffix_of_images_is_decoded_as_torch_does(tmp_path: Path, how: Augmentation) -> None:
    for seed, (name, mode, options) in enumerate(RARER_FORMATS):
        path = tmp_path / "one" / name
        path.parent.mkdir(exist_ok=True)
        picture(60, 49, seed).convert(mode, dither=Image.Dither.NONE).save(path, **options)
    files = scan_folder(tmp_path)
    suffixes = {Path(path).suffix for path in files.paths}
    assert suffixes | {".jpg", ".jpeg", ".png"} == set(IMAGE_SUFFIXES)
    indices, sizes = np.arange(len(files.paths)), [len(files.paths)]
    images, _ = collect(DaliLoader(files, 1, how, CPU), indices, sizes)
    expected, _ = collect(TorchLoader(files, 0, how, CPU), indices, sizes)
    errors = (images - expected).abs().mean(dim=(1, 2, 3))
    assert errors.max() < LEVEL, files.paths[errors.argmax()]


@pytest.mark.parametrize("make", [DaliLoader, TorchLoader])
def test_a_tiff_that_is_to_be_turned_is_refused_by_both(
    tmp_path: Path, make: Callable[..., DaliLoader | TorchLoader]
) -> None:
    """Which Pillow would turn, and DALI not; and crops would be of the wrong side."""
    (tmp_path / "one").mkdir()
    picture(40, 60, 1).save(tmp_path / "one/turned.tif", tiffinfo={0x112: 6})
    files = scan_folder(tmp_path)
    with pytest.raises(BadImage, match=r"turned\.tif: its orientation tag turns it: save it"):
        list(make(files, 0, PLAIN, CPU).batches(np.arange(1), [1], 32, 0))


def test_augmentation_maps_images_as_torch_does(files: ImageFiles) -> None:
    """Away from the border, which the loaders fill differently, the same seed looks the same."""
    indices, sizes = shuffled(files), [19, 19, 19]
    images, _ = collect(DaliLoader(files, 1, Augmentation(), CPU), indices, sizes, seed=7)
    expected, _ = collect(TorchLoader(files, 0, Augmentation(), CPU), indices, sizes, seed=7)
    errors = (images - expected)[:, :, 8:24, 8:24].abs().mean(dim=(1, 2, 3))
    assert errors.max() < LEVEL


@pytest.mark.parametrize(
    ("how", "side"), [(Augmentation(), 32), (Augmentation(True, 0, 0, 0.2), 113)]
)
def test_seed_decides_the_augmentation(files: ImageFiles, how: Augmentation, side: int) -> None:
    indices, sizes = shuffled(files), [29, 28]
    loader = DaliLoader(files, 1, how, CPU)
    first, _ = collect(loader, indices, sizes, 1, side)
    other, _ = collect(loader, indices, sizes, 2, side)
    again, _ = collect(loader, indices, sizes, 1, side)
    elsewhere, _ = collect(DaliLoader(files, 2, how, CPU), indices, sizes, 1, side)
    assert torch.equal(first, again)
    assert torch.equal(first, elsewhere)
    assert ((first - other).abs().mean(dim=(1, 2, 3)) > LEVEL).sum() > len(indices) / 2


@pytest.mark.parametrize(
    "augmentation", [PLAIN, Augmentation(flip=False, rotation=0, zoom=0, crop_area=1)]
)
def test_nothing_random_without_augmentation(files: ImageFiles, augmentation: Augmentation) -> None:
    indices, sizes = shuffled(files), [29, 28]
    loader = DaliLoader(files, 1, augmentation, CPU)
    first, _ = collect(loader, indices, sizes, seed=1)
    other, _ = collect(loader, indices, sizes, seed=2)
    plain, _ = collect(DaliLoader(files, 1, PLAIN, CPU), indices, sizes)
    assert torch.equal(first, other)
    assert torch.allclose(first, plain, atol=1e-4)


@pytest.mark.parametrize("side", [32, 113])
def test_flip_alone_mirrors_about_half_of_the_images(files: ImageFiles, side: int) -> None:
    indices, sizes = shuffled(files), [29, 28]
    loader = DaliLoader(files, 1, Augmentation(flip=True, rotation=0, zoom=0), CPU)
    images, _ = collect(loader, indices, sizes, seed=3, side=side)
    plain, _ = collect(DaliLoader(files, 1, PLAIN, CPU), indices, sizes, side=side)
    # Torch resizes bytes, whose rounding may fall to the other side.
    close = partial(torch.allclose, atol=1e-3 if side == 32 else 1.01 * LEVEL)
    same = [close(a, b) for a, b in zip(images, plain, strict=True)]
    mirrored = [close(a, b.flip(2)) for a, b in zip(images, plain, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 15 < sum(mirrored) < 42


def test_resolution_switches_back_and_forth(files: ImageFiles) -> None:
    indices = shuffled(files)[:12]
    loader = DaliLoader(files, 1, Augmentation(), CPU)
    reference = {}
    for resolution in (24, 32, 40, 24, 32, 40):
        loader.prepare(resolution, 6)
        images = torch.cat([images for images, _ in loader.batches(indices, [6, 6], resolution, 5)])
        assert images.shape == (12, 3, resolution, resolution)
        assert torch.equal(images, reference.setdefault(resolution, images))


def test_the_next_pipeline_is_built_during_the_round_before(files: ImageFiles) -> None:
    """Beside the one in use, and no other is kept."""

    def feeds() -> set[int]:
        return {id(thing) for thing in gc.get_objects() if type(thing) is Feed}

    gc.collect()
    before = feeds()
    indices = shuffled(files)[:12]
    loader = DaliLoader(files, 1, Augmentation(), CPU)
    list(loader.batches(indices, [6, 6], 40, 0))
    loader.expect(24, 7)
    list(loader.batches(indices, [6, 6], 32, 0))
    deadline = time.monotonic() + 20
    while len(feeds() - before) < 2:
        assert time.monotonic() < deadline, "nothing is built before it is asked for"
        time.sleep(0.01)
    built = feeds() - before
    loader.prepare(24, 7)
    assert feeds() - before == built
    [(images, _)] = loader.batches(indices[:7], [7], 24, 3)
    assert feeds() - before == built
    [(expected, _)] = DaliLoader(files, 1, Augmentation(), CPU).batches(indices[:7], [7], 24, 3)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("sizes", [[1], [3], [9], [5, 4], [2] * 5, [1] * 12])
def test_batches_larger_than_prepared_for(files: ImageFiles, sizes: list[int]) -> None:
    indices = shuffled(files)[: sum(sizes)]
    loader = DaliLoader(files, 1, Augmentation(), CPU)
    loader.prepare(32, 2)
    _, labels = collect(loader, indices, sizes)
    assert labels.tolist() == files.labels[indices].tolist()


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_an_abandoned_round_leaves_nothing_behind(files: ImageFiles, taken: int) -> None:
    indices, sizes = shuffled(files)[:20], [4] * 5
    expected, expected_labels = collect(
        DaliLoader(files, 1, Augmentation(), CPU), indices, sizes, seed=1
    )
    loader = DaliLoader(files, 1, Augmentation(), CPU)
    abandoned = loader.batches(shuffled(files, 1)[:20], sizes, 32, 2)
    for _ in range(taken):
        next(abandoned)
    for _ in range(2):
        images, labels = collect(loader, indices, sizes, seed=1)
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


def test_batches_stay_as_they_were_given(files: ImageFiles) -> None:
    batches = DaliLoader(files, 1, PLAIN, CPU).batches(shuffled(files), [19, 19, 19], 32, 0)
    first, _ = next(batches)
    copy = first.clone()
    for _ in batches:
        assert torch.equal(first, copy)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def write_text(path: Path) -> None:
    path.write_text("this is no image\n" * 20)


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2:300] = bytes(298)
    path.write_bytes(content)


def to_gif(path: Path) -> None:
    picture(40, 40, 0).save(path, format="GIF")


BREAKAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "truncated"),
    (write_text, "not an image"),
    (corrupt, "bring a good copy of it"),
    (lambda path: path.write_bytes(b""), "not an image"),
    (to_gif, 'data.loader to "torch"'),
    (Path.unlink, "vanished"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKAGES)
@pytest.mark.parametrize("position", [0, 13])
def test_an_unreadable_file_is_named(
    files: ImageFiles, damage: Callable[[Path], None], message: str, position: int
) -> None:
    indices, sizes = shuffled(files)[:20], [5] * 4
    culprit = files.paths[indices[position]]
    damage(Path(culprit))
    loader = DaliLoader(files, 1, Augmentation(), CPU)
    with pytest.raises(UserError) as caught:
        list(loader.batches(indices, sizes, 32, 0))
    assert culprit in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    readable = np.delete(indices, position)
    _, labels = collect(loader, readable, [10, 9])
    assert labels.tolist() == files.labels[readable].tolist()


@pytest.mark.parametrize("bad", [[0], [3, 4, 7], [5, 6, 7, 8, 9], [19]])
@pytest.mark.parametrize("damage", [truncate, write_text, Path.unlink])
def test_unreadable_files_are_left_out(
    files: ImageFiles, damage: Callable[[Path], None], bad: list[int]
) -> None:
    """The others come as if nothing had happened, with their own labels and changes."""
    indices, sizes = shuffled(files)[:20], [5] * 4
    whole, labels = collect(DaliLoader(files, 2, Augmentation(), CPU), indices, sizes)
    for position in bad:
        damage(Path(files.paths[indices[position]]))
    loader = DaliLoader(files, 2, Augmentation(), CPU, skip=True)
    left = np.delete(np.arange(20), bad)
    for _ in range(2):  # the second time they are known
        batches = list(loader.batches(indices, sizes, 32, 0))
        assert torch.equal(torch.cat([images for images, _ in batches]), whole[left])
        assert torch.equal(torch.cat([of for _, of in batches]), labels[left])
    assert sorted(loader.left_out) == sorted(indices[bad].tolist())


def test_an_abandoned_round_with_an_unreadable_file(files: ImageFiles) -> None:
    indices = shuffled(files)[:20]
    write_text(Path(files.paths[indices[5]]))
    loader = DaliLoader(files, 1, PLAIN, CPU)
    abandoned = loader.batches(indices, [5] * 4, 32, 0)
    next(abandoned)
    _, labels = collect(loader, indices[10:], [5, 5])
    assert labels.tolist() == files.labels[indices[10:]].tolist()


def pixels(count: int = 6, side: int = 20) -> ImageArray:
    """Images in memory."""
    images = [np.asarray(picture(side, side, seed)) for seed in range(count)]
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return ImageArray(["a", "b"], np.arange(count) % 2, stacked)


CROPPED = Augmentation(rotation=0, zoom=0, crop_area=0.2)


@pytest.mark.parametrize(
    ("how", "side"), [(CROPPED, 32), (CROPPED, 113), (Augmentation(crop_area=0.5), 32)]
)
def test_random_crops_are_those_of_the_torch_loader(
    files: ImageFiles, how: Augmentation, side: int
) -> None:
    """Decoded in part only; away from the border, which rotation fills differently."""
    indices, sizes = shuffled(files), [19, 19, 19]
    images, labels = collect(DaliLoader(files, 2, how, CPU), indices, sizes, 7, side)
    expected, expected_labels = collect(TorchLoader(files, 0, how, CPU), indices, sizes, 7, side)
    plain, _ = collect(DaliLoader(files, 2, PLAIN, CPU), indices, sizes, side=side)
    assert torch.equal(labels, expected_labels)
    inner = slice(8, 24) if how.change == "warp" else slice(None)
    errors = (images - expected)[..., inner, inner].abs().mean(dim=(1, 2, 3))
    assert errors.max() < 2 * LEVEL, files.paths[indices[errors.argmax()]]
    assert ((images - plain).abs().mean(dim=(1, 2, 3)) > LEVEL).float().mean() > 0.9


@pytest.mark.parametrize("how", [PLAIN, CROPPED, Augmentation()])
def test_images_in_memory(how: Augmentation) -> None:
    """CIFAR's arrays, say: as the torch loader gives them."""
    indices, sizes = np.array([5, 1, 2, 0]), [3, 1]
    images, labels = collect(DaliLoader(pixels(), 1, how, CPU), indices, sizes, seed=3)
    expected, expected_labels = collect(TorchLoader(pixels(), 0, how, CPU), indices, sizes, seed=3)
    assert torch.equal(labels, expected_labels)
    assert (images - expected)[..., 8:24, 8:24].abs().mean() < 2 * LEVEL


@pytest.mark.parametrize("side", [24, 113])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_form_that_is_asked_for(
    files: ImageFiles, dtype: torch.dtype, channels_last: bool, side: int
) -> None:
    with ThreadPoolExecutor(1) as readers:
        form = Form(dtype=dtype, channels_last=channels_last)
        feed = Feed(form, side, 4, 1, CPU, readers)
        feed.start(iter([lambda: ([files.read(sample, side) for sample in range(4)],)]))
        images = feed.next()
    assert images.dtype == dtype
    assert images.shape == (4, 3, side, side)
    assert images.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    (expected, _), *_ = DaliLoader(files, 1).batches(np.arange(4), [4], side, 0)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(images.float(), expected, rtol=tolerance, atol=tolerance)


def test_make_loader(files: ImageFiles) -> None:
    """DALI where it is asked for, or where a GPU waits for files."""
    cuda = torch.device("cuda", 0)
    assert isinstance(make_loader(files, Data(loader="dali"), PLAIN, CPU), DaliLoader)
    assert isinstance(make_loader(files, Data(loader="auto"), PLAIN, cuda), DaliLoader)
    assert isinstance(make_loader(files, Data(loader="auto"), PLAIN, CPU), TorchLoader)
    assert isinstance(make_loader(files, Data(loader="torch"), PLAIN, cuda), TorchLoader)
    assert isinstance(make_loader(pixels(), Data(loader="auto"), PLAIN, cuda), TorchLoader)
    assert isinstance(make_loader(pixels(), Data(loader="dali"), PLAIN, CPU), DaliLoader)


def test_on_a_gpu_dali_decodes_with_the_cores_that_training_leaves(files: ImageFiles) -> None:
    before, cuda = torch.get_num_threads(), torch.device("cuda", 0)
    torch.set_num_threads(5)
    try:
        chosen = [
            make_loader(files, Data(loader="dali", threads=threads), PLAIN, device)._threads
            for threads, device in [(0, cuda), (2, cuda), (0, CPU), (2, CPU)]
        ]
    finally:
        torch.set_num_threads(before)
    assert chosen == [4, 2, 1, 2]
