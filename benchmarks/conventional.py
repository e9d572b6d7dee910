"""An epoch of all-reduce training, of PyTorch's DDP, and of BSP dual-batch training.

All three train the same model on the same images in memory with the same loader on the same
number of ranks that train, and talk over TCP on the loopback device, whose counters tell the
bytes on the wire. The peer is DistributedDataParallel over gloo, as a user writes it. Dual-batch
training has a server beside them and commits once an epoch. Run it on an idle machine: whatever
else uses the loopback device counts as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from common import HERE, Bar, Sheet, arguments, last_json, mpirun, run

DDP = Bar(1.1, most=True)
TCP = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "lo"}
"""As between nodes; by itself Open MPI would use shared memory."""


def settings(options: argparse.Namespace) -> dict[str, object]:
    """What all runs have in common."""
    return {
        "data.source": "synthetic",
        "data.synthetic_samples": options.samples,
        "data.synthetic_side": 32,
        "model.name": options.model,
        "plan.timing": f"{{ 32 = [{options.seconds_per_image}, {options.overhead}] }}",
        "plan.time_ratio": 1.05,
        "schedule.epochs": options.epochs,
        "schedule.learning_rate": 0.01,
        "schedule.large_batch": [options.batch],
        "train.precision": "fp32",
        "train.device": "cpu",  # as its peer
        "run.threads": 1,
        "run.checkpoint_every": options.epochs,
        "run.evaluate_every": options.epochs,
    }


def sets(values: dict[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def loopback_bytes() -> int:
    """Bytes that the loopback device has carried so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    sys.exit("no loopback device to count bytes on")


def hdb(kind: str, ranks: int, folder: Path, values: dict[str, object]) -> list[float]:
    """Seconds of each epoch but the first of an ``hdb train``, between its last commits."""
    empty = folder / "empty.toml"
    empty.touch()
    values |= {"run.output": folder / kind}
    command = Path(sys.executable).with_name("hdb")
    program = str(command) if command.exists() else "hdb"
    mpirun(ranks, ["env", *(f"{k}={v}" for k, v in TCP.items()), program, "train", empty,
                   *sets(values)])  # fmt: skip
    events = map(json.loads, (folder / kind / "events.jsonl").read_text().splitlines())
    ends = {event["epoch"]: event["time"] for event in events if event["event"] == "commit"}
    return [end - start for start, end in pairwise(ends.values())]


def ddp(ranks: int, options: argparse.Namespace) -> list[float]:
    """Seconds of each epoch but the first of the peer."""
    record = run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={ranks}", HERE / "conventional_ddp.py"),
            *(f"--model={options.model}", f"--samples={options.samples}"),
            *(f"--batch={options.batch}", f"--epochs={options.epochs}"),
        ]
    )
    return last_json(record)["seconds"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="that train")
    parser.add_argument("--model", default="resnet18", help="to train")
    parser.add_argument("--samples", type=int, default=256, help="images of 32x32 in an epoch")
    parser.add_argument("--batch", type=int, default=64, help="of each rank")
    parser.add_argument("--epochs", type=int, default=3, help="of each run; the first warms up")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each kind, in turn")
    parser.add_argument("--seconds-per-image", type=float, default=0.03, help="for the plan")
    parser.add_argument("--overhead", type=float, default=0.06, help="for the plan")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be 2 or more: the first one warms up")
    common, ranks = settings(options), options.ranks
    bsp = common | {"server.sync": "bsp", "plan.small_workers": max(1, ranks // 2)}
    seconds: dict[str, list[float]] = {}
    carried: dict[str, list[float]] = {}
    for number in range(options.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kinds = {
                "all-reduce (Horovod)": lambda folder=folder: hdb(
                    "all-reduce", ranks, folder, common | {"server.sync": "allreduce"}
                ),
                "DDP (gloo)": lambda: ddp(ranks, options),
                "BSP dual-batch": lambda folder=folder: hdb("bsp", ranks + 1, folder, bsp),
            }
            for kind, train in kinds.items():
                print(f"{kind}, run {number + 1} ...", file=sys.stderr)
                before = loopback_bytes()
                seconds.setdefault(kind, []).extend(train())
                spent = (loopback_bytes() - before) / options.epochs
                carried.setdefault(kind, []).append(spent)
    sheet = Sheet("conventional")
    peer = statistics.median(seconds["DDP (gloo)"])
    rows = []
    for kind, times in seconds.items():
        ratio = statistics.median(times) / peer
        ours = kind.startswith("all-reduce")
        rows.append(
            [
                kind,
                f"{statistics.median(times):.2f} s",
                f"{options.samples / statistics.median(times):.1f}",
                f"{ratio:.2f}x",
                f"{statistics.median(carried[kind]) / 1e6:.0f} MB",
                DDP.verdict(ratio) if ours else "",
            ]
        )
    sheet.table(["", "epoch", "images/s", "of DDP's time", "on the wire per epoch", ""], rows)
    sheet.line(
        f"{options.model}, {options.samples} images of 32x32, {ranks} ranks that train, batches of "
        f"{options.batch} a rank, over TCP; medians of {options.repeats} run(s) of "
        f"{options.epochs} epochs without the first; bytes of a whole run by its epochs."
    )
    if options.save:
        sheet.save()


if __name__ == "__main__":
    main()
