"""What lacks memory or a GPU: told in one line, and searched for; as far as a CPU can show it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpc_hdb.cluster.messages import Order, OrderKind
from hpc_hdb.config import Settings, Train
from hpc_hdb.errors import UserError
from hpc_hdb.run.build import Place, check_gpus
from hpc_hdb.run.planning import time_sweeps
from hpc_hdb.train.data import ImageArray
from hpc_hdb.train.evaluate import Evaluator
from hpc_hdb.train.loader import TorchLoader
from hpc_hdb.train.memory import lacks_memory
from hpc_hdb.train.profile import (
    fits_device,
    keep_stepping,
    largest_batch,
    measure_steps,
    profile_resolution,
    sweep_sizes,
)
from hpc_hdb.train.trainer import Trainer

SIDE = 8
SAMPLES = 64


def images() -> ImageArray:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (SAMPLES, 3, SIDE, SIDE), generator=generator)
    return ImageArray(["a", "b"], np.arange(SAMPLES) % 2, pixels.to(torch.uint8))


class Limited(nn.Module):
    """Does `beyond` with batches of more than `limit` images; its maps shrink to one pixel."""

    def __init__(self, limit: int, beyond: Callable[[], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, SIDE)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.limit, self.beyond = limit, beyond

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.limit:
            self.beyond()
        return self.fc(self.norm(self.conv(images)).flatten(1))


def too_much_for_torch() -> None:
    torch.empty(1 << 50)


def too_much_for_python() -> None:
    bytearray(1 << 60)


def too_many_elements() -> None:
    raise RuntimeError("Expected canUse32BitIndexMath(input) to be true, but got false")


def trainer(limit: int = 10**6, beyond: Callable[[], object] = too_much_for_torch) -> Trainer:
    torch.manual_seed(0)
    return Trainer(Limited(limit, beyond), TorchLoader(images(), 0), SAMPLES, Train(), 0)


@pytest.mark.parametrize("ask", [too_much_for_torch, too_much_for_python])
def test_a_lack_of_memory_is_known_by_its_error(ask: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask()
    assert lacks_memory(caught.value)


@pytest.mark.parametrize(
    ("message", "lacks"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be reported later", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Error in thread 0: CUDA runtime API error cudaErrorMemoryAllocation (2):\nout", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", False),
    ],
)
def test_a_lack_of_memory_is_known_by_its_words(message: str, lacks: bool) -> None:
    assert lacks_memory(RuntimeError(message)) is lacks


@pytest.mark.parametrize("beyond", [too_much_for_torch, too_much_for_python])
def test_a_batch_that_does_not_fit_is_one_line(beyond: Callable[[], object]) -> None:
    order = Order(OrderKind.TRAIN, end=20, resolution=SIDE, batch=20, learning_rate=0.1)
    with pytest.raises(UserError, match=r"^a batch of 20 images at 8x8 does not fit the memory: l"):
        trainer(10, beyond).train_round(order, lambda: False, lambda report: None)
    with pytest.raises(UserError, match=r"^a batch of up to 20 images at 8x8 does not fit the mem"):
        time_sweeps(trainer(10, beyond), {SIDE: [5, 20]})


def test_an_evaluation_that_does_not_fit_says_what_to_lower() -> None:
    model = Limited(10, too_much_for_torch)
    evaluator = Evaluator(model, TorchLoader(images(), 0), SAMPLES, SIDE, 32)
    with pytest.raises(UserError, match=r"^an evaluation's batch of up to 32 .*evaluation_batch$"):
        evaluator.evaluate(evaluator.parameters.flat.clone())


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    order = Order(OrderKind.TRAIN, end=20, resolution=SIDE, batch=20, learning_rate=0.1)
    with pytest.raises(RuntimeError, match="canUse32BitIndexMath"):
        trainer(10, too_many_elements).train_round(order, lambda: False, lambda report: None)


@pytest.mark.parametrize("beyond", [too_much_for_torch, too_much_for_python, too_many_elements])
def test_the_search_ends_where_steps_fail(beyond: Callable[[], object]) -> None:
    """And never asks for a batch of one, whose statistics batch norm refuses."""
    limited = trainer(11, beyond)
    assert largest_batch(lambda size: fits_device(limited, SIDE, size), 64) == 11
    assert fits_device(limited, SIDE, 11), "it goes on after a failure"


def test_a_trial_is_more_than_a_step() -> None:
    """Batches that wait for a GPU take memory that the first step does not ask for."""
    waiting = iter(range(3))

    def too_many() -> None:
        if next(waiting, None) is None:
            too_much_for_torch()

    assert not fits_device(trainer(11, too_many), SIDE, 12)


def test_a_model_that_fails_at_any_batch_is_no_matter_of_size() -> None:
    broken = trainer(0, too_many_elements)
    with pytest.raises(RuntimeError, match="canUse32BitIndexMath"):
        largest_batch(lambda size: fits_device(broken, SIDE, size), 64)


@pytest.mark.parametrize("beyond", [too_much_for_torch, too_much_for_python])
def test_a_profile_goes_on_with_less_where_its_largest_batch_does_not_fit(
    beyond: Callable[[], object],
) -> None:
    """As where something else takes memory after the search."""
    timing = profile_resolution(trainer(11, beyond), SIDE, 13, seconds=0.01, repeats=1)
    assert timing.large_batch == 11
    assert [size for size, _ in timing.points] == sweep_sizes(11)
    with pytest.raises(UserError, match=r"^not even a batch of two images fits: use a smaller mod"):
        profile_resolution(trainer(0, beyond), SIDE, 4, seconds=0.01, repeats=1)
    with pytest.raises(RuntimeError, match="canUse32BitIndexMath"):
        profile_resolution(trainer(11, too_many_elements), SIDE, 13, seconds=0.01, repeats=1)


def test_a_sweep_needs_no_batch_of_one() -> None:
    sizes = sweep_sizes(20)
    times = measure_steps(trainer(), SIDE, sizes, seconds=0.01, repeats=2)
    assert len(times) == len(sizes)
    assert all(time > 0 for time in times)


def test_a_worker_that_has_measured_goes_on_until_all_have() -> None:
    """Its steps take of shared cores what they will take in the run."""
    early = trainer()
    seen: list[int] = []
    early.model.register_forward_hook(lambda model, inputs, output: seen.append(len(inputs[0])))
    others = iter([False, False, True])
    keep_stepping(early, SIDE, 5, lambda: next(others))
    assert set(seen) == {5}
    assert next(others, None) is None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Failing:
    """Encoded images of which one raises an error of a kind when it is read."""

    encoded, verified = True, True
    labels = np.zeros(20, dtype=np.int64)
    classes = ("a", "b")

    def __init__(self, file: Path, error: type[Exception], message: str) -> None:
        self._bytes = np.fromfile(file, dtype=np.uint8)
        self._error, self._message = error, message

    def read(self, index: int, side: int) -> np.ndarray:
        if index == 13:
            raise self._error(self._message)
        return self._bytes


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "a.jpg"
    Image.new("RGB", (SIDE, SIDE)).save(path)
    return path


@pytest.mark.parametrize(
    ("error", "message", "told"),
    [
        (MemoryError, "", torch.OutOfMemoryError),
        (RuntimeError, "CUDA driver API error 2:\nout of memory", torch.OutOfMemoryError),
        (RuntimeError, "CUDA runtime API error cudaErrorIllegalAddress (700)", UserError),
    ],
)
def test_a_failing_gpu_is_no_bad_image(
    picture: Path, error: type[Exception], message: str, told: type[Exception]
) -> None:
    """None is left out for it; and with the error the pipeline is gone, and its memory."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: its errors were not tested")
    from dali_pipelines.feed import Feed
    from hpc_hdb.train.dali_loader import DaliLoader

    def feeds() -> int:
        return sum(type(thing) is Feed for thing in gc.get_objects())

    data: Any = Failing(picture, error, message)
    loader = DaliLoader(data, 1, skip=True)
    with no_garbage_collection():
        before, caught = feeds(), None
        try:
            list(loader.batches(np.arange(20), [5] * 4, SIDE, 0))
        except Exception as raised:
            caught = type(raised)
        assert caught is told
        assert feeds() == before
    assert loader.left_out == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here that can be used")
