"""What lacks memory says so in many ways; what is done about it is in one place."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hpc_hdb.errors import UserError

_SIGNS = re.compile(
    r"out of memory|ALLOC(ATION|ATOR)?_FAIL|cudaErrorMemoryAllocation|allocation failed"
    r"|can't allocate",
    re.IGNORECASE,
)
"""In errors of CUDA, cuDNN, cuBLAS, DALI and torch on the CPU, which have no type of their own."""


def lacks_memory(error: BaseException) -> bool:
    """Whether memory, of the GPU or the machine, did not suffice."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or bool(_SIGNS.search(str(error)))


def free_memory(device: torch.device) -> None:
    """Give back what torch and DALI hold of a GPU's memory and do not use.

    Neither can use what the other one holds.
    """
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
    dali = sys.modules.get("nvidia.dali.backend")
    if dali is not None:
        dali.ReleaseUnusedMemory()


@contextmanager
def room_for(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """For the time in which `what` takes memory of `device`: a lack of it is a UserError.

    Parameters
    ----------
    what : str
        Begins the message.
    advice : str
        Ends it: what the user can do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        where = "GPU" if device.type == "cuda" else "memory"
        raise UserError(f"{what} does not fit the {where}: {advice}") from None
