"""What is trained, and on what: models as flat buffers, merges, images."""

from __future__ import annotations

import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from hpc_hdb.config import Data, Model, Settings
from hpc_hdb.errors import UserError
from hpc_hdb.run.build import make_model
from hpc_hdb.train import data as data_module
from hpc_hdb.train.data import (
    ImageArray,
    ImageFiles,
    check_classes,
    open_data,
    prepare_data,
    scan_folder,
)
from hpc_hdb.train.merge import MERGES, reduction_weights
from hpc_hdb.train.model import ClassifierDropout, build_model, set_dropout
from hpc_hdb.train.parameters import FlatModel

CPU = torch.device("cpu")

torch.set_num_threads(1)  # two would wait for each other on busy cores


def small_model(classes: int = 10, name: str = "resnet8") -> nn.Module:
    torch.manual_seed(0)
    return build_model(Model(name=name), classes)


def some_images(count: int = 4, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# ---- a model as one buffer --------------------------------------------------------------------


def values(model: nn.Module) -> list[Tensor]:
    """All that travels between ranks: parameters and floating-point buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def spaced(tensors: list[Tensor]) -> Tensor:
    """One after another, each from a multiple of 256 bytes on, with zeros in between."""
    return torch.cat([nn.functional.pad(t.flatten(), (0, -t.numel() % 64)) for t in tensors])


def assert_views(flat: FlatModel) -> None:
    """The model's values are the flat vector and nothing else, laid out for any GPU kernel."""
    begin = flat.flat.data_ptr()
    for tensor in values(flat.model):
        assert tensor.data_ptr() == begin
        begin += -(-tensor.nbytes // 256) * 256
    assert begin == flat.flat.data_ptr() + flat.flat.nbytes
    assert torch.equal(flat.flat, spaced(values(flat.model)))


def test_flattening_leaves_the_model_as_it_was() -> None:
    model, images = small_model().eval(), some_images()
    before = model(images)
    flat = FlatModel(model)
    assert torch.equal(model(images), before)
    assert_views(flat)


def test_training_the_model_changes_the_buffer_and_stays_in_it() -> None:
    flat = FlatModel(small_model())
    before = flat.flat.clone()
    optimizer = torch.optim.SGD(flat.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        flat.model(some_images()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert_views(flat)
    changed = int((flat.flat != before).sum())
    assert changed > 0.9 * sum(p.numel() for p in flat.model.parameters())


def test_a_forward_pass_brings_its_batch_statistics_into_the_buffer() -> None:
    flat = FlatModel(small_model())
    before = flat.flat.clone()
    flat.model.train()(some_images())
    assert torch.equal(flat.flat[: flat.trained], before[: flat.trained])
    changed = flat.flat[flat.trained :] != before[flat.trained :]
    statistics = [buffer for buffer in flat.model.buffers() if buffer.is_floating_point()]
    assert changed.sum() == sum(buffer.numel() for buffer in statistics)


def test_writing_the_buffer_makes_one_model_the_other() -> None:
    first, second = FlatModel(small_model()), FlatModel(small_model())
    images = some_images()
    first.model.train()(images)
    second.flat.mul_(1.5)
    assert not torch.equal(second.model.eval()(images), first.model.eval()(images))
    second.flat.copy_(first.flat)
    assert torch.equal(second.model(images), first.model(images))


def test_loading_a_state_keeps_the_model_in_its_buffer() -> None:
    flat = FlatModel(small_model())
    flat.model.load_state_dict(small_model().state_dict())
    assert_views(flat)


def test_a_saved_state_is_the_models_in_one_piece(tmp_path: Path) -> None:
    flat = FlatModel(small_model())
    flat.model.train()(some_images())
    torch.save(flat.state_dict(), tmp_path / "model.pt")
    loaded, own = torch.load(tmp_path / "model.pt", weights_only=True), flat.model.state_dict()
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], value) for name, value in own.items())
    floats = [value for value in loaded.values() if value.is_floating_point()]
    assert len({value.untyped_storage().data_ptr() for value in floats}) == 1


def test_a_saved_state_holds_what_a_hook_puts_into_it() -> None:
    model = small_model()
    model.register_state_dict_post_hook(
        lambda module, state, *_: state.update({"fc.1.bias": state["fc.1.bias"] + 1})
    )
    flat = FlatModel(model)
    assert torch.equal(flat.state_dict()["fc.1.bias"], model.fc[1].bias + 1)


def test_counters_do_not_travel() -> None:
    flat = FlatModel(small_model())
    flat.model.train()(some_images())
    counters = flat.integer_buffers()
    assert {name.rpartition(".")[2] for name in counters} == {"num_batches_tracked"}
    assert all(counter.item() == 1 for counter in counters.values())
    flat.flat.zero_()
    assert all(counter.item() == 1 for counter in counters.values())


def test_on_the_cpu_messages_are_the_model_itself() -> None:
    flat = FlatModel(small_model())
    flat.to_wire()
    assert flat.wire is flat.flat
    flat.wire.fill_(2)
    flat.from_wire()
    assert all((tensor == 2).all() for tensor in values(flat.model))


class Named(nn.Module):
    """A model of one layer under a name of its own."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(inputs, outputs, bias=False))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (small_model(), build_model(Model(name="resnet8"), 10), True),
        (small_model(), small_model(classes=11), False),
        (small_model(), small_model(name="resnet20"), False),
        (Named("a", 4, 6), Named("a", 4, 6), True),
        (Named("a", 4, 6), Named("a", 6, 4), False),
        (Named("a", 4, 6), Named("b", 4, 6), False),
    ],
)
def test_only_models_of_the_same_names_and_shapes_have_the_same_signature(
    first: nn.Module, second: nn.Module, same: bool
) -> None:
    assert (FlatModel(first).signature == FlatModel(second).signature) is same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_that_is_not_float32_is_told_so(dtype: torch.dtype) -> None:
    model = small_model()
    model.fc.to(dtype)
    with pytest.raises(UserError, match=rf"the model's fc\.1\.weight is {dtype}: .*precision"):
        FlatModel(model)


# ---- merges -----------------------------------------------------------------------------------

FORMULAS: dict[str, Callable] = {
    "weighted": lambda w, w_i, f: (w + f * w_i) / (1 + f),
    "compsac": lambda w, w_i, f: ((2 - f) * w + f * w_i) / 2,
}


@pytest.mark.parametrize("into", ["a new tensor", "the model", "the commit"])
@pytest.mark.parametrize("factor", [1e-3, 0.3, 0.809524, 1.0, 1.3])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_commit_is_merged_by_the_papers_formula(name: str, factor: float, into: str) -> None:
    generator = torch.Generator().manual_seed(2)
    model, commit = (10 * torch.randn(1003, generator=generator) for _ in range(2))
    expected = FORMULAS[name](model.double(), commit.double(), factor)
    out = {"a new tensor": torch.empty(1003), "the model": model, "the commit": commit}[into]
    merged = MERGES[name](model, commit, factor, out)
    assert merged is out
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=5e-6)


def test_every_merge_that_can_be_configured_is_tested() -> None:
    assert set(MERGES) == set(FORMULAS)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_synchronous_commits_are_weighted_by_their_factors(factors: list[float]) -> None:
    commits = np.random.default_rng(3).standard_normal((len(factors), 50))
    expected = sum(f * w for f, w in zip(factors, commits, strict=True)) / sum(factors)
    weights = reduction_weights(factors)
    assert sum(weights) == pytest.approx(1)
    np.testing.assert_allclose(np.array(weights) @ commits, expected, rtol=1e-9, atol=1e-12)


# ---- models by name ---------------------------------------------------------------------------


def constant_model(name: str) -> nn.Module:
    """The model with every value 0.01, for which nothing needs drawing."""
    with torch.device("meta"):
        model = build_model(Model(name=name), 7)
    model.to_empty(device=CPU)
    for tensor in values(model):
        nn.init.constant_(tensor, 0.01)
    return model


@pytest.mark.parametrize(
    ("name", "count", "side"),
    [
        ("resnet8", 2, 16),
        ("resnet20", 2, 16),
        ("resnet18", 2, 32),
        ("mobilenet_v3_small", 2, 32),
        ("vit_b_16", 1, 224),
        ("vgg11", 2, 32),
    ],
)
@torch.no_grad()
def test_dropout_stands_before_the_classifier(name: str, count: int, side: int) -> None:
    """With all features dropped, nothing but the classifier's bias is left."""
    model = constant_model(name)
    images = some_images(count, side)
    model.train()
    set_dropout(model, 1.0)
    assert torch.equal(model(images), torch.full((count, 7), 0.01))
    set_dropout(model, 0.0)
    assert (model(images) != 0.01).all()


@torch.no_grad()
def test_dropout_begins_at_nothing_and_plays_no_part_in_evaluation() -> None:
    model, images = small_model(), some_images()
    model.train()
    assert torch.equal(model(images), model(images))
    set_dropout(model, 0.5)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize(("name", "layers"), [("resnet8", 8), ("resnet20", 20)])
def test_small_resnets_have_the_layers_of_their_name(name: str, layers: int) -> None:
    modules = list(small_model(name=name).modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + sum(isinstance(m, nn.Linear) for m in modules) == layers


@pytest.mark.parametrize(("stem", "side"), [("small", 32), ("imagenet", 8)])
@torch.no_grad()
def test_the_small_stem_keeps_the_resolution_of_small_images(stem: str, side: int) -> None:
    sides = []
    model = build_model(Model(name="resnet18", stem=stem), 10)
    model.layer1.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    assert model.eval()(some_images(1, 32)).shape == (1, 10)
    assert sides == [side]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnt18", "model.name: there is no 'resnt18'; did you mean 'resnet18'?"),
        ("resnet9", "did you mean 'resnet"),
        ("my-net", "choose resnet8, resnet20, a torchvision classifier, or package.module:functio"),
        ("fcn_resnet50", "model.name: there is no 'fcn_resnet50'; "),
    ],
)
def test_a_model_that_is_none_is_told_so(name: str, told: str) -> None:
    with pytest.raises(UserError) as caught, torch.device("meta"):
        build_model(Model(name=name), 10)
    assert told in str(caught.value)


