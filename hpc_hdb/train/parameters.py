"""A model as one flat contiguous buffer, so that MPI and merges see a single vector."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from hpc_hdb.errors import UserError

_ALIGNMENT = 64
"""Floats: CUDA's own allocations begin at multiples of 256 bytes, which its kernels may rely on."""


class FlatModel:
    """Moves a model's parameters and floating-point buffers into one vector, in place.

    Parameters and buffers (batch-norm statistics) become views into `flat`: writing to it
    changes the model, training the model changes it. Integer buffers stay where they are. Each
    tensor begins at a multiple of 256 bytes, and zeros fill what lies between.

    Parameters
    ----------
    model : nn.Module
        All parameters and floating-point buffers float32, on one device.

    Attributes
    ----------
    flat : Tensor, shape (size,), float32
        On the model's device.
    wire : Tensor, shape (size,), float32
        What MPI sends from and receives into: `flat` itself on the CPU, else pinned host memory.
    trained : int
        Floats of `flat` that are parameters, or between them; the buffers come behind.
    signature : str
        Digest of names, shapes and layout; equal for models that can take each other's buffer.

    Raises
    ------
    UserError
        If a parameter is not float32.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        tensors: dict[str, Tensor] = {
            name: value
            for name, value in (*model.named_parameters(), *model.named_buffers())
            if value.is_floating_point()
        }
        for name, value in tensors.items():
            if value.dtype != torch.float32:
                raise UserError(
                    f"the model's {name} is {value.dtype}: build the model in float32 and set "
                    "train.precision for the arithmetic"
                )
        digest = hashlib.sha256(f"{_ALIGNMENT};".encode())
        for name, value in tensors.items():
            digest.update(f"{name}{tuple(value.shape)};".encode())
        self.signature = digest.hexdigest()[:16]
        device = next(iter(tensors.values())).device
        self.flat = torch.zeros(sum(map(_space, tensors.values())), device=device)
        self.trained = sum(map(_space, model.parameters()))
        offset = 0
        for value in tensors.values():
            view = self.flat[offset : offset + value.numel()].view(value.shape)
            view.copy_(value.detach())
            value.data = view
            offset += _space(value)
        self.wire = self.flat
        if device.type == "cuda":
            self.wire = torch.empty(self.flat.numel(), pin_memory=True)

    def to_wire(self) -> None:
        """Bring the model's present values into `wire`."""
        if self.wire is not self.flat:
            self.wire.copy_(self.flat)

    def from_wire(self) -> None:
        """Take over the values in `wire`."""
        if self.wire is not self.flat:
            self.flat.copy_(self.wire, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The model's, on the CPU; saved with torch, its floats are one vector there as well."""
        flat = self.flat.cpu()
        state = self.model.state_dict()
        own = self.flat.untyped_storage().data_ptr()
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if value.untyped_storage().data_ptr() == own:
                state[name] = flat.as_strided(value.shape, value.stride(), value.storage_offset())
            else:
                state[name] = value.cpu()
        return state

    def integer_buffers(self) -> dict[str, Tensor]:
        """The buffers that do not travel, by name."""
        return {
            name: value
            for name, value in self.model.named_buffers()
            if not value.is_floating_point()
        }


def _space(value: Tensor) -> int:
    """Floats that a tensor takes, with what lies between it and the next."""
    return -(-value.numel() // _ALIGNMENT) * _ALIGNMENT
