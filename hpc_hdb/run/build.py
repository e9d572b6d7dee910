"""The parts of a run, made from its settings."""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dali_pipelines.augmentation import PLAIN, Augmentation
from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError
from hpc_hdb.train.data import EncodedImages, ImageFiles, ImageSet, check_classes, open_data
from hpc_hdb.train.evaluate import Evaluator
from hpc_hdb.train.loader import make_loader, misses_dali
from hpc_hdb.train.memory import room_for
from hpc_hdb.train.model import build_model, check_resolution
from hpc_hdb.train.recalibrate import Recalibration
from hpc_hdb.train.trainer import Trainer

if TYPE_CHECKING:
    from hpc_hdb.cluster.groups import RankGroup


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its device and its share of the node's cores."""

    device: torch.device
    threads: int

    def settle(self) -> None:
        """Use it: threads, current GPU, and arithmetic that repeats bit for bit.

        Raises
        ------
        UserError
            If the GPU cannot be used.
        """
        torch.set_num_threads(self.threads)
        torch.backends.cudnn.deterministic = True
        if self.device.type != "cuda":
            _keep_memory()
            return
        try:
            torch.cuda.set_device(self.device)
        except RuntimeError as error:  # no memory for a context, or another process has it alone
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"GPU {self.device.index} of {socket.gethostname()} cannot be used ({reason}): see "
                'who uses it with nvidia-smi, or set train.device = "cpu"'
            ) from None


