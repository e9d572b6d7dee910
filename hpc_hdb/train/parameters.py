"""A model as one flat contiguous buffer, so that MPI and merges see a single vector."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from hpc_hdb.errors import UserError


class FlatModel:
    """Moves a model's parameters and floating-point buffers into one vector, in place.

    Parameters and buffers (batch-norm statistics) become views into `flat`: writing to it
    changes the model, training the model changes it. Integer buffers stay where they are.

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
        Floats of `flat` that are parameters; the buffers come behind them.
    signature : str
        Digest of names and shapes; equal for models that can take each other's buffer.

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
        digest = hashlib.sha256()
        for name, value in tensors.items():
            digest.update(f"{name}{tuple(value.shape)};".encode())
        self.signature = digest.hexdigest()[:16]
        device = next(iter(tensors.values())).device
        self.flat = torch.empty(sum(value.numel() for value in tensors.values()), device=device)
        self.trained = sum(value.numel() for value in model.parameters())
        offset = 0
        for value in tensors.values():
            view = self.flat[offset : offset + value.numel()].view(value.shape)
            view.copy_(value.detach())
            value.data = view
            offset += value.numel()
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

    def integer_buffers(self) -> dict[str, Tensor]:
        """The buffers that do not travel, by name."""
        return {
            name: value
            for name, value in self.model.named_buffers()
            if not value.is_floating_point()
        }
