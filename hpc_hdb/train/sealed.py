"""Files of torch that hold a checksum of all their bytes, and are there whole or not at all.

Such a file is the zip archive that ``torch.save`` writes, with the SHA-256 of everything before
it as the archive's comment, so that ``torch.load`` and ``unzip`` read it like any other. It is
written beside its final name, flushed to disk, and renamed. Reading it verifies the checksum
before anything is parsed, and loads with ``weights_only``, so that nothing is ever executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import IO, Any

import torch

from dali_pipelines.files import replace_flushed

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_LENGTH = struct.Struct("<H")
"""Of the comment, in the last two bytes of an archive that has none."""
_BLOCK = 1 << 20


class DamagedFile(Exception):
    """What is wrong with a file, in a few words."""


class _Summed:
    """A file that is written from start to end, and the checksum of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.checksum = hashlib.sha256()
        self._file = file

    def write(self, data: bytes) -> int:
        self.checksum.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_sealed(path: Path, value: Any, durable: bool = True) -> None:
    """Save `value` with torch under `path`, whole or not at all.

    Parameters
    ----------
    value : object
        Of tensors, plain values, and lists and dicts of such: anything else cannot be read back.
    durable : bool
        Also flush to disk, so that it survives the machine and not only the process.

    Raises
    ------
    OSError, RuntimeError
        If the disk fails; torch hides some OSErrors in the latter's ``__context__``. What was
        under `path` before is still there.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        with open(unfinished, "wb") as file:
            summed = _Summed(file)
            torch.save(value, summed)  # type: ignore[arg-type]
            file.seek(-_LENGTH.size, os.SEEK_END)
            file.write(_LENGTH.pack(_COMMENT) + _MARK + summed.checksum.hexdigest().encode())
        if durable:
            replace_flushed(unfinished, path)
        else:
            unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def read_sealed(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `write_sealed` saved, its tensors on `device`.

    Raises
    ------
    FileNotFoundError
    DamagedFile
        If it cannot be read, a single bit of it has changed, or loading it would execute code.
    """
    try:
        with _open(path) as file:
            _verify(file)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except (FileNotFoundError, DamagedFile):
        raise
    except OSError as error:
        raise DamagedFile(error.strerror or str(error)) from None
    except pickle.UnpicklingError:
        raise DamagedFile("it holds code, which is not executed") from None
    except Exception as error:  # such a file raises whatever its bytes lead to
        raise DamagedFile(str(error).split("\n")[0][:120]) from None


def _open(path: Path) -> IO[bytes]:
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise DamagedFile("it is no file")
    return open(path, "rb")


def _verify(file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    end = size - _COMMENT - _LENGTH.size
    file.seek(max(0, end))
    tail = file.read()
    length, comment = tail[: _LENGTH.size], tail[_LENGTH.size :]
    if end < 0 or length != _LENGTH.pack(_COMMENT) or not comment.startswith(_MARK):
        raise DamagedFile("it is cut short, or no file of hpc-hdb")
    checksum = hashlib.sha256()
    file.seek(0)
    while end > 0:
        block = file.read(min(_BLOCK, end))
        if not block:
            raise DamagedFile("it is cut short")
        checksum.update(block)
        end -= len(block)
    checksum.update(_LENGTH.pack(0))
    if comment[len(_MARK) :] != checksum.hexdigest().encode():
        raise DamagedFile("its checksum is wrong")
