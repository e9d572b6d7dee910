"""Packed formats that DALI reads: WebDataset tar, TFRecord and RecordIO, of the same photographs.

Images per second of encoded bytes, not decoded: DALI's own reader of each format, with its
shuffling buffer, and the random reads of hpc-hdb's loader from WebDataset's tar files. Beside it
what decoding costs, to see whether the choice of the format matters.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import Sheet, arguments, hdb, image_folder, run
from nvidia.dali import fn, pipeline_def, tfrecord, types

from dali_pipelines.cyclic import READERS
from dali_pipelines.shards import Shards

WARM_UP = 20
"""Batches before the clock starts."""


def write_tfrecord(shards: Shards, folder: Path) -> None:
    """One TFRecord file of tf.train.Example messages, with DALI's index; checksums left zero."""
    with open(folder / "a.tfrecord", "wb") as file, open(folder / "a.idx", "w") as index:
        for sample, label in enumerate(shards.labels):
            image = field(1, field(1, shards.read(sample, 10**6).tobytes()))  # BytesList
            number = field(3, field(1, bytes([label])))  # Int64List, packed
            entries = (field(1, b"image") + field(2, image), field(1, b"label") + field(2, number))
            example = field(1, b"".join(field(1, entry) for entry in entries))
            start = file.tell()
            file.write(struct.pack("<QI", len(example), 0) + example + bytes(4))
            index.write(f"{start} {file.tell() - start}\n")


def field(number: int, value: bytes) -> bytes:
    """A field of bytes in a protocol buffer."""
    length, size = len(value), bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + value


def write_recordio(shards: Shards, folder: Path) -> None:
    """One RecordIO file with its index, as MXNet packs images."""
    with open(folder / "a.rec", "wb") as file, open(folder / "a.lst", "w") as index:
        for sample, label in enumerate(shards.labels):
            data = struct.pack("<IfQQ", 0, label, sample, 0) + shards.read(sample, 10**6).tobytes()
            index.write(f"{sample}\t{file.tell()}\n")
            file.write(struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4))


def pipeline_of(read: Callable[[], Any], options: argparse.Namespace, decode: bool) -> Any:
    """A pipeline that reads, and decodes if asked to."""

    @pipeline_def(batch_size=options.batch, num_threads=options.cores, device_id=None)
    def pipeline() -> Any:
        images = read()
        return fn.decoders.image(images, output_type=types.RGB) if decode else images

    built = pipeline()
    built.build()
    return built


def batches(read: Callable[[], Any], options: argparse.Namespace, decode: bool) -> Iterator[Any]:
    """What a pipeline gives, over and over."""
    built = pipeline_of(read, options, decode)
    while True:
        yield built.run()


def random_reads(shards: Shards, options: argparse.Namespace) -> Iterator[Any]:
    """Batches of a permutation, each image read by its place in a tar file."""
    generator = np.random.default_rng(0)
    with ThreadPoolExecutor(READERS) as readers:
        while True:
            order = generator.permutation(len(shards)).tolist()
            starts = range(0, len(order) - options.batch + 1, options.batch)
            chunks = [order[start : start + options.batch] for start in starts]
            yield from readers.map(lambda chunk: [shards.read(i, 10**6) for i in chunk], chunks)


def rate(source: Iterator[Any], options: argparse.Namespace) -> float:
    """Images per second in the steady state."""
    for _ in range(WARM_UP):
        next(source)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < options.seconds:
        next(source)
        count += options.batch
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=image_folder, default="data/imagenette", help="has train/")
    parser.add_argument("--batch", type=int, default=50, help="images in a batch")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each format")
    options = parser.parse_args()
    sheet = Sheet("shard_formats")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run([hdb(), "pack", options.data, folder / "packed"])
        shards = Shards(folder / "packed" / "train")
        write_tfrecord(shards, folder)
        write_recordio(shards, folder)
        tars = sorted(str(path) for path in (shards.folder / "original").glob("*.tar"))
        example = {"image": tfrecord.FixedLenFeature((), tfrecord.string, "")}
        shuffled = {"random_shuffle": True, "name": "reader"}

        def webdataset() -> Any:
            indices = [path.removesuffix("tar") + "idx" for path in tars]
            return fn.readers.webdataset(paths=tars, index_paths=indices, ext=["jpg"], **shuffled)

        def tf_records() -> Any:
            paths = {"path": str(folder / "a.tfrecord"), "index_path": str(folder / "a.idx")}
            return fn.readers.tfrecord(features=example, **paths, **shuffled)["image"]

        def record_io() -> Any:
            paths = {"path": str(folder / "a.rec"), "index_path": str(folder / "a.lst")}
            return fn.readers.mxnet(**paths, **shuffled)[0]

        formats: dict[str, tuple[Callable[[], Any], list[Path]]] = {
            "WebDataset tar": (webdataset, [Path(path) for path in tars]),
            "TFRecord": (tf_records, [folder / "a.tfrecord"]),
            "RecordIO": (record_io, [folder / "a.rec"]),
        }
        starts: dict[str, Callable[[], Iterator[Any]]] = {
            name: lambda read=read: batches(read, options, False)  # type: ignore[misc]
            for name, (read, _) in formats.items()
        }
        starts["hpc-hdb, from tar"] = lambda: random_reads(shards, options)
        starts["RecordIO, decoded"] = lambda: batches(record_io, options, True)
        rates: dict[str, list[float]] = {name: [] for name in starts}
        for _ in range(options.repeats):
            for name, start in starts.items():
                rates[name].append(rate(start(), options))
        megabytes = {
            name: f"{sum(path.stat().st_size for path in paths) / 1e6:.1f} MB"
            for name, (_, paths) in formats.items()
        }
    rows = []
    for name, found in rates.items():
        middle = statistics.median(found)
        rows.append([name, f"{middle:,.0f}", f"{1e6 / middle:.0f} us", megabytes.get(name, "")])
    sheet.table(["read by DALI", "images/s", "an image", "on disk"], rows)
    sheet.line(f"{len(shards.labels)} photographs, {options.cores} cores, from the page cache.")
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
