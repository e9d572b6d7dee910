"""Scripts of ``hdb slurm`` on a real Slurm, from sbatch to the finished run."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BIN, events, lacks, succeed
from endings import sets
from PIL import Image
from programs.runs import PROGRAMS, assert_same_bits, final_model
from slurm_cluster import Cluster, missing, running, wait_until
from typer.testing import CliRunner

from hpc_hdb.cli import app
from hpc_hdb.report.events import read_events

SAMPLES = 240
MPICH = BIN.parent / "mpich/lib"
SITE = """
cpus_per_task = 1
bind = false
grace = 10
time = "10:00"
partition = "main"
"""
SHORT = sets(
    "data.source=synthetic",
    f"data.synthetic_samples={SAMPLES}",
    "data.synthetic_side=16",
    "plan.timing={12=[4e-4,2e-3],16=[7e-4,2e-3]}",
    "schedule.resolutions=[12,16]",
    "schedule.dropout=[0.0,0.2]",
    "schedule.large_batch=[8,8]",
    "schedule.milestones=[]",
    "model.name=models:watched",
    "server.commits_per_epoch=2",
    "server.sync=bsp",
)
LONG = [*SHORT, *sets("schedule.epochs=80", "run.evaluate_every=40", "plan.workers=2")]
"""More than a minute where a rank is slow, seconds where none is."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes; jobs start where the models are."""
    if lacking := missing():
        lacks(f"no Slurm here ({', '.join(lacking)} missing): apt-get install slurm-wlm munge")
    site = tmp_path_factory.mktemp("site") / "site.toml"
    site.write_text(SITE)
    with (
        tempfile.TemporaryDirectory(prefix="hdb-slurm-") as folder,
        pytest.MonkeyPatch.context() as m,
        running(Path(folder), nodes=4) as started,
    ):
        started.environment["HDB_SITE"] = str(site)
        for name, value in started.environment.items():
            m.setenv(name, value)
        m.delenv("OMP_NUM_THREADS")
        m.chdir(PROGRAMS)
        yield started


class Submitted:
    """A job under way."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str, **env: str) -> None:
        self.cluster = cluster
        self.run = folder / "run"
        arguments = ["slurm", *words, "--submit", "--output", str(folder / "job.sbatch")]
        arguments += out(folder)
        if "--profile" not in words:
            arguments += ["--run", str(self.run)]
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name, value in env.items():
                monkeypatch.setenv(name, value)
            self.shown = CliRunner().invoke(app, arguments, catch_exceptions=False).output
        assert "submitted" in self.shown
        self.number = self.shown.split(" as job ")[1].split(";")[0]
        self._folder = folder

    @property
    def out(self) -> str:
        """What the job has printed, on both channels."""
        return "\n".join(file.read_text() for file in sorted(self._folder.glob("*.out")))

    def wait(self, state: str, seconds: float = 120) -> dict[str, str]:
        try:
            return self.cluster.wait(self.number, state, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.out}\n{self.cluster.logs()}") from None

    def commits(self) -> int:
        """Commits of all the job's lives."""
        log = self.run / "events.jsonl"
        return log.read_text().count('{"event": "commit"') if log.exists() else 0

    def lives(self) -> int:
        log = self.run / "events.jsonl"
        return log.read_text().count('{"event": "start"') if log.exists() else 0

    def wait_for_start(self, life: int, seconds: float = 120) -> None:
        """Until the job has begun to train for the `life`-th time."""

        def begun() -> bool:
            self.cluster.hurry(self.number)
            return self.lives() >= life

        wait_until(begun, seconds, f"life {life} of job {self.number}")

    def wait_for_life(self, life: int, seconds: float = 90) -> None:
        """Until the job's `life`-th training has made commits."""
        self.wait_for_start(life)
        before = self.commits()
        wait_until(lambda: self.commits() > before + 4, seconds, f"commits of job {self.number}")


