"""Batch-norm statistics of a merged model, computed anew from training images.

The mean of several models' running statistics is not the statistics of their mean: activations
of the merged weights differ from those of any worker. Source: Izmailov et al., arXiv 1803.05407,
section 3.2, who recompute them for averaged weights; torch has it as `update_bn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from hpc_hdb.plan.cuts import split_evenly
from hpc_hdb.train.loader import Loader

_STREAM = 2**32 - 1
"""Sets the choice of images apart from the orders of the epochs, which the seed gives as well."""


class Recalibration:
    """Gives models the statistics of a fixed choice of training images.

    Parameters
    ----------
    loader : Loader
        Of the training split, without augmentation.
    samples : int
        Size of the training split.
    images : int
        How many of them are used; all where there are fewer.
    resolution : int
        Side of the images, in pixels: that of the evaluation.
    batch : int
        Largest number of images in a forward pass.
    seed : int
        Of the run; chooses the images.
    name : callable
        Where a sample's image is, to name bad ones.
    """

    def __init__(
        self,
        loader: Loader,
        samples: int,
        images: int,
        resolution: int,
        batch: int,
        seed: int,
        name: Callable[[int], str] = str,
    ) -> None:
        generator = np.random.default_rng([seed, _STREAM])
        self._chosen = generator.permutation(samples)[:images]
        self._loader = loader
        self._resolution = resolution
        self._batch = batch
        self._name = name

    def apply(self, model: nn.Module, go_on: Callable[[], None] = lambda: None) -> None:
        """Replace the statistics of `model`, in place; whatever they were does not matter.

        Parameters
        ----------
        go_on : callable
            Called before each batch; may raise.
        """

        def batches() -> Iterator[Tensor]:
            sizes = split_evenly(len(self._chosen), self._batch)
            for images, _ in self._loader.batches(self._chosen, sizes, self._resolution, 0):
                go_on()
                yield images

        update_bn(batches(), model)

    def left_out(self) -> list[str]:
        """Names of the bad images left out since this was last called."""
        samples, self._loader.left_out = self._loader.left_out, []
        return [self._name(sample) for sample in samples]
