"""Whatever bytes a file holds that hdb reads: it is refused by its name, and never executed.

Real files of each kind are cut short, overwritten, exchanged for others and have bits flipped;
then the reader of their kind either refuses them as a user would see it, or what it returns is
fit for use.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run, succeed
from endings import (
    CONFIGURATION,
    SIMULATE,
    Job,
    checkpoints,
    contents,
    refused,
    sets,
    write_configuration,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from dali_pipelines.shards import ShardError, Shards
from hpc_hdb.config_files import load_settings, parse_settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, fit_batch_time
from hpc_hdb.plan.network import ASSUMED
from hpc_hdb.report.html import report_page
from hpc_hdb.report.report import Report, draw_plots
from hpc_hdb.report.runs import load_runs
from hpc_hdb.run.folder import RunFolder
from hpc_hdb.run.lock import HEARTBEAT, FolderLock
from hpc_hdb.run.network import find_network, write_network
from hpc_hdb.run.packing import verify_split
from hpc_hdb.run.site import load_site
from hpc_hdb.train.checkpoint import (
    BEST,
    load_best,
    load_checkpoint,
    load_worker_state,
    note_lost_states,
)
from hpc_hdb.train.decode import DecodeError, decode
from hpc_hdb.train.profile import Timing, read_timing, write_timing
from hpc_hdb.train.sealed import DamagedFile, read_sealed, write_sealed

SITE = 'account = "me"\ntime = "2:00:00"\ngpus_per_node = 4\nmodules = ["hpc-hdb"]\n'
PACKED = "packed/train"


@dataclass(frozen=True)
class Real:
    """A folder with a real file of each kind, and its bytes."""

    folder: Path
    files: dict[str, bytes]
    signature: str

    def put(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    folder = tmp_path_factory.mktemp("real")
    write_configuration(folder)
    succeed(*SIMULATE, *sets("model.name=resnet8", "run.keep_checkpoints=1"), cwd=folder)
    for label, name in enumerate(("ant", "bee")):
        for split in ("train", "val"):
            images = folder / "images" / split / name
            images.mkdir(parents=True)
            for number in range(4):
                side = np.full((12, 12, 3), 40 * number + label, dtype=np.uint8)
                Image.fromarray(side).save(images / f"{number}.jpg")
    succeed("hdb", "pack", "images", "packed", cwd=folder)
    fit = fit_batch_time([4, 8, 16], [0.01, 0.014, 0.022])
    write_timing(
        folder / "timing.json", {16: Timing(fit, 64, [(4, 0.01), (8, 0.014)])}, {"device": "cpu"}
    )
    write_network(folder / "network.json", ASSUMED, {"ranks": 3})
    (folder / "site.toml").write_text(SITE)
    with RunFolder.reopen(folder / "out", False, print)[0]:
        shutil.copy(folder / "out" / HEARTBEAT, folder / "heartbeat")
    (folder / "out" / HEARTBEAT).write_bytes((folder / "heartbeat").read_bytes())
    shutil.copytree(folder / "out", folder / "out2")
    before = os.getcwd()
    os.chdir(folder)
    os.environ["HDB_SITE"] = str(folder / "site.toml")
    [newest] = checkpoints(folder / "out")
    signature = torch.load(newest, weights_only=True)["signature"]
    yield Real(folder, contents(folder), signature)
    os.chdir(before)
    del os.environ["HDB_SITE"]


def copy_of(real: Real, folder: Path) -> Path:
    """A copy of all of it, the run of which nobody holds."""
    ignore = shutil.ignore_patterns(HEARTBEAT)
    return Path(shutil.copytree(real.folder, folder / "copy", ignore=ignore))


# ---- the readers: what is done with what they return ------------------------------------------


def use_configuration(real: Real, name: str) -> None:
    load_settings(name).to_toml()


def use_settings_and_plan(real: Real, name: str) -> None:
    (real.folder / "out" / HEARTBEAT).unlink(missing_ok=True)
    folder, settings = RunFolder.reopen(real.folder / "out", False, print)
    with folder:
        plan = folder.read_plan(settings)
        assert plan is not None
        assert math.isfinite(plan.predicted_seconds())


def use_site(real: Real, name: str) -> None:
    load_site()


def use_timing(real: Real, name: str) -> None:
    lines, batches = read_timing(Path(name))
    assert all(isinstance(line, BatchTime) for line in lines.values())
    assert min(batches.values(), default=1) >= 1


def use_network(real: Real, name: str) -> None:
    settings = parse_settings({"plan": {"network": name}}, "test")
    network, _ = find_network(settings)
    assert network.latency > 0


def use_log(real: Real, name: str) -> None:
    runs = load_runs([Path("out"), Path("out2")])
    for shown in (tuple(runs), tuple(runs[:1])):
        Console(file=StringIO()).print(Report(shown, Path("page"), ()))
        report_page(shown, {})


def use_heartbeat(real: Real, name: str) -> None:
    os.utime(name, (0, 0))
    lock = FolderLock(real.folder / "out", print)
    lock.check()
    lock.release()


TEXTS: dict[str, Callable[[Real, str], None]] = {
    "mine.toml": use_configuration,
    "site.toml": use_site,
    "out/config.toml": use_settings_and_plan,
    "out/plan.json": use_settings_and_plan,
    "timing.json": use_timing,
    "network.json": use_network,
    "out/events.jsonl": use_log,
    "out/.heartbeat": use_heartbeat,
}
"""Files that people may edit: a change that makes sense is a change of what they say."""


def use_best(real: Real, name: str) -> None:
    load_best(Path("out/checkpoint"), real.signature)


def use_only_checkpoint(real: Real, name: str) -> None:
    load_checkpoint(Path("out/checkpoint"), real.signature)


def use_worker_state(real: Real, name: str) -> None:
    folder = Path("out/checkpoint")
    told: list[Any] = []
    note_lost_states(folder, {1: 6, 2: 6}, lambda *damage: told.append(damage))
    assert (load_worker_state(folder, 1, 6, torch.device("cpu")) is None) == bool(told)
    if told:
        raise UserError(f"{told[0]}")


def use_model(real: Real, name: str) -> None:
    try:
        values = read_sealed(Path(name)).values()
        if not all(isinstance(value, torch.Tensor) for value in values):
            raise DamagedFile("it is no model")
    except (DamagedFile, AttributeError) as error:
        raise UserError(f"{name}: {error}") from None


def use_shards(real: Real, name: str) -> None:
    try:
        shards = Shards(Path(PACKED))
        for sample in range(len(shards)):
            shards.read(sample, 16)
            shards.name(sample, 16)
    except ShardError as error:
        assert str(error).startswith(("packed/", "cannot read packed/"))
    if problems := verify_split(Path(PACKED), lambda _: None, lambda _: None):
        raise UserError("; ".join(problems))


SEALED: dict[str, Callable[[Real, str], None]] = {
    "out/checkpoint/00000012.pt": use_only_checkpoint,
    f"out/checkpoint/{BEST}": use_best,
    "out/checkpoint/worker-1-00000006.pt": use_worker_state,
    "out/model.pt": use_model,
    f"{PACKED}/manifest.json": use_shards,
    f"{PACKED}/index-original.npy": use_shards,
    f"{PACKED}/names.txt": use_shards,
    f"{PACKED}/original/00000.tar": use_shards,
    f"{PACKED}/original/00000.idx": use_shards,
}
"""Files whose every byte is under a checksum: no change goes unnoticed."""


# ---- damage -----------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, data: bytes, others: list[bytes]) -> bytes:
    """Other bytes than `data`, mostly near to it."""
    kind = draw(st.sampled_from(["cut", "bits", "overwritten", "inserted", "foreign", "random"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if kind == "cut":
        return data[:place]
    if kind == "foreign":
        return draw(st.sampled_from(others))
    if kind == "random":
        return draw(st.binary(max_size=200))
    if kind == "bits":
        changed = bytearray(data)
        for bit in draw(st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=4)):
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)
    more = draw(st.binary(min_size=1, max_size=30))
    return data[:place] + more + data[place + len(more) * (kind == "overwritten") :]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
    st.sampled_from([10**400, -1, 0, 1e308, "\0", "large", [[]], {"": {}}]),
)


@st.composite
def with_an_odd_value(draw: st.DrawFn, text: str) -> str:
    """JSON in which some value is another one, or gone."""
    values = json.loads(text)
    at: Any = values
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or not at[key] or draw(st.booleans()):
            break
        at = at[key]
    if draw(st.integers(0, 9)) == 0:
        del at[key]
    else:
        at[key] = draw(ODD)
    return json.dumps(values)


def told_by(use: Callable[[Real, str], None], real: Real, name: str) -> str | None:
    """What the user is told of the file; None if it is taken."""
    try:
        use(real, name)
    except UserError as error:
        return " ".join(str(error).splitlines())
    return None


def examine(use: Callable[[Real, str], None], real: Real, name: str, data: bytes) -> str | None:
    """As `told_by`, of a file of those bytes, which is then put back as it was."""
    real.put(name, data)
    try:
        told = told_by(use, real, name)
    finally:
        for file in (name, f"out/{HEARTBEAT}"):
            real.put(file, real.files[file])
    if told is not None:
        # Of TOML whose values are wrong, the file is named as the user has named it.
        assert Path(name).name in told or (name.endswith(".toml") and "." in told), told
        assert "Traceback" not in told
    return told


@pytest.mark.parametrize("name", [*TEXTS, *SEALED])
def test_each_file_is_taken_as_it_is(real: Real, name: str) -> None:
    """Else the tests below would show nothing."""
    assert examine((TEXTS | SEALED)[name], real, name, real.files[name]) is None


@pytest.mark.parametrize("name", TEXTS)
@given(data=st.data())
def test_a_damaged_text_is_refused_or_makes_sense(
    name: str, real: Real, data: st.DataObject
) -> None:
    original = real.files[name]
    others = [bytes_ for other, bytes_ in real.files.items() if other != name]
    kinds = [damaged(original, others)]
    if name.endswith((".json", HEARTBEAT)):
        kinds.append(with_an_odd_value(original.decode()).map(str.encode))
    if name.endswith(".jsonl"):
        lines = original.decode().splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        kinds.append(
            with_an_odd_value(lines[place]).map(
                lambda line: "\n".join([*lines[:place], line, *lines[place + 1 :], ""]).encode()
            )
        )
    examine(TEXTS[name], real, name, data.draw(st.one_of(kinds)))


@pytest.mark.parametrize("name", SEALED)
@given(data=st.data())
def test_no_change_of_a_sealed_file_goes_unnoticed(
    name: str, real: Real, data: st.DataObject
) -> None:
    original = real.files[name]
    others = [
        bytes_
        for other, bytes_ in real.files.items()
        if other != name and not (_is_checkpoint(name) and _is_checkpoint(other))
    ]
    changed = data.draw(damaged(original, others))
    told = examine(SEALED[name], real, name, changed)
    same = changed == original or (name.endswith(".json") and _means_the_same(changed, original))
    assert (told is None) == same, told


def _is_checkpoint(name: str) -> bool:
    """Whether one of the server's: another of the same model may be the best one, too."""
    return "/checkpoint/" in name and "worker" not in name


