"""Files that are there whole, or not at all, whenever the process or the machine ends."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its name, flush it to disk, and rename it.

    Raises
    ------
    OSError
        If the disk fails. What was under `path` before is still there.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        replace_flushed(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def replace_flushed(part: Path, path: Path) -> None:
    """Rename `part`, once it is on disk, and flush the folder, so that its new name is as well."""
    _flush(part)
    part.replace(path)
    try:
        _flush(path.parent)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # of file systems that flush no folders
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