def test_the_dropout_of_a_squeezenet_follows_the_stage() -> None:
    model = build_model(Model(name="squeezenet1_1"), 7)
    dropout, last = model.classifier[0], model.classifier[1]
    assert isinstance(dropout, ClassifierDropout) and isinstance(last, nn.Conv2d)
    assert model.eval()(some_images(4, 32)).shape == (4, 7)
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 1


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_that_no_loss_trains_are_left_out(name: str) -> None:
    with torch.device("meta"):
        model = build_model(Model(name=name), 10)
    assert not [path for path, _ in model.named_parameters() if path.lower().startswith("aux")]


def test_that_a_model_takes_its_images_is_found_out_without_a_trace() -> None:
    settings = Settings(model=Model(name="resnet8"))
    found = []
    for make in (
        lambda: build_model(settings.model, 10),
        lambda: make_model(settings, 10, torch.device("cpu")),
    ):
        torch.manual_seed(3)
        model = make()
        found.append((torch.get_rng_state(), model.training, *model.state_dict().values()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


USERS_MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Flatten()
        self.head = nn.Linear(3 * 8 * 8, num_classes)

    def forward(self, images):
        return self.head(self.body(images))

def make(num_classes=1000):
    return Net(num_classes)

def headless(num_classes):
    return nn.Flatten()

def words(num_classes):
    return "a model"

def other(classes):
    return Net(classes)

constant = 3
"""


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with models of the user's own in ``nets/own_models.py``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "own_models.py").write_text(USERS_MODULE)
    yield tmp_path
    for name in ("nets", "nets.own_models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["nets.own_models:make", "nets.own_models:Net"])
def test_a_model_of_the_users_own_is_found_from_the_current_folder(
    users_folder: Path, name: str
) -> None:
    assert build_model(Model(name=name), 7)(some_images()).shape == (4, 7)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nets.gone:make", "No module named 'nets.gone'; it is looked for from "),
        ("nets.own_models:gone", "has no attribute 'gone'"),
        ("nets.own_models:other", "must be a function that takes num_classes=7"),
        ("nets.own_models:constant", "must be a function that takes num_classes=7"),
        ("nets.own_models:words", "returned str, not a torch module"),
        ("nets.own_models:headless", "has no linear classifier to put dropout before"),
        (":make", "Empty module name"),
    ],
)
def test_a_users_model_that_cannot_be_had_is_told_so(
    users_folder: Path, name: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        build_model(Model(name=name), 7)
    assert f"'{name}'" in str(caught.value)
    assert told in str(caught.value)


# ---- image files ------------------------------------------------------------------------------

TOP, BOTTOM = (200, 40, 90), (20, 180, 60)


def picture(width: int = 40, height: int = 40) -> Image.Image:
    """Of one colour above and another below."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[: height // 2], pixels[height // 2 :] = TOP, BOTTOM
    return Image.fromarray(pixels)


def image_files(*paths: Path) -> ImageFiles:
    return ImageFiles(["one"], np.zeros(len(paths), dtype=np.int64), [str(p) for p in paths])


def decoded(path: Path, resolution: int) -> np.ndarray:
    """The one image, shape (resolution, resolution, 3), as wide numbers."""
    image = image_files(path).load(np.array([0]), resolution)[0]
    assert (image.dtype, image.shape) == (torch.uint8, (1, 3, resolution, resolution))
    return image[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("a.jpg", "RGB", 4),
        ("a.jpeg", "RGB", 4),
        ("cmyk.jpg", "CMYK", 4),
        ("a.png", "RGB", 0),
        ("alpha.png", "RGBA", 0),
        ("palette.png", "P", 0),
        ("a.bmp", "RGB", 0),
        ("a.ppm", "RGB", 0),
        ("a.webp", "RGB", 4),
        ("a.tif", "RGB", 0),
        ("cmyk.tiff", "CMYK", 4),
        ("a.jp2", "RGB", 4),
        ("a.pnm", "RGB", 0),
    ],
)
def test_a_colour_image_of_any_format_is_read_as_rgb(
    tmp_path: Path, name: str, mode: str, tolerance: int
) -> None:
    drawn = picture().quantize(4) if mode == "P" else picture().convert(mode)
    drawn.save(tmp_path / name)
    pixels = decoded(tmp_path / name, 40)
    assert np.abs(pixels[4, 4] - TOP).max() <= tolerance
    assert np.abs(pixels[36, 36] - BOTTOM).max() <= tolerance


def test_what_a_file_holds_counts_and_not_its_name(tmp_path: Path) -> None:
    picture().save(tmp_path / "really.jpg", "PNG")
    assert (decoded(tmp_path / "really.jpg", 40)[0, 0] == TOP).all()


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("grey.jpg", np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))),
        ("grey.png", np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))),
        ("grey.pgm", np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))),
        ("16bit.tif", np.tile(np.arange(0, 65536, 1024, dtype=np.uint16), (64, 1))),
        ("16bit.png", np.tile(np.arange(0, 65536, 1024, dtype=np.uint16), (64, 1))),
    ],
)
def test_a_grey_image_has_three_equal_channels(
    tmp_path: Path, name: str, pixels: np.ndarray
) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    read = decoded(tmp_path / name, 64)
    assert (read == read[..., :1]).all()
    assert np.abs(read[0, :, 0] - np.arange(0, 256, 4)).max() <= 2