def _means_the_same(one: bytes, other: bytes) -> bool:
    """Whether two texts in JSON differ in white space alone."""
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("name", ["mine.toml", "out/config.toml", "site.toml", "timing.json"])
def test_absurd_text_is_refused(real: Real, name: str) -> None:
    for text in ["[" * 100_000, "a = " + "[" * 100_000, "9" * 10_000, "a = " + "9" * 10_000]:
        assert examine(TEXTS[name], real, name, text.encode()) is not None


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e300", "-3"])
def test_a_log_of_a_run_that_diverged_is_drawn(real: Real, value: str) -> None:
    log = real.files["out/events.jsonl"].decode()
    real.put("out/events.jsonl", log.replace('"loss": ', f'"loss": {value}, "x": ').encode())
    try:
        assert {"accuracy", "loss"} <= set(draw_plots(load_runs([Path("out")])))
    finally:
        real.put("out/events.jsonl", log.encode())


def test_damaged_lines_of_a_log_are_counted(real: Real) -> None:
    log = real.files["out/events.jsonl"]
    lines = log.splitlines(keepends=True)
    flipped = lines[3].replace(b'"time"', b'"tIme"')
    real.put("out/events.jsonl", b"".join([*lines[:3], flipped, b"garbage\n", *lines[4:]]))
    try:
        out = succeed("hdb", "report", "out", "--output", "report", cwd=real.folder)
    finally:
        real.put("out/events.jsonl", log)
    assert "out/events.jsonl: 2 damaged lines left out" in out