def test_a_gpu_that_cannot_be_used_is_one_line() -> None:
    told = r"^GPU 0 of .* cannot be used \(.*\): see who uses it with nvidia-smi, or set train\.dev"
    with pytest.raises(UserError, match=told):
        Place(torch.device("cuda", 0), torch.get_num_threads()).settle()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here that can be used")
def test_a_gpu_that_dali_cannot_use_is_one_line() -> None:
    """As where its build wants a newer driver than torch's."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: its errors were not tested")
    from hpc_hdb.train.dali_loader import DaliLoader

    loader = DaliLoader(images(), 1, device=torch.device("cuda", 0))
    told = r'^DALI cannot use this GPU \(.*CUDA.*\): set data\.loader = "torch"$'
    with pytest.raises(UserError, match=told):
        next(loader.batches(np.arange(4), [4], SIDE, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here that can be used")
def test_a_batch_that_leaves_the_gpu_of_no_use_is_one_line() -> None:
    """As an illegal access of a kernel does; here it is of no use anyway."""
    broken = trainer(11, too_many_elements)
    broken.device = torch.device("cuda", 0)
    with pytest.raises(
        UserError, match=r"^a batch of 12 images made .* \(.*\): set --bound to less$"
    ):
        fits_device(broken, SIDE, 12)


def test_ranks_that_share_batches_need_a_gpu_each() -> None:
    """Each may see its own one only: what counts is which it is."""
    settings = Settings.model_validate({"server": {"ranks_per_worker": 2}})
    check_gpus(settings, [11, 12])
    check_gpus(settings, [])
    with pytest.raises(UserError, match="has 1 GPUs for 2 ranks that train, and server"):
        check_gpus(settings, [11, 11])