@pytest.mark.parametrize("resolution", [8, 24, 60])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_the_shorter_side_fits_and_the_centre_is_kept(
    tmp_path: Path, resolution: int, suffix: str, turned: bool
) -> None:
    stripes = np.zeros((100, 300, 3), dtype=np.uint8)
    stripes[:, 100:200] = (0, 255, 0)
    Image.fromarray(stripes.transpose(1, 0, 2) if turned else stripes).save(
        tmp_path / f"a.{suffix}", quality=95
    )
    pixels = decoded(tmp_path / f"a.{suffix}", resolution)
    inside = pixels[2:-2, 2:-2]
    assert np.abs(inside - (0, 255, 0)).max() < 20


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 2)])
def test_an_image_of_any_shape_gives_a_square(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, TOP).save(tmp_path / "a.png")
    assert (decoded(tmp_path / "a.png", 32) == TOP).all()


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _spoil(content: bytes) -> bytes:
    return content[:60] + bytes(60) + content[120:]


@pytest.mark.parametrize(
    ("name", "harm", "told"),
    [
        ("cut.jpg", _cut, "truncated"),
        ("cut.png", _cut, "truncated"),
        ("cut.bmp", _cut, "truncated"),
        ("spoilt.png", _spoil, "broken"),
        ("headless.jpg", lambda content: content[30:], "not an image"),
        ("text.jpg", lambda _: b"the cat sat on the mat\n", "not an image"),
        ("empty.jpg", lambda _: b"", "not an image"),
        ("bomb.ppm", lambda _: b"P6\n100000 100000 255\n", "exceeds limit"),
    ],
)
def test_a_damaged_image_is_named(
    tmp_path: Path, name: str, harm: Callable[[bytes], bytes], told: str
) -> None:
    path = tmp_path / name
    pixels = np.random.default_rng(4).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        image_files(path).load(np.array([0]), 32)
    line = str(caught.value)
    assert line.startswith(f"cannot decode {path}: ")
    assert told in line.lower()
    assert "\n" not in line
    assert line.endswith("; bring a good copy of it")


