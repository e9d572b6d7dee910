"""Job scripts for Slurm: a template of ``slurm/`` with the user's words filled in, quoted.

The templates are scripts that run as they stand. Filling one in changes the values of its
``#SBATCH`` lines and of the assignments above its first ``# ----``, and nothing else.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path

from hpc_hdb import __version__
from hpc_hdb.errors import UserError
from hpc_hdb.plan.layout import NodeRanks, lay_out
from hpc_hdb.run.launchers import find_job_launcher, launch_line
from hpc_hdb.run.site import Site

_TO_EDIT = re.compile(r"^# Edit the lines above .*\n", re.M)
_ENVIRONMENT = re.compile(r"^#module load hpc-hdb .*\n", re.M)
_PLAIN = re.compile(r"[\w./:=,@%+^-]+", re.ASCII)


@dataclass(frozen=True)
class Job:
    """What is to run, and where.

    Attributes
    ----------
    configs : sequence of str
        TOML files or presets; more than one make a job array.
    overrides : sequence of str
        ``section.key=value`` each.
    name : str
    workers, servers, nodes, gpus_per_node : int
        Of each run; `nodes` are the workers'.
    server_partition : str or None
        Where each server has a node of its own.
    run : Path or None
        The run folder; by default one named after the job.
    shards : Path or None
        Packed images to copy to the nodes' own disks.
    chained : bool
        Whether an interrupted job submits the next one, instead of requeueing itself.
    folder : Path
        Where the job starts; relative paths are relative to it.
    options : mapping
        Further options of sbatch, by their long names.
    """

    configs: Sequence[str]
    overrides: Sequence[str]
    name: str
    workers: int
    servers: int
    nodes: int
    gpus_per_node: int
    server_partition: str | None
    run: Path | None
    shards: Path | None
    chained: bool
    folder: Path
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def template(self) -> str:
        """Name of the template that suits.

        Raises
        ------
        UserError
            If none does.
        """
        asked = [
            (len(self.configs) > 1, "array", "several CONFIGs"),
            (self.server_partition is not None, "heterogeneous", "--server-partition"),
            (self.chained, "long-run", "--chain"),
        ]
        chosen = [(name, words) for is_asked, name, words in asked if is_asked]
        if len(chosen) > 1:
            raise UserError(f"{chosen[0][1]} and {chosen[1][1]} do not go together: leave one out")
        if chosen:
            return chosen[0][0]
        if self.nodes > 1:
            return "many-nodes"
        return "gpu-node" if self.gpus_per_node else "cpu"

    @property
    def layout(self) -> tuple[NodeRanks, ...]:
        """The ranks of each node; raises UserError where some node would be empty."""
        return lay_out(self.workers, self.nodes, self.servers, self.server_partition is not None)

    def run_folder(self) -> str:
        """The run folder, as shell text."""
        if self.run is not None:
            return shlex.quote(str((self.folder / self.run).absolute()))
        job = "$SLURM_ARRAY_JOB_ID" if len(self.configs) > 1 else "$SLURM_JOB_ID"
        return f"runs/{shlex.quote(self.name.replace('/', '-'))}-{job}"


def training_script(job: Job, site: Site) -> str:
    """The script of a job that trains.

    Raises
    ------
    UserError
        If the job does not fit together, or holds what Slurm cannot be told.
    """
    _check_text(job)
    apart = job.server_partition is not None
    array = len(job.configs) > 1
    launcher = find_job_launcher(site.launcher)
    if apart and launcher.kind == "srun" and job.workers % job.nodes:
        raise UserError(
            f"srun puts as many workers on each node of a heterogeneous job: {job.workers} do not "
            f"fit {job.nodes} nodes"
        )
    workers_nodes = job.layout[job.servers :] if apart else job.layout
    everywhere = {"account": site.account, "qos": site.qos, "time": site.time}
    workers = {
        "partition": site.partition,
        "constraint": site.constraint,
        "mem": site.memory,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(max(node.ranks for node in workers_nodes)),
        "cpus-per-task": str(site.cpus_per_task),
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
    }
    first = {
        "job-name": job.name,
        "array": f"0-{len(job.configs) - 1}" if array else None,
        "chdir": str(job.folder),
        "signal": f"B:USR1@{site.grace}",
        **job.options,
    }
    if apart:
        server = {
            "partition": job.server_partition,
            "nodes": str(job.servers),
            "cpus-per-task": str(site.cpus_per_task),
            "mem": site.memory,
        }
        parts = [everywhere | server | first, everywhere | workers]
    else:
        parts = [everywhere | workers | first]
    words = [] if array else [job.configs[0]]
    for override in job.overrides:
        words += ["--set", override]
    values = {
        "run": f"${{1:-{job.run_folder()}}}{'-$SLURM_ARRAY_TASK_ID' if array else ''}",
        "workers": str(job.workers),
        "shards": shlex.quote(str(job.shards)) if job.shards else "",
        "launch": launch_line(launcher, 2 if array else job.nodes, apart, site.bind),
    }
    if not apart:  # else there are as many as nodes in the job's first part
        values["servers"] = str(job.servers)
    if array:
        values["configs"] = f"({shlex.join(job.configs)})"
        values["train"] = f'("${{configs[SLURM_ARRAY_TASK_ID]}}" {shlex.join(words)}'.rstrip() + ")"
    else:
        values["train"] = f"({shlex.join(words)})"
    if site.scratch:
        values["scratch"] = f'"{site.scratch}"/hdb-$SLURM_JOB_ID'
    return _fill_in(job.template, parts, values, site)


def profile_script(job: Job, site: Site, timing: Path) -> str:
    """The script of a job that measures the time model of ``job.configs[0]`` on one device.

    Raises
    ------
    UserError
        If it holds what Slurm cannot be told.
    """
    _check_text(job)
    options = {
        "job-name": job.name,
        "chdir": str(job.folder),
        "account": site.account,
        "partition": site.partition,
        "qos": site.qos,
        "constraint": site.constraint,
        "mem": site.memory,
        "time": site.time,
        "cpus-per-task": str(site.cpus_per_task),
        "gpus-per-node": "1" if job.gpus_per_node else None,
        **job.options,
    }
    words = [job.configs[0]]
    for override in job.overrides:
        words += ["--set", override]
    values = {"profile": f"({shlex.join(words)})", "timing": shlex.quote(str(timing))}
    return _fill_in("profile", [options], values, site)


def submit(script: Path) -> str:
    """Hand a script to sbatch; the job's id.

    Raises
    ------
    UserError
        If there is no sbatch, or it refuses.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"no sbatch here: submit {script} on a login node of your cluster"
        ) from None
    if done.returncode:
        reason = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise UserError(f"sbatch refuses {script}: {reason}")
    return done.stdout.strip().partition(";")[0]


