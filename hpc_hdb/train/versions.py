"""A server's versions of its slice of the model: a published version is never changed.

A commit is received and merged in a spare buffer, which then becomes the current version. So
replies still on their way, an evaluation and a checkpoint can all read the version they were
given, and a commit cut short by a dying worker leaves no trace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_hdb.cluster.link import SliceLink


class Versions:
    """The current version and a pool of spare buffers.

    Parameters
    ----------
    initial : Tensor, shape (size,), float32, on the CPU
    link : SliceLink
        Asked which buffers are still being sent.
    """

    def __init__(self, initial: Tensor, link: SliceLink) -> None:
        self.current = initial
        self._link = link
        self._buffers = [initial]
        self._holds: dict[int, int] = {}

    def spare(self) -> Tensor:
        """A buffer that nobody reads, of any content."""
        for buffer in self._buffers:
            if (
                buffer is not self.current
                and not self._holds.get(id(buffer))
                and not self._link.sending(buffer)
            ):
                return buffer
        self._buffers.append(torch.empty_like(self.current))
        return self._buffers[-1]

    def publish(self, buffer: Tensor) -> None:
        """Make `buffer`, obtained from `spare`, the current version."""
        self.current = buffer

    def hold(self) -> Tensor:
        """The current version, kept unchanged until `release`."""
        self._holds[id(self.current)] = self._holds.get(id(self.current), 0) + 1
        return self.current

    def holds(self, buffer: Tensor) -> bool:
        """Whether `buffer` is what `hold` returned, and not yet given back."""
        return self._holds.get(id(buffer), 0) > 0

    def release(self, buffer: Tensor) -> None:
        """Give back what `hold` returned."""
        self._holds[id(buffer)] -= 1
