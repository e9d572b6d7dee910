"""Packed image folders: WebDataset tar files with an index for random access.

A packed split is a folder::

    manifest.json       task, classes, shards, checksums, images left out
    names.txt           the source file of each sample, one a line
    index-VARIANT.npy   where each sample's bytes are
    VARIANT/00000.tar   members KEY.jpg (or KEY.png ...) and KEY.cls, the label in ASCII
    VARIANT/00000.idx   the index that ``nvidia.dali.fn.readers.webdataset`` takes

``original`` holds the source files' own bytes; a variant named by a number holds JPEG copies
whose shorter side has at most that many pixels, which decode faster. Sample ``i`` is the same
picture in every variant. Needs neither DALI nor hpc_hdb.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipelines.files import replace_flushed, write_whole

ORIGINAL = "original"
INDEX = np.dtype([("shard", "<i4"), ("label", "<i4"), ("offset", "<i8"), ("size", "<i8")])
"""One sample in ``index-VARIANT.npy``: offset and size in bytes, within the shard's file."""

_VERSION = 2
_OPEN_FILES = 256
"""Kept open at once: well below the 1,024 that most systems permit a process."""
_BLOCK = 1 << 20
_LOADING = threading.Lock()
"""Held while an index is loaded: Python 3.11 now and then fails to parse headers in two threads."""


class ShardError(Exception):
    """A packed folder that cannot be read, in one line for the user."""


class _File:
    """A file descriptor, closed once nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Shards:
    """A packed split, opened for reading at random.

    Parameters
    ----------
    folder : Path
        Of the split, with its ``manifest.json``.

    Attributes
    ----------
    classes : list of str
    labels : ndarray, shape (n,), int64
        Positions in `classes`.
    encoded : bool
        True: `read` gives the bytes of files.
    sides : list of int
        Shorter sides, in pixels, of the variants beside the originals, rising.

    Raises
    ------
    ShardError
        If there is no complete packed split.
    """

    encoded = True

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.classes: list[str] = manifest["classes"]
        shards = manifest["shards"]
        self.sides = sorted(int(name) for name in manifest["variants"] if name != ORIGINAL)
        self._has_originals = ORIGINAL in manifest["variants"]
        self._indices: dict[str, np.ndarray] = {}
        self._paths: dict[str, list[str]] = {
            variant: [str(self.folder / variant / f"{shard['name']}.tar") for shard in shards]
            for variant in manifest["variants"]
        }
        self._manifest = manifest
        self.labels = self._index(manifest["variants"][0])["label"].astype(np.int64)
        self._open = lru_cache(_OPEN_FILES)(_File)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder,)

    def __len__(self) -> int:
        return len(self.labels)

    def variant(self, side: int) -> str:
        """The variant that costs least to decode and has shorter sides of `side` pixels."""
        for packed in self.sides:
            if packed >= side:
                return str(packed)
        return ORIGINAL if self._has_originals else str(self.sides[-1])

    def read(self, sample: int, side: int) -> np.ndarray:
        """The encoded image of a sample, its shorter side of `side` pixels or more where it has.

        Returns
        -------
        ndarray, shape (bytes,), uint8

        Raises
        ------
        ShardError
            If the shard is gone or too short.
        """
        variant = self.variant(side)
        shard, _, offset, size = self._index(variant)[sample].item()
        path = self._paths[variant][shard]
        try:
            file = self._open(path)  # kept: else it may be closed before it is read
            data = os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise ShardError(f"cannot read {path}: {error.strerror}") from None
        if len(data) != size:
            raise ShardError(f"{path} is shorter than its index says: pack it again")
        return np.frombuffer(data, dtype=np.uint8)

    def name(self, sample: int, side: int) -> str:
        """Where a sample is, and what file it was packed from, for messages."""
        variant = self.variant(side)
        source = f"sample {sample}"
        with (
            suppress(OSError),
            open(self.folder / "names.txt", encoding="utf-8", errors="surrogateescape") as lines,
        ):
            source = next(islice(lines, sample, None), source)
        return f"{source.rstrip()} in {self._paths[variant][self._index(variant)['shard'][sample]]}"

    def _index(self, variant: str) -> np.ndarray:
        if variant not in self._indices:
            with _LOADING:
                if variant not in self._indices:
                    self._indices[variant] = self._load_index(variant)
        return self._indices[variant]

    def _load_index(self, variant: str) -> np.ndarray:
        path = self.folder / f"index-{variant}.npy"
        try:
            check_file(path, self._manifest["indices"][variant])
            index = np.load(path, mmap_mode="r")
            if index.dtype != INDEX:
                raise ValueError(f"{path} is no index")
        except (OSError, ValueError) as error:
            raise ShardError(f"{error}: pack the folder again") from None
        return index


@dataclass
class ShardRecord:
    """What a written shard holds; `index` has one entry of `INDEX` per sample, by variant."""

    name: str
    sources: list[str]
    labels: list[int]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Files left out, and why."""
    places: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Offset and size of each sample's image, by variant."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``bytes`` and ``sha256`` of the tar file, by variant; and of its index, as ``index``."""


