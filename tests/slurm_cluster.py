"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of several nodes."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from conftest import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CPUS = 4
GPUS = 2
"""Of each node, as far as Slurm is told: no program looks for them."""

_APART = ("unshare", "--uts", "--mount")

_CONFIGURATION = """
ClusterName=hdb
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmctldParameters=node_reg_mem_percent=1
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
KillWait=8
MailProg=/bin/true
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=9
PartitionName=graceful Nodes=ALL PriorityTier=1 GraceTime=60
"""


def missing() -> list[str]:
    """Programs of Slurm that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


class Cluster:
    """Daemons under way, and what a user types to them.

    Parameters
    ----------
    folder : Path
        Holds everything of theirs; its name must be short, for the sake of sockets.
    nodes : int
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.apart = _may_be_apart()
        self._daemons: dict[str, subprocess.Popen] = {}
        self._hurried: set[tuple[str, str]] = set()
        self.environment = environment() | {"PATH": _path(), "SLURM_CONF": f"{folder}/slurm.conf"}

    def start(self) -> None:
        """Start all daemons, and wait until every node is idle."""
        self._configure()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        wait_until(lambda: (self.folder / "munge.socket").exists(), 20, "munged")
        self._start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        states = "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"
        try:
            wait_until(lambda: set(self(*states).split()) == {"idle"}, 60, "the nodes")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def start_node(self, name: str) -> None:
        """Start a node's daemon.

        Where this machine lets us, all that it starts sees the node's own hostname, and in
        `local` the node's own disk.
        """
        words = ["slurmd", "-D", "-N", name]
        if self.apart:
            disk = f"mount --bind {self.disk(name)} {self.local}"
            words = [*_APART, "sh", "-c", f"hostname {name} && {disk} && exec {' '.join(words)}"]
        self._start(*words, called=name)

    @property
    def local(self) -> Path:
        """Where a node finds its disk."""
        return self.folder / "local"

    def disk(self, node: str) -> Path:
        """Where that disk is seen from outside."""
        return self.folder / f"disk-{node}"

    @property
    def pmix(self) -> bool:
        """Whether Slurm finds the PMIx library that it was built with."""
        words = ["srun", "--mpi=pmix", "--ntasks=1", "true"]
        environment = self.environment
        return not subprocess.run(
            words, env=environment, capture_output=True, check=False
        ).returncode

    def lose_node(self, name: str) -> None:
        """End a node as a power cut does: its daemon, and all that it has started."""
        root = self._daemons.pop(name)
        _kill([root.pid, *_below(root.pid), *self._steps_of(name)])
        root.wait()

    def lose_daemon(self, name: str) -> None:
        """Kill a node's slurmd alone: what it has started goes on."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def lose_rank(self, job: str, rank: int) -> None:
        """End one rank as the kernel does where memory runs out."""
        _kill(self._holding(f"SLURM_JOB_ID={job}", f"OMPI_COMM_WORLD_RANK={rank}"))

    def stop(self) -> None:
        """End all daemons, and what is left of their jobs."""
        for name in self.nodes:
            if name in self._daemons:
                self.lose_node(name)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def __call__(self, *words: str | Path, cwd: Path | None = None, **env: str) -> str:
        """Run a command that must succeed; its standard output."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment | env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def shown(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, or of an array's task."""
        text = self("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.shown(job)["JobState"]

    def wait(self, job: str, state: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in `state`, requeued as it may be; what ``scontrol`` then says."""
        over = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"}

        def reached() -> bool:
            now = self.state(job)
            assert now == state or now not in over, f"job {job} is {now}, not {state}"
            if now == "PENDING" != state:
                self.hurry(job)
            return now == state

        wait_until(reached, seconds, f"job {job} to be {state}")
        return self.shown(job)

    def hurry(self, job: str) -> None:
        """Take away the two minutes that Slurm lets pass before a requeued job starts.

        And what does not outlive them: an srun whose mpirun has died, and which proctrack/linuxproc
        therefore no longer finds, waits for the step of a lost node, and KillWait later cancels
        the step of that number, which would be one of the job's next life. Two seconds are left: in
        the second of its requeueing, nodes refuse a job ("Job credential revoked").
        """
        shown = self.shown(job)
        life = (job, shown["Restarts"])
        waits = (shown["JobState"], shown["Reason"]) == ("PENDING", "BeginTime")
        if waits and life not in self._hurried:
            self._hurried.add(life)
            _kill(self._holding(f"SLURM_JOB_ID={job}"))
            self("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    def logs(self) -> str:
        """The daemons' last words."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files)

    def _configure(self) -> None:
        ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={name if self.apart else host} "
            f"NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=4096 Gres=gpu:{GPUS}"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = _CONFIGURATION.format(
            host=host,
            user=getpass.getuser(),
            folder=self.folder,
            controller=ports[0],
            nodes="\n".join(nodes),
        )
        for path in (self.folder / "state", self.local, *map(self.disk, self.nodes)):
            path.mkdir()
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "mpi.conf").write_text(f"PMIxCliTmpDirBase={self.local}\n")
        for number in range(GPUS):  # stands for /dev/nvidia0, ...
            path = self.folder / f"gpu{number}"
            if self.apart:  # Slurm tells jobs of devices only, which here is what /dev/null is
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
            else:
                path.touch()
        devices = f"{self.folder}/gpu[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"Name=gpu File={devices}\n")

    def _start(self, *words: str, called: str = "") -> None:
        name = called or words[0]
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _steps_of(self, node: str) -> set[int]:
        """The node's ``slurmstepd``, which are no children of ``slurmd``, and what is below them.

        They name no node on their command line, but all that they start has it in its environment.
        """
        found = set()
        for process in self._holding(f"SLURMD_NODENAME={node}"):
            found.add(process)
            with contextlib.suppress(OSError):
                parent = _parent(process)
                if Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd":
                    found.add(parent)
        return found

    def _holding(self, *variables: str) -> list[int]:
        """Processes of this cluster with those in their environment."""
        wanted = {name.encode() for name in (*variables, f"SLURM_CONF={self.folder}/slurm.conf")}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return found


@contextlib.contextmanager
def running(folder: Path, nodes: int) -> Iterator[Cluster]:
    """A cluster for as long as the context lasts."""
    cluster = Cluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def wait_until(happened: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def _path() -> str:
    """Where daemons are too: /usr/sbin is not on everybody's PATH."""
    return f"{environment()['PATH']}:/usr/sbin:/sbin"


def _may_be_apart() -> bool:
    """Whether a process can be given a hostname and mounts of its own."""
    words = [*_APART, "sh", "-c", "hostname n1 && mount --bind /tmp /tmp"]
    try:
        return not subprocess.run(words, capture_output=True, check=False).returncode
    except FileNotFoundError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _kill(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _below(process: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *_below(child)]
    return found