def test_an_image_that_has_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg has vanished"):
        image_files(tmp_path / "gone.jpg").load(np.array([0]), 32)


# ---- folders ----------------------------------------------------------------------------------


def fill(root: Path, *files: str) -> Path:
    """Files below `root`; those that end in a suffix of images are images."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("not for training")
        elif path.suffix:
            picture(8, 8).save(path, "PNG")
        else:
            path.mkdir()
    return root


def test_a_folder_is_read_in_sorted_order_with_its_subfolders(tmp_path: Path) -> None:
    fill(tmp_path, "b/2.png", "b/1.jpg", "a/x/9.JPEG", "a/0.png", "a/notes.txt", "readme.txt")
    fill(tmp_path, "a/1.tif", "a/2.TIFF", "a/3.pgm", "a/4.jp2", "a/5.gif", "b/6.txt", "b/.x.txt")
    images = scan_folder(tmp_path)
    assert images.classes == ["a", "b"]
    assert images.labels.tolist() == [0] * 6 + [1] * 2
    names = [str(Path(path).relative_to(tmp_path)) for path in images.paths]
    in_a = ["a/0.png", "a/1.tif", "a/2.TIFF", "a/3.pgm", "a/4.jp2", "a/x/9.JPEG"]
    assert names == [*in_a, "b/1.jpg", "b/2.png"]
    told = "files passed over that are not named as images: 3 (.txt 2, .gif 1)"
    assert images.passed_over == f"{tmp_path}: {told}"


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_held_out_images_are_in_val_or_test(tmp_path: Path, held_out: str) -> None:
    fill(tmp_path, "train/a/0.png", "train/a/1.png", f"{held_out}/a/2.png")
    settings = Data(source="folder", path=tmp_path)
    assert len(open_data(settings, "train").labels) == 2
    assert len(open_data(settings, "test").labels) == 1


@pytest.mark.parametrize(
    ("files", "split", "told"),
    [
        (["train/a/0.png", "train/b"], "train", "class folder {root}/train/b has no images ("),
        (["train/a/0.png", "train/b/x.txt"], "train", "class folder {root}/train/b has no images"),
        (["train/0.png"], "train", "{root}/train has no class folders: expected "),
        (["train"], "train", "{root}/train has no class folders: expected {root}/train/<class>/"),
        (["a/0.png"], "train", "{root} has no train/ folder"),
        (["train/a/0.png"], "test", "{root} has no val/ or test/ folder"),
    ],
)
def test_a_folder_that_holds_no_data_set_is_told_so(
    tmp_path: Path, files: list[str], split: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        open_data(Data(source="folder", path=fill(tmp_path, *files)), split)
    assert str(caught.value).startswith(told.format(root=tmp_path))


@pytest.mark.parametrize("path", ["gone", "file.txt"])
def test_a_data_path_that_is_no_folder_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match=rf"data\.path = '{tmp_path}/{path}' is not a folder"):
        open_data(Data(source="folder", path=tmp_path / path), "train")


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        ("abc", "ab", "c only for training"),
        ("ab", "abc", "c only held out"),
        ("abcdefgh", "a", "b, c, d, e, f ... only for training"),
    ],
)
def test_held_out_images_of_other_classes_are_an_error(train: str, test: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_classes(list(train), list(test))
    assert told in str(caught.value)
    check_classes(list(train), list(train))


# ---- data sets that come with the program -----------------------------------------------------


def test_digits_are_real_jpeg_files_of_every_class(digits: Path) -> None:
    settings = Data(source="digits", path=digits)
    train, test = open_data(settings, "train"), open_data(settings, "test")
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    for split in (train, test):
        assert split.classes == [str(number) for number in range(10)]
        assert set(split.labels) == set(range(10))
    assert Path(train.paths[0]).read_bytes().startswith(b"\xff\xd8\xff")
    assert not {Path(path).name for path in train.paths} & {Path(p).name for p in test.paths}


def test_digits_are_written_once_and_for_all_users(digits: Path) -> None:
    written = digits / "digits"
    before = written.stat()
    prepare_data(Data(source="digits", path=digits))
    assert written.stat().st_ino == before.st_ino
    umask = os.umask(0)
    os.umask(umask)
    assert before.st_mode & 0o777 == 0o777 & ~umask


def test_two_runs_that_write_the_digits_at_once_agree(tmp_path: Path) -> None:
    settings = Data(source="digits", path=tmp_path)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(prepare_data, settings) for _ in range(2)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert len(open_data(settings, "train").labels) == 1437


def test_synthetic_images_are_the_same_on_every_rank_and_others_when_held_out() -> None:
    settings = Data(source="synthetic", synthetic_classes=3, synthetic_samples=50)
    first, again, test = (open_data(settings, split) for split in ("train", "train", "test"))
    assert first.images.shape == (50, 3, 32, 32)
    assert torch.equal(first.images, again.images)
    assert np.bincount(first.labels).tolist() == [17, 17, 16]
    assert len(test.labels) == 10
    assert not torch.equal(test.images, first.images[:10])


def test_images_in_memory_are_resized_only_where_they_must_be() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    data = ImageArray(["one"], np.zeros(2, dtype=np.int64), images)
    assert torch.equal(data.load(np.array([1, 0]), 8)[0], images.flip(0))
    flat = ImageArray(["one"], data.labels, torch.full((2, 3, 8, 8), 77, dtype=torch.uint8))
    for side in (5, 16):
        assert torch.equal(flat.load(np.array([0]), side)[0], torch.full((1, 3, side, side), 77))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A machine whose only way out is a proxy that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        too_late = threading.Timer(30, proxy.close)  # ends a test that would wait for ever
        too_late.start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers an earlier proxy
        monkeypatch.setattr(data_module, "_DOWNLOAD_PATIENCE", 0.3)
        yield proxy
        too_late.cancel()


@pytest.mark.parametrize(
    ("source", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")]
)
@pytest.mark.parametrize("network", ["closed", "silent"])
def test_without_a_network_cifar_is_asked_for(
    offline: socket.socket, tmp_path: Path, source: str, folder: str, network: str
) -> None:
    if network == "closed":
        offline.close()
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError) as caught:
        prepare_data(Data(source=source, path=tmp_path))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{source} is neither in {tmp_path} nor can it be downloaded (")
    assert ("timed out" if network == "silent" else "refused") in line
    assert f"put torchvision's {folder} there, or bring the images as a folder" in line
    assert socket.getdefaulttimeout() == before


def test_cifar_that_is_cut_short_is_not_trained_on(offline: socket.socket, tmp_path: Path) -> None:
    fill(tmp_path, "cifar-10-batches-py/readme.txt")
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    with pytest.raises(UserError, match="corrupted"):
        open_data(Data(source="cifar10", path=tmp_path), "train")