def write_images(folder: Path) -> None:
    """Two classes of grey squares: as many for training as the synthetic ones are, and a few."""
    for split, count in (("train", SAMPLES // 2), ("val", 8)):
        for number in range(count):
            for shade, name in ((60, "dark"), (190, "light")):
                path = folder / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (shade + number % 30,) * 3).save(path)


def out(folder: Path) -> list[str]:
    """Options for both outputs of a job to go there."""
    return [f"--sbatch={name}={folder}/%j.out" for name in ("output", "error")]


def assert_one_run(run: Path, workers: int, epochs: int) -> None:
    """It has finished, and log and summary read as those of one run that never stopped."""
    commits = [event for event in read_events(run) if event["event"] == "commit"]
    total = 2 * workers * epochs
    assert [commit["commit"] for commit in commits] == list(range(1, total + 1))
    assert json.loads((run / "summary.json").read_text())["commits"] == total
    succeed("hdb", "report", run)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed images."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images")
    succeed("hdb", "pack", folder / "images", folder / "packed images")
    return folder / "packed images"


def staged(packed: Path) -> list[str]:
    """Options for packed images to be copied to the nodes."""
    return ["--stage", *sets("data.source=shards", f"data.path={packed}")]


def staging_site(cluster: Cluster, folder: Path, site: str = SITE) -> Path:
    """A site file whose nodes have disks of their own."""
    path = folder / "staging-site.toml"
    path.write_text(f'{site}scratch = "{cluster.local}"\n')
    return path


def stand_in(folder: Path, body: str) -> Path:
    """A site file by which srun starts a program of bash in the place of hdb.

    That finds the run folder in ``$run``, and the copy of the images in ``$copy``.
    """
    words = """
    for word; do
        [[ $last != --data-copy ]] || copy=$word
        [[ $last != --resume ]] || run=$word
        case $word in run.output=*) run=${word#run.output=} ;; esac
        last=$word
    done
    """
    (folder / "bin").mkdir()
    (folder / "bin/hdb").write_text(f"#!/bin/bash\n{words}\n{body}\n")
    (folder / "bin/hdb").chmod(0o755)
    site = folder / "site.toml"
    path = f"{folder}/bin:/usr/local/bin:/usr/bin:/bin"
    site.write_text(f"{SITE}launcher = 'srun'\nsetup = ['export PATH={path}']\n")
    return site