def limit_seconds(time: str) -> float:
    """Seconds of a time limit as Slurm writes it; infinite for UNLIMITED.

    Raises
    ------
    UserError
        If Slurm would not take it.

    Examples
    --------
    >>> [limit_seconds(time) for time in ("90", "1:30", "2:00:00", "1-12", "1-0:30")]
    [5400.0, 90.0, 7200.0, 129600.0, 88200.0]
    """
    if time.lower() in ("unlimited", "infinite"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UserError(
            f"--time {time}: write minutes, hours:minutes:seconds or days-hours:minutes"
        )
    days, *given = match.groups()
    parts = [int(part) for part in given if part is not None]
    if days is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def template_text(name: str) -> str:
    """A template of ``slurm/``, by its name without ending."""
    path = resources.files("hpc_hdb") / "slurm" / f"{name}.sbatch"
    return path.read_text(encoding="utf-8")


def template_option(name: str, option: str) -> str:
    """The value that a template has for one of sbatch's options."""
    found = re.search(rf"^#SBATCH --{option}=(\S+)", template_text(name), re.M)
    assert found, f"{name}.sbatch has no --{option}"
    return found[1]


def _check_text(job: Job) -> None:
    """Raise UserError where a line would not stay one line."""
    for text in (*job.configs, *job.overrides, job.name, str(job.run), str(job.shards)):
        if not text.isprintable():
            raise UserError(f"{text!r}: a job script takes no line breaks or control characters")


def _fill_in(
    template: str, parts: Sequence[Mapping[str, str | None]], values: Mapping[str, str], site: Site
) -> str:
    """A template with other values.

    Parameters
    ----------
    parts : sequence of mappings
        Options of sbatch for each part of a heterogeneous job. None keeps the template's time
        limit, and takes out what not every job has.
    values : mapping
        Assignments: shell text by name.
    """
    text = _TO_EDIT.sub(
        f"# Written by 'hdb slurm' of hpc-hdb {__version__}; submit it with sbatch.\n",
        template_text(template),
    )
    head, dashes, rest = text.partition("\n# ----")
    lines: list[str] = []
    pending = [dict(part) for part in parts]
    part = 0
    for line in head.split("\n"):
        if not line.startswith("#SBATCH") and lines and lines[-1].startswith("#SBATCH"):
            lines += _new_lines(pending[part])
        elif line == "#SBATCH hetjob":
            lines += _new_lines(pending[part])
            part += 1
        found = re.match(r"#SBATCH --([\w-]+)=(\S+)(.*)", line)
        if found and found[1] in pending[part]:
            value = pending[part].pop(found[1])
            if value is not None:
                line = _directive(found[1], value) + found[3]
            elif found[1] != "time":
                continue
        lines.append(line)
    head = "\n".join(lines)
    for name, value in values.items():
        assignment = re.compile(rf"^{name}=(?:\((?:.|\n)*?\)|\S*)(?: +(#.*))?$", re.M)
        assert assignment.search(head), f"{template}.sbatch has no {name}="
        head = assignment.sub(partial(_assign, name, value), head, count=1)
    environment = "".join(f"{line}\n" for line in _environment(site))
    return _ENVIRONMENT.sub(lambda _: environment, head + dashes + rest)


def _assign(name: str, value: str, old: re.Match[str]) -> str:
    """An assignment that keeps the old one's comment."""
    return f"{f'{name}={value}':<30} {old[1] or ''}".rstrip()


def _new_lines(options: dict[str, str | None]) -> list[str]:
    """Directives for the options that the template has no line for; takes them."""
    lines = [_directive(name, value) for name, value in options.items() if value is not None]
    options.clear()
    return lines


def _directive(name: str, value: str) -> str:
    """An ``#SBATCH`` line: what is typed stays text, whatever it holds."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UserError(f"--sbatch {name}: give the long name of an sbatch option, without dashes")
    if not value.isprintable():
        raise UserError(f"--{name} {value!r}: Slurm takes no control characters there")
    if _PLAIN.fullmatch(value):
        return f"#SBATCH --{name}={value}"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{quoted}"'


def _environment(site: Site) -> list[str]:
    """Lines that make hdb and its MPI available to the job."""
    lines = list(site.setup)
    if site.modules:
        return [*lines, f"module load {shlex.join(site.modules)}"]
    if lines:
        return lines
    return [f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"']