@given(data=st.data())
def test_a_damaged_image_is_refused(real: Real, data: st.DataObject) -> None:
    original = real.files["images/train/ant/1.jpg"]
    try:
        decode(data.draw(damaged(original, list(real.files.values()))), 16)
    except DecodeError as error:
        assert "\n" not in str(error)


# ---- what would be executed -------------------------------------------------------------------


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def write_pickle(path: Path, exploit: Exploit) -> None:
    path.write_bytes(pickle.dumps(exploit))


def write_with_torch(path: Path, exploit: Exploit) -> None:
    torch.save({"model": exploit}, path)


def write_old_torch(path: Path, exploit: Exploit) -> None:
    torch.save({"model": exploit}, path, _use_new_zipfile_serialization=False)


def write_with_checksum(path: Path, exploit: Exploit) -> None:
    write_sealed(path, {"model": exploit, "optimizer": {}})


def write_array(path: Path, exploit: Exploit) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([exploit], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("name", [name for name in SEALED if name.endswith((".pt", ".npy"))])
@pytest.mark.parametrize(
    "write",
    [write_pickle, write_with_torch, write_old_torch, write_with_checksum, write_array],
    ids=lambda write: write.__name__,
)
def test_code_in_a_file_is_not_executed(
    real: Real, tmp_path: Path, name: str, write: Callable[[Path, Exploit], None]
) -> None:
    write(tmp_path / "file", Exploit(tmp_path / "executed"))
    told = examine(SEALED[name], real, name, (tmp_path / "file").read_bytes())
    assert told is not None
    assert not (tmp_path / "executed").exists()
    if write is write_with_checksum and name.endswith(".pt"):
        assert "it holds code, which is not executed" in told


def test_a_run_does_not_execute_its_checkpoint(real: Real, tmp_path: Path) -> None:
    """Nor does it go on from another file's content, be that whole."""
    here = copy_of(real, tmp_path)
    (here / "out" / "summary.json").unlink()
    [newest] = checkpoints(here / "out")
    write_with_checksum(newest, Exploit(tmp_path / "executed"))
    shutil.copy(here / "out" / "model.pt", newest.with_name("00000011.pt"))
    before = contents(here / "out" / "checkpoint")
    told = (
        "checkpoint out/checkpoint/00000012.pt is damaged (it holds code, which is not executed) "
        "and there is no older whole one: go back to the best one with hdb train --resume out"
    )
    refused("hdb", "simulate", "--resume", "out", told=told, cwd=here)
    assert contents(here / "out" / "checkpoint") == before
    assert not (tmp_path / "executed").exists()


# ---- commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "words", "told"),
    [
        ("timing.json", ["hdb", "plan", "mine.toml"], "timing file timing.json is damaged"),
        ("network.json", ["hdb", "plan", "mine.toml"], "network file network.json is damaged"),
        ("out/events.jsonl", ["hdb", "report", "out"], "out/events.jsonl is damaged, or no event"),
        ("out/model.pt", ["hdb", "evaluate", "out"], "out/model.pt is damaged or of another model"),
        (
            "out/checkpoint/best.pt",
            ["hdb", "evaluate", "out", "--best"],
            "out/checkpoint/best.pt is damaged (it is cut short",
        ),
        (
            f"{PACKED}/index-original.npy",
            [*SIMULATE[:-1], "run.output=new"],
            "packed/train/index-original.npy has 9 bytes instead of",
        ),
        ("mine.toml", ["hdb", "plan", "mine.toml"], "cannot read mine.toml: 'utf-8' codec"),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)
def test_a_foreign_file_ends_the_command(
    real: Real, tmp_path: Path, file: str, words: list[str], told: str
) -> None:
    here = copy_of(real, tmp_path)
    shards = 'source = "shards"\npath = "packed"'
    changed = CONFIGURATION.replace("timing = { 16 = [4e-4, 2e-3] }", 'timing = "timing.json"')
    (here / "mine.toml").write_text(changed.replace('source = "synthetic"', shards))
    (here / file).write_bytes(b"\x93NUMPY\xffPK")
    refused(*words, told=told, cwd=here)


def test_a_removed_model_is_written_again(real: Real, tmp_path: Path) -> None:
    """As the message about a damaged one says."""
    out = copy_of(real, tmp_path) / "out"
    (out / "model.pt").unlink()
    done = run("hdb", "simulate", "--resume", "out", cwd=out.parent)
    assert done.returncode == 0, done
    before, after = (torch.load(p / "model.pt") for p in (real.folder / "out", out))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_damaged_records_of_packed_shards_are_packed_again(real: Real, tmp_path: Path) -> None:
    for number in range(400):
        image = tmp_path / "images" / "train" / "ant" / f"{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(real.files["images/train/ant/1.jpg"])
    words = ["hdb", "pack", "images", "packed", "--per-shard", "2"]
    parts = tmp_path / "packed" / "train" / "parts"
    job = Job(*words, cwd=tmp_path)
    job.until(lambda: len(list(parts.glob("0*.json"))) > 2)
    job.signal(signal.SIGKILL)
    job.end()
    first, second, third, *_ = sorted(parts.glob("0*.json"))
    first.write_text("[" * 100_000)
    second.write_bytes(b"\xff\xfe")
    third.write_text(third.read_text().replace('"labels": [0', '"labels": [1'))
    task = (parts / "task.json").read_text()
    (parts / "task.json").write_text(task[:-3])
    refused(*words, told="packed/train/parts/task.json is damaged (", cwd=tmp_path)
    (parts / "task.json").write_text(task)
    succeed(*words, cwd=tmp_path)
    succeed("hdb", "pack", "images", "whole", *words[4:], cwd=tmp_path)
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")
