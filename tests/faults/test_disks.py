"""Disks that are full, not to be written, or hang: told, nothing good is lost, and it goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import events, run, succeed
from endings import (
    LONG,
    SIMULATE,
    TRAIN,
    Job,
    assert_refusal,
    assert_whole,
    checkpoints,
    contents,
    refused,
)
from PIL import Image

from hpc_hdb.config_files import load_settings
from hpc_hdb.run.folder import RunFolder
from hpc_hdb.run.planning import make_plan


def write_images(folder: Path, count: int) -> None:
    """A data set of noisy pictures, of some 3 kB each."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number:03d}.jpg")


@pytest.fixture
def obedient() -> list[str]:
    """Starts a command as root that obeys the permissions of files, like everybody else."""
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    try:
        run(*words, "true").check_returncode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("setpriv does not work here: permissions were not tested")
    return words


def test_checkpoints_that_may_no_longer_be_written_end_the_run(
    here: Path, obedient: list[str]
) -> None:
    out = here / "out"
    job = Job("mpirun", "-n", "3", *obedient, *TRAIN, *LONG, cwd=here)
    job.until(lambda: len(checkpoints(out)) > 1)
    (out / "checkpoint").chmod(0o555)
    assert_refusal(job.end(), "run folder out: Permission denied (", "make it yours to write, then")
    assert_whole(out)
    (out / "checkpoint").chmod(0o755)
    assert goes_on(here) > 0


def test_a_run_folder_that_may_no_longer_be_written_is_left_as_it_is(
    here: Path, obedient: list[str]
) -> None:
    out = here / "out"
    job = Job(*obedient, *SIMULATE, *LONG, cwd=here)
    job.until(lambda: len(checkpoints(out)) > 1)
    job.signal(signal.SIGUSR1)
    job.end()
    before = contents(out)
    out.chmod(0o555)
    told = "cannot use the run folder out: Permission denied (out/"
    refused(*obedient, "hdb", "simulate", "--resume", "out", told=told, cwd=here)
    out.chmod(0o755)
    assert contents(out) == before
    assert goes_on(here) > 0


def goes_on(here: Path) -> int:
    """Resume the run until it commits, and interrupt it: the commit from which it went on."""
    before = len(events(here / "out"))
    job = Job("hdb", "simulate", "--resume", "out", cwd=here)
    job.until(lambda: [e for e in events(here / "out")[before:] if e["event"] == "commit"])
    job.signal(signal.SIGUSR1)
    assert job.end().status == 128 + signal.SIGUSR1
    (resume,) = (e for e in events(here / "out")[before:] if e["event"] == "resume")
    return resume["commit"]


def test_packing_onto_a_full_disk_goes_on_once_there_is_room(
    here: Path, disk: Callable[[str], Path]
) -> None:
    write_images(here / "images", 150)
    packed = disk("size=600k") / "packed"
    words = ["hdb", "pack", "images", packed, "--per-shard", "20", "--processes", "2"]
    told = f"cannot write into {packed}/train: No space left on device: make room there, then"
    refused(*words, told=told, cwd=here)
    assert not (packed / "train" / "manifest.json").exists()
    disk("remount,size=64m")
    succeed(*words, cwd=here)
    succeed("hdb", "verify", packed, cwd=here)
    succeed("hdb", "pack", "images", "whole", *words[4:], cwd=here)
    assert contents(packed) == contents(here / "whole")


def test_a_timing_file_is_not_lost_to_a_full_disk(here: Path, disk: Callable[[str], Path]) -> None:
    folder = disk("size=16k")
    timing = folder / "timing.json"
    timing.write_text('{"resolutions": {}}')
    with (
        (folder / "ballast").open("ab", buffering=0) as ballast,
        pytest.raises(OSError, match="No space left"),
    ):
        while True:
            ballast.write(bytes(512))
    words = ["hdb", "profile", "mine.toml", "--output", timing]
    refused(*words, told=f"cannot write {timing}: No space left on device: choose", cwd=here)
    assert timing.read_text() == '{"resolutions": {}}'
    assert sorted(path.name for path in folder.iterdir()) == ["ballast", "timing.json"]


