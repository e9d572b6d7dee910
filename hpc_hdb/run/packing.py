"""``hdb pack`` and ``hdb verify``: an image folder as a few large files, and their check.

A shard is written by one process from one slice of a fixed, shuffled order of the files, so memory
is bounded by one image a process, a restart goes on at the first shard that is missing, and a
sequential reader of the shards meets the classes mixed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipelines.files import write_whole
from dali_pipelines.shards import (
    ORIGINAL,
    ShardError,
    ShardRecord,
    check_indices,
    check_shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from hpc_hdb.errors import UserError
from hpc_hdb.run.smaller_copies import smaller_copies
from hpc_hdb.train.decode import DecodeError, decode
from hpc_hdb.train.folders import find_images

_SEED = 0
"""Of the order of files: packing again gives the same shards."""

Advance = Callable[[int], None]
"""Told how many images have been dealt with."""


@dataclass(frozen=True)
class PackedSplit:
    """A split that `pack_split` has packed: figures for the user."""

    folder: Path
    samples: int
    shards: int
    size: int
    """In bytes, over all variants."""
    skipped: list[tuple[str, str]]
    """Files left out, and why."""
    passed_over: str
    """One line on files whose names are not those of images; empty where there are none."""
    before: bool
    """Whether an earlier call had done it all."""


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    source: Path
    folder: Path
    name: str
    files: list[str]
    labels: list[int]
    sides: tuple[int, ...]
    originals: bool

    @property
    def record(self) -> Path:
        return self.folder / "parts" / f"{self.name}.json"


def splits_of(folder: Path) -> list[str]:
    """The splits of an image folder, or of a packed one: train, and val or test.

    Raises
    ------
    UserError
        If there are none.
    """
    found = [name for name in ("train", "val", "test") if (folder / name).is_dir()]
    if not found:
        raise UserError(f"{folder} has no train/, val/ or test/ folder")
    return found


def pack_split(
    source: Path,
    folder: Path,
    sides: Sequence[int],
    originals: bool,
    per_shard: int,
    processes: int,
    begin: Callable[[int], None],
    advance: Advance,
) -> PackedSplit:
    """Pack ``source/<class>/<image>`` into `folder`; goes on where an earlier call was cut off.

    Parameters
    ----------
    sides : sequence of int
        Shorter sides, in pixels, of smaller copies to write beside, or instead of, the originals.
    originals : bool
        Whether to pack the files' own bytes.
    per_shard : int
        Images in a shard.
    processes : int
        That read, decode and write at the same time.
    begin, advance : callable
        Told the number of images, and how many more are done.

    Raises
    ------
    UserError
        If there is nothing to pack, or `folder` holds something else.
    """
    classes, labels, paths, passed_over = find_images(source)
    files = [os.path.relpath(path, source) for path in paths]
    task = {
        "images": _digest(files),
        "sides": sorted(sides),
        "originals": originals,
        "per_shard": per_shard,
    }
    begin(len(files))
    if _is_done(folder, task):
        advance(len(files))
        return _described(folder, passed_over, before=True)
    _begin(folder, task)
    order = np.random.default_rng(_SEED).permutation(len(files))
    jobs = [
        _Job(
            source,
            folder,
            f"{number:05d}",
            [files[index] for index in chosen],
            [int(labels[index]) for index in chosen],
            tuple(sorted(sides)),
            originals,
        )
        for number, chosen in enumerate(np.split(order, range(per_shard, len(order), per_shard)))
    ]
    records = {}
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {}
        for job in jobs:
            if (record := _finished(job)) is not None:
                records[job.name] = record
                advance(len(job.files))
            else:
                running[pool.submit(_pack_shard, job)] = job
        try:
            for future in as_completed(running):
                job = running.pop(future)
                records[job.name] = future.result()
                advance(len(job.files))
        except OSError as error:  # of writing: what cannot be read is left out
            pool.shutdown(cancel_futures=True)
            raise UserError(
                f"cannot write into {folder}: {error.strerror}: make room there, then start the "
                "same command again"
            ) from None
    ordered = [records[job.name] for job in jobs if records[job.name].sources]
    if not ordered:
        raise UserError(f"none of the {len(files)} images of {source} can be decoded")
    write_manifest(folder, classes, ordered, task)
    shutil.rmtree(folder / "parts")
    return _described(folder, passed_over, before=False)


def verify_split(folder: Path, begin: Callable[[int], None], advance: Advance) -> list[str]:
    """What is wrong with a packed split, a line each; empty if nothing.

    Raises
    ------
    UserError
        If it is not a packed split.
    """
    try:
        manifest = read_manifest(folder)
    except ShardError as error:
        raise UserError(str(error)) from None
    shards = manifest["shards"]
    begin(len(shards))
    problems = check_indices(folder, manifest)
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        for found in pool.map(lambda shard: check_shard(folder, shard), shards):
            problems += found
            advance(1)
    return problems


def _is_done(folder: Path, task: dict[str, Any]) -> bool:
    """Whether `folder` is packed with this task; raises UserError where with another one."""
    if not (folder / "manifest.json").exists():
        return False
    try:
        same = read_manifest(folder).get("task") == task
    except ShardError as error:
        raise UserError(f"{error} (remove {folder} first)") from None
    if not same:
        raise UserError(
            f"{folder} is packed already, from other images or with other options: remove it, or "
            "pack elsewhere"
        )
    shutil.rmtree(folder / "parts", ignore_errors=True)  # of a call killed at its very end
    return True


def _described(folder: Path, passed_over: str, before: bool) -> PackedSplit:
    manifest = read_manifest(folder)
    files = [file for shard in manifest["shards"] for file in shard["files"].values()]
    return PackedSplit(
        folder,
        manifest["samples"],
        len(manifest["shards"]),
        sum(file["bytes"] for file in files),
        manifest["skipped"],
        passed_over,
        before,
    )


def _begin(folder: Path, task: dict[str, Any]) -> None:
    """Claim `folder` for this task, or find it claimed for the same one."""
    begun = folder / "parts" / "task.json"
    if begun.exists():
        try:
            same = json.loads(begun.read_bytes()) == task
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{begun} is damaged ({error}): remove {folder}, and pack it again"
            ) from None
        if not same:
            raise UserError(
                f"{folder} was begun with other images or options: remove it, or pack elsewhere"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: pack into a new folder")
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_whole(begun, json.dumps(task).encode())


def _digest(files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file) + b"\0")
    return digest.hexdigest()


def _finished(job: _Job) -> ShardRecord | None:
    """The record of a shard that is written already, and whole."""
    try:
        values = json.loads(job.record.read_bytes())
        if values.pop("sha256") != _record_checksum(values):
            return None
        return ShardRecord(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # missing, or damaged: the shard is written again


def _record_checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _pack_shard(job: _Job) -> ShardRecord:
    skipped: list[tuple[str, str]] = []
    record = write_shard(job.folder, job.name, _samples(job, skipped))
    record.skipped = skipped
    values = asdict(record)
    values["sha256"] = _record_checksum(values)
    write_whole(job.record, json.dumps(values).encode())
    return record


def _samples(
    job: _Job, skipped: list[tuple[str, str]]
) -> Iterator[tuple[str, int, dict[str, tuple[str, bytes]]]]:
    """The images of a shard that can be decoded; the others go into `skipped`."""
    for file, label in zip(job.files, job.labels, strict=True):
        path = job.source / file
        try:
            data = path.read_bytes()
            picture = decode(data)
        except FileNotFoundError:
            skipped.append((file, "has vanished"))
            continue
        except (OSError, DecodeError) as error:
            skipped.append((file, str(error)))
            continue
        suffix = path.suffix[1:].lower().replace("jpeg", "jpg")
        images = {ORIGINAL: (suffix, data)} if job.originals else {}
        for side, copy in smaller_copies(data, picture, job.sides).items():
            images[str(side)] = ("jpg", copy) if copy else (suffix, data)
        yield file, label, images
