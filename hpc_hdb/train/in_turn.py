"""The ranks that share a worker's batches, one after another in one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hpc_hdb.plan.cuts import rows_of
from hpc_hdb.train.model import set_rows


def backward_in_turn(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ranks: int,
    backward: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    """Add up the gradients that `ranks` would have of their rows of a batch.

    Each normalises over its own rows, with the same random numbers, and the mean of their running
    statistics remains: as of ranks side by side, which average them before they commit.

    Parameters
    ----------
    images : Tensor, shape (b, 3, r, r), float32
    labels : Tensor, shape (b,), int64
    backward : callable
        Given a rank's images, labels and part of the batch, it adds to the gradients and returns
        the rank's totals.

    Returns
    -------
    Tensor
        The sum of the totals.
    """
    batch = len(labels)
    parts = [rows_of(batch, rank, ranks) for rank in range(min(ranks, batch))]
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
    means = [buffer * (1 - len(parts) / ranks) for buffer in statistics]
    devices = [images.device] if images.device.type == "cuda" else []
    totals = torch.zeros(2, device=images.device)
    for rows in parts:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        set_rows(model, batch, rows.start)
        with torch.random.fork_rng(devices, enabled=rows.stop < batch):
            totals += backward(images[rows], labels[rows], (rows.stop - rows.start) / batch)
        for mean, buffer in zip(means, statistics, strict=True):
            mean += buffer / ranks
    for mean, buffer in zip(means, statistics, strict=True):
        buffer.copy_(mean)
    return totals
