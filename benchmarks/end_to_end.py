"""CIFAR-10 trained conventionally, with the dual-batch plan, and hybrid, by `hdb train`.

The conventional peer is the same program with the large batch on every worker at the highest
resolution. All runs have the same seed, images and epochs. Unpack the archive of CIFAR-10 as
JPEG files (train/<class>/ and test/<class>/) into the folder that --data names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import HERE, Bar, Sheet, arguments, hdb, image_folder, mpirun

TIME_MODEL = Bar(0.05, most=True, percent=True)
OVERHEAD = Bar(0.05, most=True, percent=True)


@dataclass(frozen=True)
class Kind:
    """A way of training: the settings that make it."""

    name: str
    dual_batch: bool
    cyclic: bool


KINDS = (
    Kind("conventional", dual_batch=False, cyclic=False),
    Kind("dual-batch", dual_batch=True, cyclic=False),
    Kind("hybrid", dual_batch=True, cyclic=True),
)


def link_subset(data: Path, folder: Path, train: int) -> None:
    """Link the first `train` images of each class, and a fifth as many for the test."""
    for split, count in (("train", train), ("test", max(1, train // 5))):
        classes = sorted(entry for entry in (data / split).iterdir() if entry.is_dir())
        for source in classes:
            target = folder / split / source.name
            target.mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                (target / image.name).symlink_to(image.resolve())


def train(kind: Kind, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run under mpirun; its summary."""
    output = folder / f"{kind.name}-{seed}"
    values = {
        "data.path": folder / "data",
        "schedule.epochs": options.epochs,
        # Most epochs at the full rate, as in the paper; two at least to cycle through afterwards.
        "schedule.milestones": [options.epochs - max(2, options.epochs // 4)],
        "schedule.cyclic": json.dumps(kind.cyclic),
        "plan.small_workers": options.small_workers if kind.dual_batch else 0,
        "plan.timing": options.timing,
        "server.sync": options.sync,
        "run.seed": seed,
        "run.evaluate_every": options.evaluate_every,
        "run.checkpoint_every": options.epochs,
        "run.output": output,
    }
    overrides = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    command = [hdb(), "train", HERE / "end_to_end.toml", *overrides]
    print(f"training: {kind.name}, seed {seed} ...", file=sys.stderr)
    mpirun(1 + options.workers, command)
    return json.loads((output / "summary.json").read_text())


def epoch_seconds(summary: dict[str, Any], name: str) -> float:
    """Mean seconds of an epoch's training over the stages of a run."""
    stages = summary["stages"]
    lengths = [stage["end_epoch"] - stage["start_epoch"] for stage in stages]
    total = sum(
        stage[f"{name}_epoch_seconds"] * length
        for stage, length in zip(stages, lengths, strict=True)
    )
    return total / sum(lengths)


def row(name: str, runs: list[dict[str, Any]], peers: list[dict[str, Any]]) -> list[str]:
    """The table's row of one way of training."""
    accuracy, seconds, overhead = (
        statistics.median(run[key] for run in runs)
        for key in ("final_accuracy", "seconds", "overhead")
    )
    measured, predicted = (
        statistics.median(epoch_seconds(run, name) for run in runs)
        for name in ("measured", "predicted")
    )
    error = predicted / measured - 1
    points = accuracy - statistics.median(run["final_accuracy"] for run in peers)
    ratio = seconds / statistics.median(run["seconds"] for run in peers)
    return [
        name,
        f"{accuracy:.1%} ({100 * points:+.1f})",
        f"{seconds:.1f} s ({ratio:.2f}x)",
        f"{measured:.2f} s",
        f"{predicted:.2f} s ({error:+.1%}) {TIME_MODEL.verdict(abs(error))}",
        f"{overhead:.1%} {OVERHEAD.verdict(overhead)}",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--data",
        type=image_folder,
        default="data/cifar10-jpeg",
        help="folder with train/ and test/",
    )
    parser.add_argument("--images-per-class", type=int, default=500, help="to train with")
    parser.add_argument("--epochs", type=int, default=40, help="of each run")
    parser.add_argument("--workers", type=int, default=2, help="beside the server")
    parser.add_argument("--small-workers", type=int, default=1, help="with the small batch")
    parser.add_argument(
        "--timing",
        default="profile",
        help="plan.timing of every run; profile measures at its start",
    )
    parser.add_argument("--sync", default="asp", choices=["asp", "bsp", "ssp"], help="of commits")
    parser.add_argument("--evaluate-every", type=int, default=5, help="epochs")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each kind, by seed")
    options = parser.parse_args()
    if options.epochs < 4:
        parser.error("--epochs must be 4 or more: the rate drops once, and resolutions cycle twice")
    sheet = Sheet("end_to_end")
    runs: dict[str, list[dict[str, Any]]] = {kind.name: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        link_subset(options.data, folder / "data", options.images_per_class)
        for seed in range(options.repeats):
            for kind in KINDS:
                runs[kind.name].append(train(kind, seed, options, folder))
    peers = runs["conventional"]
    head = ["", "accuracy (points)", "time (ratio)", "epoch", "epoch predicted", "overhead"]
    sheet.table(head, [row(name, own, peers) for name, own in runs.items()])
    sheet.line(
        f"CIFAR-10, {options.images_per_class} images per class, resnet8, {options.epochs} epochs, "
        f"{options.workers} workers ({options.small_workers} small), {options.sync}; "
        f"medians of {options.repeats} run(s); in brackets against conventional."
    )
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