def write_shard(
    folder: Path, name: str, samples: Iterator[tuple[str, int, Mapping[str, tuple[str, bytes]]]]
) -> ShardRecord:
    """Write one shard in all variants, each with its index: whole, or not at all.

    Parameters
    ----------
    folder : Path
        Of the split.
    name : str
        Of the shard, such as ``00000``.
    samples : iterator
        Of source file, label, and for each variant the file's suffix without dot and its bytes.
    """
    record = ShardRecord(name, [], [])
    tars: dict[str, tarfile.TarFile] = {}
    lines: dict[str, list[str]] = {}
    with ExitStack() as opened:
        for source, label, images in samples:
            key = f"{name}{len(record.sources):06d}"
            record.sources.append(source)
            record.labels.append(label)
            for variant, (suffix, data) in images.items():
                if variant not in tars:
                    (folder / variant).mkdir(parents=True, exist_ok=True)
                    part = folder / variant / f"{name}.tar.part"
                    tar = tarfile.open(part, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                    tars[variant] = opened.enter_context(tar)
                    lines[variant] = []
                    record.places[variant] = []
                image = _add(tars[variant], f"{key}.{suffix}", data)
                text = _add(tars[variant], f"{key}.cls", str(label).encode())
                record.places[variant].append(image)
                members = [(suffix, *image, f"{key}.{suffix}"), ("cls", *text, f"{key}.cls")]
                lines[variant].append(" ".join(f"{e} {o} {s} {n}" for e, o, s, n in members))
    for variant, entries in lines.items():
        path = folder / variant / f"{name}.tar"
        part = path.with_suffix(".tar.part")
        index = "\n".join([f"v1.2 {len(entries)}", *entries, ""]).encode()
        record.files[variant] = {
            "bytes": part.stat().st_size,
            "sha256": checksum(part),
            "index": _seal(index),
        }
        replace_flushed(part, path)
        write_whole(path.with_suffix(".idx"), index)
    return record


def write_manifest(
    folder: Path,
    classes: Sequence[str],
    records: Sequence[ShardRecord],
    task: Mapping[str, Any],
) -> None:
    """Make the shards of `records`, in their order, a packed split.

    `task` is kept, for who packs to know its own work again.
    """
    variants = sorted({variant for record in records for variant in record.files})
    indices = {}
    for variant in variants:
        entries = [
            (number, label, offset, size)
            for number, record in enumerate(records)
            for label, (offset, size) in zip(record.labels, record.places[variant], strict=True)
        ]
        buffer = io.BytesIO()
        np.save(buffer, np.array(entries, dtype=INDEX))
        write_whole(folder / f"index-{variant}.npy", buffer.getvalue())
        indices[variant] = _seal(buffer.getvalue())
    lines = "".join(f"{source}\n" for record in records for source in record.sources)
    names = lines.encode("utf-8", "surrogateescape")
    write_whole(folder / "names.txt", names)
    manifest: dict[str, Any] = {
        "format": "webdataset",
        "version": _VERSION,
        "task": dict(task),
        "classes": list(classes),
        "samples": sum(len(record.sources) for record in records),
        "variants": variants,
        "shards": [
            {"name": record.name, "samples": len(record.sources), "files": record.files}
            for record in records
        ],
        "skipped": [list(item) for record in records for item in record.skipped],
        "indices": indices,
        "names": _seal(names),
    }
    manifest["sha256"] = _manifest_checksum(manifest)
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed split; raises ShardError where there is no whole one."""
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["format"] != "webdataset" or manifest["version"] != _VERSION:
            raise ShardError(f"{path} is of another version: pack the folder again")
        if manifest["sha256"] != _manifest_checksum(manifest):
            raise ValueError("its checksum is wrong")
        return manifest
    except FileNotFoundError:
        raise ShardError(
            f"{folder} is not a packed folder, or packing it has not ended: see hdb pack --help"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{path} is damaged ({error}): pack the folder again") from None


def check_shard(folder: Path, shard: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files of one entry of a manifest's ``shards``; empty if nothing."""
    files = []
    for variant, expected in shard["files"].items():
        path = folder / variant / f"{shard['name']}.tar"
        files += [(path, expected), (path.with_suffix(".idx"), expected["index"])]
    return _problems(files)


def check_indices(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files of a packed split beside its shards; empty if nothing."""
    files = [(folder / f"index-{name}.npy", seal) for name, seal in manifest["indices"].items()]
    return _problems([*files, (folder / "names.txt", manifest["names"])])


def check_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless a file has the ``bytes`` and ``sha256`` it is expected to have."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{path} has {size} bytes instead of {expected['bytes']}")
        if checksum(path) != expected["sha256"]:
            raise ValueError(f"{path} does not match its checksum")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _problems(files: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[str]:
    problems = []
    for path, expected in files:
        try:
            check_file(path, expected)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _seal(data: bytes) -> dict[str, Any]:
    """What `check_file` expects of a file of these bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says, but of itself."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Add a member; its data's offset and size."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))
    end = tar.offset
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return end - padded, len(data)
