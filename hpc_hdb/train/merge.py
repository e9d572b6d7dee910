"""How commits are merged into the global model: arithmetic on flat buffers.

Source: Lu et al., arXiv 2509.26092 (ASP and BSP with the model update factor); COMPSAC 2022
for `merge_compsac`. Each function writes into `out`, which may be one of its inputs, and
returns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Merge = Callable[[Tensor, Tensor, float, Tensor], Tensor]


def merge_weighted(model: Tensor, commit: Tensor, factor: float, out: Tensor) -> Tensor:
    """``w <- (w + f*w_i) / (1 + f)``.

    Parameters
    ----------
    model, commit, out : Tensor, shape (size,), float32
        Global model ``w``, committed model ``w_i``, and where the result goes.
    factor : float
        Model update factor ``f`` of the committing worker, positive.
    """
    return torch.lerp(model, commit, factor / (1 + factor), out=out)


def merge_compsac(model: Tensor, commit: Tensor, factor: float, out: Tensor) -> Tensor:
    """``w <- ((2 - f)*w + f*w_i) / 2``; parameters as in `merge_weighted`."""
    return torch.lerp(model, commit, factor / 2, out=out)


MERGES: dict[str, Merge] = {"weighted": merge_weighted, "compsac": merge_compsac}


def reduction_weights(factors: Sequence[float]) -> list[float]:
    """Weights of the workers in ``w <- sum(f_i*w_i) / sum(f_i)`` (BSP); they add up to 1."""
    total = sum(factors)
    return [factor / total for factor in factors]