@pytest.mark.parametrize("folders", ["flushed", "not to be flushed"])
def test_what_a_run_is_to_do_survives_a_power_cut(
    here: Path, monkeypatch: pytest.MonkeyPatch, folders: str
) -> None:
    """Each file is on disk before it gets its name, and its name before the next file begins."""
    happened: list[tuple[str, str]] = []

    def fsync(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.is_dir() and folders != "flushed":
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(file)
        happened.append(("flushed", path.name))

    def replaced(part: Path, path: Path) -> None:
        replace(part, path)
        happened.append(("renamed", path.name))

    monkeypatch.chdir(here)
    settings = load_settings("mine.toml", ["run.output=out"])
    plan = make_plan(settings, 2, 240, settings.inline_timing() or {})
    flush, replace = os.fsync, Path.replace
    with RunFolder.create(settings, "mine", print) as folder:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", replaced)
        folder.begin(settings, plan)
    expected = [
        step
        for name in ("plan.json", "config.toml")
        for step in (("flushed", f"{name}.part"), ("renamed", name), ("flushed", "out"))
    ]
    assert happened == [s for s in expected if folders == "flushed" or s != ("flushed", "out")]


# ---- a file system that hangs -----------------------------------------------------------------


@pytest.fixture
def leases() -> Iterator[Callable[[Path], None]]:
    """Makes files that cannot be opened before this test gives them up, or the kernel says so."""
    signal.signal(signal.SIGIO, lambda *_: None)  # told when somebody tries to
    held: list[int] = []

    def lease(path: Path) -> None:
        held.append(os.open(path, os.O_RDWR | os.O_CREAT))
        try:
            fcntl.fcntl(held[-1], fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:  # somebody has it open: it is being written already
            os.close(held.pop())
        except OSError:
            pytest.skip("this file system has no leases: one that hangs was not tested")

    def give_up() -> None:
        while held:
            os.close(held.pop())

    lease.give_up = give_up  # type: ignore[attr-defined]
    yield lease
    give_up()
    signal.signal(signal.SIGIO, signal.SIG_DFL)


def test_a_checkpoint_that_hangs_is_told_of_and_the_run_goes_on_after_it(
    here: Path, leases: Callable[[Path], None]
) -> None:
    """Opening the file to write into blocks: the kernel holds it back for up to 45 seconds."""
    if int(Path("/proc/sys/fs/lease-break-time").read_text()) < 40:
        pytest.skip("leases are broken too soon here: a file system that hangs was not tested")
    out = here / "out"
    job = Job(*TRAIN, *LONG, ranks=3, cwd=here)
    job.until(lambda: len(checkpoints(out)) > 1)
    server = json.loads((out / ".heartbeat").read_bytes())["process"]
    for _ in range(20):
        os.kill(server, signal.SIGSTOP)
        newest = int(checkpoints(out)[-1].stem)
        for commit in range(newest + 1, newest + 400):  # while one is written many commits are made
            leases(out / "checkpoint" / f"{commit:08d}.pt.part")
        os.kill(server, signal.SIGCONT)
        time.sleep(1)
        last = checkpoints(out)[-1]
        time.sleep(1)
        if checkpoints(out)[-1] == last:
            break
        leases.give_up()  # type: ignore[attr-defined] # it was writing, and then tidied them away
    job.until(lambda: [event for event in events(out) if event["event"] == "slow_write"])
    held_back = len(events(out))
    leases.give_up()  # type: ignore[attr-defined]
    job.until(lambda: len(events(out)) > held_back + 8)
    job.signal(signal.SIGUSR1)
    ending = job.end()
    assert (ending.status, ending.lines) == (128 + signal.SIGUSR1, [])
    [slow] = (event for event in events(out) if event["event"] == "slow_write")
    line = f"checkpoint {slow['file']} has been writing for 30 s: does the file system hang? The"
    assert line in " ".join(ending.out.split())
    assert_whole(out)
    assert not list(out.rglob("[0-9]*.part"))


def test_half_written_files_are_in_nobodys_way(here: Path) -> None:
    """As a kill leaves them."""
    job = Job(*SIMULATE, *LONG, cwd=here)
    out = here / "out"
    job.until(lambda: len(checkpoints(out)) > 1)
    job.signal(signal.SIGKILL)
    job.end()
    for name in ("00000099.pt.part", "best.pt.part", "worker-1-00000099.pt.part"):
        (out / "checkpoint" / name).write_bytes(b"half")
    assert goes_on(here) > 0
    assert not list((out / "checkpoint").glob("[0-9b]*.part"))