@pytest.fixture(scope="module")
def struck(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """A run that its time limit strikes once, while the other tests go on.

    Slurm may signal 30 seconds early: the next life, beside other tests, has ten minutes.
    """
    folder = tmp_path_factory.mktemp("struck")
    more = "[[ ! -v SLURM_RESTART_COUNT ]] || scontrol update jobid=$SLURM_JOB_ID timelimit=10"
    site = folder / "site.toml"
    site.write_text(f'{SITE}setup = ["{more}"]\n')
    job = Submitted(
        cluster,
        folder,
        "digits",
        *LONG,
        "--nodes",
        "2",
        "--time",
        "1",
        "--sbatch",
        "nodelist=n1,n2",
        HDB_SITE=str(site),
        SLOW="1",
        SLOW_LIVES="1",
    )
    job.wait_for_life(1)
    return job


def test_a_server_and_three_workers_on_two_nodes(
    struck: Submitted, cluster: Cluster, packed: Path, tmp_path: Path
) -> None:
    """Ranks are bound to cores of their own, and read packed images from their nodes' disks."""
    if not cluster.apart:
        lacks("nodes cannot have disks of their own here (root may give them)")
    watch = tmp_path / "watch"
    watch.mkdir()
    site = staging_site(cluster, tmp_path, SITE.replace("bind = false", "bind = true"))
    words = [
        *SHORT,
        *staged(packed),
        *sets("schedule.epochs=2"),
        *("--nodes", "2", "--gpus-per-node", "2", "--workers", "3"),
        *("--sbatch", "nodelist=n3,n4"),
    ]
    job = Submitted(cluster, tmp_path, "digits", *words, HDB_SITE=str(site), WATCH=str(watch))
    assert "│ 1    │ 0 to 1 │       1 │       1 │           1 │" in job.shown
    assert "│ 2    │ 2 to 3 │       - │       2 │           2 │" in job.shown
    assert "the limit of 10 min 00 s is enough" in job.shown
    nodes = ("n3", "n4")
    copies = [cluster.disk(node) / f"hdb-{job.number}/train" for node in nodes]
    wait_until(lambda: all(copy.exists() for copy in copies), 60, "copies on both nodes")
    assert job.wait("COMPLETED")["NodeList"] == "n[3-4]"
    assert_one_run(job.run, workers=3, epochs=2)
    assert not any(list(cluster.disk(node).iterdir()) for node in nodes), "copies are left"
    assert f'path = "{packed}"' in (job.run / "config.toml").read_text()
    steps = {rank: json.loads((watch / rank).read_text().splitlines()[0]) for rank in "123"}
    assert [len(steps[rank]["cores"]) for rank in "123"] == [1, 1, 1]
    assert steps["2"]["cores"] != steps["3"]["cores"]
    assert [steps[rank]["gpus"] for rank in "123"] == ["0,1"] * 3


def test_a_heterogeneous_job(
    struck: Submitted, cluster: Cluster, packed: Path, tmp_path: Path
) -> None:
    """Each node has a copy of the packed images; signalled, it goes on."""
    if not cluster.apart:
        lacks("nodes cannot have hostnames of their own here (root may give them)")
    job = Submitted(
        cluster, tmp_path, "digits", *LONG, *sets("schedule.epochs=10"), *staged(packed),
        "--server-partition", "urgent", "--nodes", "1", "--gpus-per-node", "2",
        HDB_SITE=str(staging_site(cluster, tmp_path)), SLOW="1", SLOW_LIVES="1",
        WATCH=str(tmp_path),
    )  # fmt: skip
    job.wait_for_life(1)
    for rank in "12":
        assert json.loads((tmp_path / rank).read_text().splitlines()[0])["gpus"] == "0,1"
    nodes = [cluster.shown(part)["NodeList"] for part in (job.number, f"{job.number}+1")]
    assert nodes[0] != nodes[1]
    for node in nodes:
        copy = cluster.disk(node) / f"hdb-{job.number}"
        assert {file.name for file in copy.iterdir()} == {file.name for file in packed.iterdir()}
    cluster("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait("COMPLETED")["Restarts"] == "1"
    assert job.lives() == 2
    assert_one_run(job.run, workers=2, epochs=10)
    assert not any(list(cluster.disk(node).iterdir()) for node in cluster.nodes), "copies are left"


def test_srun_starts_a_heterogeneous_job(
    struck: Submitted, cluster: Cluster, tmp_path: Path
) -> None:
    if not cluster.pmix:
        lacks("no PMIx for Slurm: apt-get install libpmix-dev")
    words = ["digits", *SHORT, *sets("schedule.epochs=2"), "--launcher", "srun --mpi=pmix"]
    where = ("--server-partition", "urgent", "--nodes", "1", "--gpus-per-node", "2")
    job = Submitted(cluster, tmp_path, *words, *where)
    job.wait("COMPLETED")
    assert_one_run(job.run, workers=2, epochs=2)


def test_an_array_over_configurations(struck: Submitted, cluster: Cluster, tmp_path: Path) -> None:
    for name in ("first one", "second"):
        (tmp_path / f"{name}.toml").write_text("[schedule]\nepochs = 1\n[plan]\nworkers = 1\n")
    configs = [str(tmp_path / f"{name}.toml") for name in ("first one", "second")]
    words = [*SHORT, *sets("plan.small_workers=0", "schedule.epochs=2"), "--gpus-per-node", "1"]
    job = Submitted(cluster, tmp_path, *configs, *words)
    for task, name in enumerate(("first one", "second")):
        cluster.wait(f"{job.number}_{task}", "COMPLETED")
        assert_one_run(tmp_path / f"run-{task}-{name}", workers=1, epochs=2)


def test_an_interrupted_array(struck: Submitted, cluster: Cluster, tmp_path: Path) -> None:
    """Each of its runs goes on by itself."""
    site = stand_in(
        tmp_path,
        """
        mkdir -p "$run/checkpoint"
        if [[ -e $run/checkpoint/1.pt ]]; then touch "$run/summary.json"; exit; fi
        trap 'touch "$run/checkpoint/1.pt"; exit 1' USR1
        touch "$run/begun"
        for ((i = 0; i < 600; i++)); do sleep 0.1; done
        """,
    )
    words = [*SHORT, *sets("plan.small_workers=0"), "--workers", "1", "--sbatch", "exclude=n1,n2"]
    job = Submitted(cluster, tmp_path, "digits", "cifar10", *words, HDB_SITE=str(site))
    runs = [tmp_path / f"run-{task}" for task in ("0-digits", "1-cifar10")]
    wait_until(lambda: all((run / "begun").exists() for run in runs), 60, "both runs")
    cluster("scancel", "--signal=USR1", "--batch", job.number)
    for task in (0, 1):
        assert cluster.wait(f"{job.number}_{task}", "COMPLETED")["Restarts"] == "1"


def test_what_is_typed_reaches_a_job_that_is_submitted_from_another(
    struck: Submitted, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, and nothing of the other job's; on a site that exports nothing either.

    Each node has GPUs and a copy of the images. A run that has finished is not started again.
    """
    if not cluster.apart:
        lacks("nodes cannot have disks of their own here (root may give them)")
    folder = tmp_path / "100% %j %x it's $(touch pwned) \"& # {c}"
    (folder / "my images").mkdir(parents=True)
    (folder / "my images/shard").write_text("images")
    name = "a 'b' $(touch pwned) %j.toml"
    (folder / name).write_text("[data]\nsource = 'shards'\npath = 'my images'\n")
    body = f"""
    printf '%s\\0' "$@" >"{tmp_path}/words"
    about="$SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $(cat "$copy/shard")"
    echo "$about ${{SLURM_RESTART_COUNT:-0}}" >>"{tmp_path}/ranks"
    sleep 1
    mkdir -p "$run"
    touch "$run/summary.json"
    """
    site = staging_site(cluster, tmp_path, stand_in(tmp_path, body).read_text())
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HDB_SITE", str(site))
    words = ["slurm", name, "--set", "run.seed=3", "--stage", "--submit", "--job-name", "%j `x`"]
    words += ["--nodes", "2", "--gpus-per-node", "2", "--sbatch", "nodelist=n3,n4"]
    words += ["--memory", "100M", "--sbatch", "export=NONE", "--output", "job 1.sbatch"]
    with pytest.MonkeyPatch.context() as around:
        for variable in ("JOB_ID", "RESTART_COUNT", "MEM_PER_CPU", "NTASKS_PER_NODE", "GPUS"):
            around.setenv(f"SLURM_{variable}", "7")
        shown = CliRunner().invoke(app, words, catch_exceptions=False).output
    number = shown.split(" as job ")[1].split(";")[0]
    error = folder / f"hdb-{number}.err"
    try:
        assert cluster.wait(number, "COMPLETED")["TresPerNode"] == "gres:gpu:2"
    except AssertionError as failure:
        raise AssertionError(f"{failure}\n{error.read_text()}\n{cluster.logs()}") from None
    typed, *more = (tmp_path / "words").read_text().split("\0")[1:6]
    assert [typed, *more] == [
        name, "--set", "run.seed=3", "--set", f"run.output=runs/%j `x`-{number}",
    ]  # fmt: skip
    ranks = sorted((tmp_path / "ranks").read_text().splitlines())
    nodes = ("n3", "n3", "n3", "n4", "n4")
    assert ranks == [f"{rank} {node} 0,1 images 0" for rank, node in enumerate(nodes)]
    assert not list(tmp_path.rglob("pwned"))
    again = cluster("sbatch", "--parsable", "job 1.sbatch", f"runs/%j `x`-{number}", cwd=folder)
    cluster.wait(again.strip(), "COMPLETED")
    assert "has finished" in (folder / f"hdb-{again.strip()}.out").read_text()
    assert len((tmp_path / "ranks").read_text().splitlines()) == len(nodes)


def test_three_fruitless_starts(struck: Submitted, cluster: Cluster, tmp_path: Path) -> None:
    """Preempted with time to end, before it has saved anything, it is started again; twice."""
    site = stand_in(
        tmp_path, '[[ -v SLURM_RESTART_COUNT ]] && exit 1\ntouch "$run.begun"\nsleep 60'
    )
    where = ("--partition", "graceful", "--workers", "1", "--sbatch", "nodelist=n4")
    job = Submitted(
        cluster,
        tmp_path,
        "digits",
        *SHORT,
        *sets("plan.small_workers=0"),
        *where,
        HDB_SITE=str(site),
    )
    wait_until((tmp_path / "run.begun").exists, 60, "the first start")
    cluster(
        "sbatch", "--parsable", "--partition=urgent", "--exclusive", "--nodelist=n4",
        "--output=/dev/null", "--wrap=sleep 1",
    )  # fmt: skip
    assert job.wait("FAILED")["Restarts"] == "2"
    assert job.out.count(f"{job.run} got no further: it is not started again") == 1
    assert "No such process" not in job.out
    assert not list(job.run.iterdir()), "the next job has three starts again"


def test_preemption_and_scancel(struck: Submitted, cluster: Cluster, tmp_path: Path) -> None:
    """Preempted or signalled it goes on; cancelled it does not, and loses a commit at most."""
    words = [*LONG, *sets("plan.workers=1", "plan.small_workers=0"), "--sbatch", "nodelist=n4"]
    job = Submitted(cluster, tmp_path, "digits", *words, SLOW="1")
    job.wait_for_life(1)
    other = cluster(
        "sbatch", "--parsable", "--partition=urgent", "--exclusive", "--nodelist=n4",
        "--output=/dev/null", "--wrap=sleep 1",
    ).strip()  # fmt: skip
    cluster.wait(other, "COMPLETED")
    job.wait_for_life(2)
    (resumed,) = [event for event in events(job.run) if event["event"] == "resume"]
    assert resumed["commit"] > 0
    cluster("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_for_life(3)
    assert [e["signal"] for e in events(job.run) if e["event"] == "interrupted"][-1] == "SIGUSR1"
    cluster("scancel", job.number)
    job.wait("CANCELLED")
    # Slurm signals mpirun too, which ends its ranks, mostly before they have saved.
    made = [event["commit"] for event in read_events(job.run) if event["event"] == "commit"]
    newest = max((job.run / "checkpoint").glob("[0-9]*.pt"))
    assert int(newest.stem) >= made[-1] - 1
    assert cluster.shown(job.number)["Restarts"] == "2"


def test_a_lost_worker_with_ulfm(struck: Submitted, cluster: Cluster, tmp_path: Path) -> None:
    """The others go on at once; nothing is requeued."""
    words = [*SHORT, *sets("schedule.epochs=10", "plan.workers=3"), "--nodes", "2"]
    job = Submitted(
        cluster, tmp_path, "digits", *words, "--launcher", "mpirun --with-ft ulfm",
        "--sbatch", "nodelist=n3,n4", SLOW="1",
    )  # fmt: skip
    job.wait_for_life(1)
    cluster.lose_rank(job.number, 3)
    assert job.wait("COMPLETED")["Restarts"] == "0"
    summary = json.loads((job.run / "summary.json").read_text())
    assert summary["lost_workers"] == [3]
    assert summary["images"] == 10 * SAMPLES


def test_srun_ends_a_job_that_has_lost_a_rank(
    struck: Submitted, cluster: Cluster, tmp_path: Path
) -> None:
    """As mpirun does, whatever the MPI: here there is none, and the ranks only wait."""
    site = stand_in(tmp_path, "[[ $SLURM_PROCID = 1 ]] && kill -9 $$\nsleep 60")
    words = ["digits", *SHORT, "--gpus-per-node", "2"]
    job = Submitted(cluster, tmp_path, *words, HDB_SITE=str(site))
    wait_until(lambda: "task 1: Killed" in job.out, 30, "its end")
    wait_until(lambda: cluster.shown(job.number)["Restarts"] == "1", 10, "the next start")
    cluster("scancel", job.number)


@pytest.mark.parametrize(
    ("kind", "library", "setup"),
    [
        ("pmi2", "MPICH Version: 5.", f"export MPI4PY_MPIABI=mpich LD_LIBRARY_PATH={MPICH}"),
        ("pmix", "Open MPI v5.", "true"),
    ],
    ids=["mpich", "openmpi"],
)
def test_srun_starts_the_ranks(
    struck: Submitted, cluster: Cluster, tmp_path: Path, kind: str, library: str, setup: str
) -> None:
    """On both nodes without an mpirun, where Slurm and the MPI speak the same PMI."""
    if kind == "pmi2" and not (MPICH / "libmpi.so.12").exists():
        lacks("no MPICH here: make .venv/mpich")
    if kind == "pmix" and not cluster.pmix:
        lacks("no PMIx for Slurm: apt-get install libpmix-dev")
    site = tmp_path / "site.toml"
    site.write_text(f"{SITE}launcher = 'srun --mpi={kind}'\nsetup = ['{setup}']\n")
    words = ["digits", *SHORT, *sets("schedule.epochs=2", "plan.workers=3"), "--nodes", "2"]
    job = Submitted(cluster, tmp_path, *words, "--sbatch", "nodelist=n3,n4", HDB_SITE=str(site))
    job.wait("COMPLETED")
    (start,) = [event for event in events(job.run) if event["event"] == "start"]
    assert start["versions"]["mpi"].startswith(library)
    assert_one_run(job.run, workers=3, epochs=2)


def test_the_doctor_tells_which_launchers_work(
    struck: Submitted, cluster: Cluster, tmp_path: Path
) -> None:
    if not cluster.pmix:
        lacks("no PMIx for Slurm: apt-get install libpmix-dev")
    words = "--parsable", "--nodes=2", "--ntasks=2", f"--output={tmp_path}/out"
    job = cluster("sbatch", *words, "--wrap=hdb doctor --json").strip()
    cluster.wait(job, "COMPLETED")
    findings = json.loads((tmp_path / "out").read_text())
    (found,) = [each["found"] for each in findings if each["part"] == "launcher"]
    told = dict(line.split(": ") for line in found.splitlines())
    assert told["mpirun"] == told["srun --overlap --mpi=pmix"] == "works"
    assert told["srun --overlap --mpi=pmi2"] == "does not speak this MPI's PMI"


def test_a_profile_job(
    struck: Submitted, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves its measurements where it was submitted, for a plan to read."""
    monkeypatch.chdir(tmp_path)
    one = ["resolutions=[16]", "dropout=[0.0]", "large_batch=[8]"]
    words = ["digits", *SHORT, *sets("model.name=resnet8", *(f"schedule.{each}" for each in one))]
    Submitted(cluster, tmp_path, *words, "--profile").wait("COMPLETED")
    plan = succeed("hdb", "plan", *words, *sets("plan.timing=timing.json"), "--json", cwd=tmp_path)
    line = json.loads((tmp_path / "timing.json").read_text())["resolutions"]["16"]
    assert json.loads(plan)["stages"][0]["large_batch"] == line["large_batch"]


def test_a_chain_of_jobs(struck: Submitted, cluster: Cluster, tmp_path: Path) -> None:
    """The one that is interrupted submits the next, which ends the run."""
    words = [*LONG, *sets("plan.workers=1", "plan.small_workers=0", "schedule.epochs=8")]
    job = Submitted(cluster, tmp_path, "digits", *words, "--chain", SLOW="1", SLOW_LIVES="1")
    job.wait_for_life(1)
    cluster("scancel", "--signal=USR1", "--batch", job.number)
    assert job.wait("COMPLETED")["Restarts"] == "0"
    (following,) = re.findall(r"Submitted batch job (\d+)", job.out)
    cluster.wait(following, "COMPLETED")
    assert job.lives() == 2
    assert_one_run(job.run, workers=1, epochs=8)


def test_lost_nodes(struck: Submitted, cluster: Cluster, packed: Path, tmp_path: Path) -> None:
    """A worker's node, then the server's, go out like a light: the script requeues, then Slurm.

    With copies of the images on their disks, which the lost node cannot remove.
    """
    epochs = sets("schedule.epochs=20", "run.evaluate_every=20")
    job = Submitted(
        cluster, tmp_path, "digits", *LONG, *epochs, "--nodes", "2", "--sbatch", "exclude=n1,n2",
        *(staged(packed) if cluster.apart else ()),
        HDB_SITE=str(staging_site(cluster, tmp_path)), SLOW="1", SLOW_LIVES="2",
    )  # fmt: skip
    for life, node in ((1, "n4"), (2, "n3")):
        job.wait_for_life(life)
        cluster.lose_node(node)
        wait_until(lambda: cluster.state(job.number) != "RUNNING", 60, f"the loss of {node}")
        cluster.start_node(node)
    job.wait_for_start(3)
    assert job.wait("COMPLETED")["Restarts"] == "2"
    assert job.lives() == 3
    assert_one_run(job.run, workers=2, epochs=20)


def test_a_killed_slurmd(struck: Submitted, cluster: Cluster, tmp_path: Path) -> None:
    """Slurm starts the job again elsewhere, while all its ranks still run: they make way."""
    job = Submitted(
        cluster, tmp_path, "digits", *LONG, "--gpus-per-node", "2", "--sbatch", "exclude=n1,n2",
        SLOW="1", SLOW_LIVES="1",
    )  # fmt: skip
    job.wait_for_life(1)
    node = cluster.shown(job.number)["NodeList"]
    cluster.lose_daemon(node)
    cluster.wait(job.number, "PENDING")
    before = job.commits()
    wait_until(lambda: job.commits() > before, 60, "a commit of the first life")
    cluster("scontrol", "update", f"jobid={job.number}", "StartTime=now+2")
    wait_until(lambda: job.lives() == 2, 120, "the second life")
    assert job.wait("COMPLETED")["Restarts"] == "1"
    cluster.start_node(node)
    assert "is still in use by an earlier life of this job" in " ".join(job.out.split())
    assert "was taken over by another run" in job.out
    assert_one_run(job.run, workers=2, epochs=80)


def test_the_time_limit(struck: Submitted, cluster: Cluster, tmp_path: Path) -> None:
    """The run saves, requeues itself, and ends with the same bits as one that never stopped."""
    struck.wait_for_start(2)
    assert struck.wait("COMPLETED")["Restarts"] == "1"
    assert struck.lives() == 2
    assert_one_run(struck.run, workers=2, epochs=80)
    whole = tmp_path / "whole"
    succeed("hdb", "simulate", "digits", *LONG, "--set", f"run.output={whole}", cwd=PROGRAMS)
    assert_same_bits(final_model(struck.run), final_model(whole))
