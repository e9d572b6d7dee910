"""Batches decoded and augmented by NVIDIA DALI."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.augmentation import PLAIN, Augmentation, Draws, needed_sides
from dali_pipelines.classification import Form
from dali_pipelines.cyclic import READERS
from dali_pipelines.feed import Feed, Job
from dali_pipelines.transfer import to_device
from hpc_hdb.errors import BadImage, UserError
from hpc_hdb.train.data import EncodedImages, ImageSet
from hpc_hdb.train.decode import DecodeError, check_header, encode_blank
from hpc_hdb.train.loader import Rows, cut_round
from hpc_hdb.train.memory import lacks_memory

_CPU = torch.device("cpu")
_TRIAL_SIDE = 8
_KEPT = 2  # idle pipelines: each holds its buffers, and resolutions mostly change to a neighbour

_Work = tuple[np.ndarray, np.ndarray, Draws]
"""Samples of a batch, the sides they need, and what is done to them."""


class DaliLoader:
    """A `Loader` that decodes in DALI's threads, or on the GPU, while the caller trains.

    Parameters
    ----------
    data : ImageSet
    threads : int
        CPU threads of a pipeline; 0 counts as 1, since DALI has no other thread to decode in.
    augmentation : Augmentation
    device : torch.device
        Where batches are made and given out.
    skip : bool
        Whether to leave bad images out.
    rows : callable, optional
        As in `hpc_hdb.train.loader.make_loader`.
    """

    def __init__(
        self,
        data: ImageSet,
        threads: int,
        augmentation: Augmentation = PLAIN,
        device: torch.device = _CPU,
        skip: bool = False,
        rows: Rows | None = None,
    ) -> None:
        self.left_out: list[int] = []
        self._rows = rows
        self._skip = skip
        self._bad: set[int] = set()
        self._checked = np.full(len(data.labels), data.verified)
        self._data = data
        self._labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64))
        self._threads = max(1, threads)
        self._augmentation = augmentation
        self._device = device
        self._plain = Form(data.encoded, channels_last=True)
        self._form = replace(self._plain, crops=augmentation.crops, change=augmentation.change)
        self._readers = ThreadPoolExecutor(READERS)
        self._idle: dict[int, Feed] = {}  # by resolution, the least recently used first
        self._expected: tuple[int, int] | None = None
        self._upcoming: tuple[int, Future[Feed]] | None = None

    def prepare(self, resolution: int, largest_batch: int) -> None:
        largest_batch = self._own(largest_batch)
        self._take_upcoming(resolution)
        feed = self._idle.pop(resolution, None)
        if feed is None or feed.largest_batch < largest_batch:
            feed = None  # its memory is free before another pipeline asks for its own
            while len(self._idle) >= _KEPT:
                del self._idle[next(iter(self._idle))]
            feed = self._build(self._form, resolution, largest_batch)
        self._idle[resolution] = feed

    def expect(self, resolution: int, largest_batch: int) -> None:
        self._expected = (resolution, self._own(largest_batch))

    def batches(
        self, indices: np.ndarray, sizes: Sequence[int], resolution: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.prepare(resolution, max(sizes))
        largest_batch = self._idle[resolution].largest_batch
        # A feed goes back only from a finished round: one that failed, or was abandoned with
        # batches under way, is freed together with this generator.
        feed = self._idle.pop(resolution)
        chunks, draws = cut_round(indices, sizes, self._augmentation, seed, self._rows)
        sides = [needed_sides(drawn.crops, resolution) for drawn in draws]
        work = list(zip(chunks, sides, draws, strict=True))
        masks: dict[int, np.ndarray] = {}
        feed.start(self._jobs(work, resolution, masks))
        for position, chosen in enumerate(chunks):
            if position == max(0, len(chunks) - 2):
                self._begin_expected()
            while True:
                try:
                    images = feed.next()
                    break
                except (RuntimeError, MemoryError) as error:
                    problem = self._explained(error, chosen, sides[position])
                    try:
                        if not (self._skip and isinstance(problem, BadImage)):
                            raise problem from None
                    finally:  # its traceback holds this frame and the feed: a cycle would stay
                        del problem
                del feed  # after an error DALI's pipeline is of no more use
                self._leave_out(self._undecodable(chosen, sides[position]))
                feed = self._build(self._form, resolution, largest_batch)
                feed.start(self._jobs(work, resolution, masks, position))
            if position == len(chunks) - 1:
                feed.finish()
                self._idle[resolution] = feed
            labels = self._labels[torch.from_numpy(chosen[masks.pop(position)])]
            if len(labels) or self._rows:
                yield images, to_device(labels, self._device)

    def _begin_expected(self) -> None:
        """Build the pipeline that the next round wants, beside the one in use and no other."""
        if self._expected is None:
            return
        resolution, largest_batch = self._expected
        self._expected = None
        idle = self._idle.get(resolution)
        if idle is None or idle.largest_batch < largest_batch:
            self._idle.clear()
            built = self._readers.submit(self._build, self._form, resolution, largest_batch)
            self._upcoming = (resolution, built)

    def _take_upcoming(self, resolution: int) -> None:
        """Keep the pipeline that was built during the round before, if it is the one wanted."""
        if self._upcoming is None:
            return
        (expected, built), self._upcoming = self._upcoming, None
        try:
            feed = built.result()
        except RuntimeError as error:  # beside the other; alone it may well fit
            if not lacks_memory(error):
                raise
        else:
            if expected == resolution:
                self._idle[resolution] = feed

    def _own(self, batch: int) -> int:
        """How many images of a batch this rank loads, 1 at least."""
        return batch if self._rows is None else max(1, len(range(batch)[self._rows(batch)]))

    def _build(self, form: Form, resolution: int, largest_batch: int) -> Feed:
        """A pipeline; raises UserError where DALI cannot use the GPU, if not for lack of memory."""
        try:
            return Feed(form, resolution, largest_batch, self._threads, self._device, self._readers)
        except RuntimeError as error:
            if self._device.type != "cuda" or lacks_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f'DALI cannot use this GPU ({reason}): set data.loader = "torch"'
            ) from None

    def _jobs(
        self,
        work: Sequence[_Work],
        resolution: int,
        masks: dict[int, np.ndarray],
        start: int = 0,
    ) -> Iterator[Job]:
        """What reads the batches from `start` on, one after another.

        A job also says in `masks`, by position, which of its batch's images are good.
        """
        for position in range(start, len(work)):
            masks[position] = np.ones(len(work[position][0]), dtype=bool)
            yield partial(self._read, *work[position], resolution, masks[position])

    def _read(
        self,
        chosen: np.ndarray,
        sides: np.ndarray,
        draws: Draws,
        resolution: int,
        good: np.ndarray,
    ) -> tuple[Sequence[np.ndarray] | np.ndarray, ...]:
        """What a pipeline takes of a batch; bad images are marked in `good`, and left out."""
        images = []
        for place, (index, side) in enumerate(zip(chosen.tolist(), sides.tolist(), strict=True)):
            try:
                if index in self._bad:
                    good[place] = False
                else:
                    images.append(self._image(index, side))
            except BadImage:
                if not self._skip:
                    raise
                good[place] = False
                self._leave_out([index])
        if images:
            draws = draws.only(good)
        else:  # DALI wants something to decode; the labels tell that it is nothing
            images, draws = [_NOTHING], PLAIN.draw(1, np.random.default_rng(0))
        return images, *self._augmentation.inputs(draws, resolution, images)

    def _image(self, index: int, side: int) -> np.ndarray:
        image = self._data.read(index, side)
        if isinstance(self._data, EncodedImages) and not self._checked[index]:
            try:
                check_header(image.tobytes())
            except DecodeError as error:
                raise self._data.bad_image(index, side, error) from None
            self._checked[index] = True
        return image

    def _leave_out(self, samples: Sequence[int]) -> None:
        self.left_out += samples
        self._bad.update(samples)

    def _explained(self, error: Exception, chosen: np.ndarray, sides: np.ndarray) -> Exception:
        """What to raise instead of DALI's own error."""
        reason = str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
        if lacks_memory(error):
            return torch.OutOfMemoryError(reason)
        if _CUDA_ERROR.search(str(error)):
            return UserError(f"DALI failed ({reason}): look at the GPU with nvidia-smi")
        culprit = next(iter(self._undecodable(chosen, sides)), None)
        if culprit is None or not isinstance(self._data, EncodedImages):
            return UserError(f'DALI failed ({reason}): set data.loader to "torch"')
        side = int(sides[np.flatnonzero(chosen == culprit)[0]])
        try:
            self._data.load(np.array([culprit]), side)
        except BadImage as named:
            return named
        return BadImage(
            f"DALI cannot decode {self._data.name(culprit, side)}: save it anew as JPEG or "
            'PNG, or set data.loader to "torch", which can'
        )

    def _undecodable(self, chosen: np.ndarray, sides: np.ndarray) -> list[int]:
        """The samples of these on which DALI fails; its errors often do not say which."""
        bad = []
        feed: Feed | None = None
        # Built outside of the try: that it cannot be built is no image's fault.
        for index, side in zip(chosen.tolist(), sides.tolist(), strict=True):
            if index in self._bad:
                continue
            feed = feed or self._build(self._plain, _TRIAL_SIDE, 1)
            try:
                image = self._data.read(index, side)
                feed.start(iter([partial(tuple, [[image]])]))
                feed.next()
                feed.finish()
            except BadImage:
                bad.append(index)
            except RuntimeError as error:
                if lacks_memory(error) or _CUDA_ERROR.search(str(error)):
                    raise
                feed = None
                bad.append(index)
        return bad


_NOTHING = encode_blank()
_CUDA_ERROR = re.compile("CUDA (runtime|driver) API error")
