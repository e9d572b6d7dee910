"""Small tensors on their way to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values`, which are on the CPU, on a device, without waiting for what it is computing.

    From memory that is not pinned, CUDA copies only once all work before is done.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