def _keep_memory() -> None:
    """Let the C library keep freed memory: else every step faults its activations in anew.

    That took a quarter of a ResNet-18 step on a CPU. Other C libraries than glibc lack it.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def choose_place(settings: Settings, local_rank: int = 0, sharing: int = 1) -> Place:
    """One GPU per worker of a node, by local rank, and a share of the cores.

    Parameters
    ----------
    local_rank : int
        Position among the workers of this node; -1 for a server.
    sharing : int
        Workers that run on the same cores.

    Raises
    ------
    UserError
        If a GPU is asked for and there is none.
    """
    gpus = torch.cuda.device_count() if settings.train.device != "cpu" else 0
    if settings.train.device == "cuda" and not gpus:
        raise UserError('train.device = "cuda", but torch sees no GPU here: use "auto" or "cpu"')
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    threads = settings.run.threads
    if not threads and "OMP_NUM_THREADS" in os.environ:
        threads = torch.get_num_threads()
    return Place(device, threads or max(1, len(os.sched_getaffinity(0)) // max(1, sharing)))


def note_loading(
    data: ImageSet, settings: Settings, device: torch.device, note: Callable[[str], None]
) -> None:
    """Tell `note` of files passed over, and where images are decoded more slowly than need be."""
    _note_passed_over(data, note)
    if misses_dali(data, settings.data, device):
        note(
            "DALI is not installed: torch decodes the images, which is slower; "
            "pip install 'hpc-hdb[dali]'"
        )


def _note_passed_over(data: ImageSet, note: Callable[[str], None]) -> None:
    if isinstance(data, ImageFiles) and data.passed_over:
        note(data.passed_over)


def gpu_number(device: torch.device) -> int:
    """A number that is a GPU's own, however it is counted; 0 for the CPU.

    Batch systems mostly show each rank its own GPU alone, as the first one.
    """
    if device.type != "cuda":
        return 0
    name = str(torch.cuda.get_device_properties(device).uuid)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def check_gpus(settings: Settings, gpus: Sequence[int]) -> None:
    """Raise UserError where ranks of this node share batches, and a GPU too.

    NCCL does not let them.

    Parameters
    ----------
    gpus : sequence of int
        `gpu_number` of each rank that trains on a GPU.
    """
    if len(set(gpus)) < len(gpus):
        setting = f"server.ranks_per_worker = {settings.server.ranks_per_worker}"
        if settings.server.sync == "allreduce":
            setting = 'server.sync = "allreduce"'
        raise UserError(
            f"{socket.gethostname()} has {len(set(gpus))} GPUs for {len(gpus)} ranks that train, "
            f"and {setting} needs one for each: start fewer ranks on a node, ask for more GPUs, "
            'or set train.device = "cpu"'
        )


def make_trainer(
    settings: Settings,
    data: ImageSet,
    device: torch.device,
    group: RankGroup | None = None,
    in_turn: int = 1,
) -> Trainer:
    """The trainer of a worker, or of one rank of its group; its model as the run's seed has it.

    Where all ranks of a worker are in this process, `in_turn` is their number.
    """
    torch.manual_seed(settings.run.seed)
    model = make_model(settings, len(data.classes), device)
    train = settings.train
    augmentation = Augmentation(train.flip, train.rotation, train.zoom, train.crop_area)
    rows = group.rows if group else None
    loader = make_loader(data, settings.data, augmentation, device, rows)
    samples = len(data.labels)
    return Trainer(model, loader, samples, settings.train, settings.run.seed, group, in_turn)


def make_evaluator(
    settings: Settings,
    device: torch.device,
    classes: Sequence[str] | None = None,
    group: RankGroup | None = None,
    recalibrates: bool = True,
    note: Callable[[str], None] | None = None,
) -> Evaluator:
    """The evaluator at the highest resolution, its model initialised from the run's seed.

    Parameters
    ----------
    classes : sequence of str, optional
        Of the training images; those held out must be of the same.
    group : RankGroup, optional
        Ranks that evaluate together.
    recalibrates : bool
        Whether models get batch-norm statistics anew, where the settings ask for it.
    note : callable, optional
        Told of files passed over.

    Raises
    ------
    UserError
        If they are not, or the images or the model cannot be had.
    """
    data = open_data(settings.data, "test")
    if note is not None:
        _note_passed_over(data, note)
    if classes is not None:
        check_classes(classes, data.classes)
    torch.manual_seed(settings.run.seed)
    model = make_model(settings, len(data.classes), device)
    return Evaluator(
        model,
        make_loader(data, settings.data, PLAIN, device),
        len(data.labels),
        settings.schedule.resolutions[-1],
        settings.run.evaluation_batch,
        image_name(data, settings),
        group,
        _recalibration(settings, device) if recalibrates and settings.server.recalibrate else None,
    )


def _recalibration(settings: Settings, device: torch.device) -> Recalibration:
    data = open_data(settings.data, "train")
    return Recalibration(
        make_loader(data, settings.data, PLAIN, device),
        len(data.labels),
        settings.server.recalibrate,
        settings.schedule.resolutions[-1],
        settings.run.evaluation_batch,
        settings.run.seed,
        image_name(data, settings),
    )


def image_name(data: ImageSet, settings: Settings) -> Callable[[int], str]:
    """What names the image of a sample."""
    resolution = settings.schedule.resolutions[-1]
    if isinstance(data, EncodedImages):
        return lambda sample: data.name(sample, resolution)
    return str


def make_model(settings: Settings, classes: int, device: torch.device) -> nn.Module:
    """The model; raises UserError where it cannot be made, or not take the schedule's images.

    What a function of the user's raises becomes one which says where.
    """
    name = settings.model.name
    given, advice = "", "mend it, or choose another model"
    try:
        model = build_model(settings.model, classes)
        advice = "set schedule.resolutions to what it takes, or choose another model"
        for side in sorted({stage.resolution for stage in settings.schedule.stages()}):
            given = f" for images of {side}x{side}"
            check_resolution(model, name, side, classes)
    except UserError:
        raise
    except Exception as error:
        where = ""
        if not isinstance(error, SyntaxError):  # which says itself where
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f" ({last.filename}, line {last.lineno})"
        raise UserError(
            f"model.name = '{name}' raised {type(error).__name__}{given}: {error}{where}: {advice}"
        ) from None
    with room_for(f"model.name = '{name}'", device, "choose a smaller model, or a free device"):
        return model.to(device)
