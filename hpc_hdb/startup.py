"""A start that takes less time."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Import without garbage collection, then or later, of what is imported here.

    Modules stay until the end. Looking through a million objects of torch's for garbage, a
    hundred times at the start and once more at the end, takes a fifth of what its import takes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
