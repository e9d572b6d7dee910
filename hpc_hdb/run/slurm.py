"""Job scripts for Slurm: a template of ``slurm/`` with the user's words filled in, quoted.

The templates are scripts that run as they stand. Filling one in changes the values of its
``#SBATCH`` lines and of the assignments above its first ``# ----``, and nothing else.
"""

from __future__ import annotations

import re
import shlex
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path

from hpc_hdb import __version__
from hpc_hdb.errors import UserError
from hpc_hdb.plan.layout import NodeRanks, lay_out
from hpc_hdb.run.launchers import Launcher, launch_line
from hpc_hdb.run.sbatch import Options, directive, output_pattern, split_options
from hpc_hdb.run.site import Site

_TO_EDIT = re.compile(r"^# Edit the lines above .*\n", re.M)
_ENVIRONMENT = re.compile(r"^#module load hpc-hdb .*\n", re.M)
_WRITTEN = "# Written by 'hdb slurm' of hpc-hdb"
_SUM = re.compile(rf"^({_WRITTEN} \S+) \(\w+\)", re.M)


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
    workers, servers : int
        Ranks of each run that train, and that serve.
    nodes, gpus_per_node : int
        Of the workers.
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
    options: Options = field(default_factory=dict)

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


def training_script(job: Job, site: Site, launcher: Launcher) -> str:
    """The script of a job that trains.

    Raises
    ------
    UserError
        If the job does not fit together, or holds what Slurm cannot be told.
    """
    _check_text(job)
    apart = job.server_partition is not None
    array = len(job.configs) > 1
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
        **_gpu_options(site, job.gpus_per_node),
    }
    whole = {
        "job-name": job.name,
        "array": f"0-{len(job.configs) - 1}" if array else None,
        "chdir": str(job.folder),
        "signal": f"B:USR1@{site.grace}",
        **_outputs(job, job.template),
    }
    if apart:
        server = {
            "partition": job.server_partition,
            "nodes": str(job.servers),
            "cpus-per-task": str(site.cpus_per_task),
            "mem": site.memory,
        }
        of_server, of_workers = split_options(job.options)
        parts = [everywhere | server | of_server | whole, everywhere | workers | of_workers]
    else:
        parts = [everywhere | workers | job.options | whole]
    words = [] if array else [job.configs[0]]
    for override in job.overrides:
        words += ["--set", override]
    values = {
        "run": f"${{1:-{job.run_folder()}}}{'-$SLURM_ARRAY_TASK_ID-$name' if array else ''}",
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
    options: Options = {
        "job-name": job.name,
        "chdir": str(job.folder),
        "account": site.account,
        "partition": site.partition,
        "qos": site.qos,
        "constraint": site.constraint,
        "mem": site.memory,
        "time": site.time,
        "cpus-per-task": str(site.cpus_per_task),
        **_gpu_options(site, min(1, job.gpus_per_node)),
        **job.options,
        **_outputs(job, "profile"),
    }
    words = [job.configs[0]]
    for override in job.overrides:
        words += ["--set", override]
    values = {"profile": f"({shlex.join(words)})", "timing": shlex.quote(str(timing))}
    return _fill_in("profile", [options], values, site)


def template_text(name: str) -> str:
    """A template of ``slurm/``, by its name without ending."""
    path = resources.files("hpc_hdb") / "slurm" / f"{name}.sbatch"
    return path.read_text(encoding="utf-8")


def template_option(name: str, option: str) -> str:
    """The value that a template has for one of sbatch's options."""
    found = re.search(rf"^#SBATCH --{option}=(\S+)", template_text(name), re.M)
    assert found, f"{name}.sbatch has no --{option}"
    return found[1]


def is_as_written(text: str) -> bool:
    """Whether ``hdb slurm`` has written this script, and nobody has edited it since."""
    return bool(_SUM.search(text)) and _with_sum(_SUM.sub(r"\1", text, count=1)) == text


def _check_text(job: Job) -> None:
    """Raise UserError where a line would not stay one line."""
    for text in (*job.configs, *job.overrides, job.name, str(job.run), str(job.shards)):
        if not text.isprintable():
            raise UserError(f"{text!r}: a job script takes no line breaks or control characters")
    if "\\" in str(job.folder):
        raise UserError(f"{job.folder}: Slurm starts no job in a folder with a backslash: move it")


def _outputs(job: Job, template: str) -> Options:
    """Where the job's output goes."""
    names = ("output", "error")
    given = {name: job.options.get(name) or template_option(template, name) for name in names}
    return {name: output_pattern(job.folder, str(pattern)) for name, pattern in given.items()}


def _gpu_options(site: Site, gpus: int) -> Options:
    """How the site's nodes are asked for so many GPUs."""
    name, _, value = site.gpus.replace("{n}", str(gpus)).partition("=")
    return {"gpus-per-node": None, name: value if gpus else None}


def _fill_in(template: str, parts: Sequence[Options], values: Mapping[str, str], site: Site) -> str:
    """A template with other values.

    Parameters
    ----------
    parts : sequence of mappings
        Options of sbatch for each part of a heterogeneous job. None, like an empty text, keeps
        the template's time limit, and takes out what not every job has.
    values : mapping
        Assignments: shell text by name.
    """
    text = _TO_EDIT.sub(
        f"{_WRITTEN} {__version__}; submit it with sbatch.\n", template_text(template)
    )
    head, dashes, rest = text.partition("\n# ----")
    lines: list[str] = []
    pending: list[Options] = [
        {name: value or None for name, value in part.items()} for part in parts
    ]
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
                line = directive(found[1], value) + found[3]
            elif found[1] != "time":
                continue
        lines.append(line)
    head = "\n".join(lines)
    for name, value in values.items():
        assignment = re.compile(rf"^{name}=(?:\((?:.|\n)*?\)|\S*)(?: +(#.*))?$", re.M)
        assert assignment.search(head), f"{template}.sbatch has no {name}="
        head = assignment.sub(partial(_assign, name, value), head, count=1)
    environment = "".join(f"{line}\n" for line in _environment(site))
    return _with_sum(_ENVIRONMENT.sub(lambda _: environment, head + dashes + rest))


def _with_sum(text: str) -> str:
    """A script that says by its checksum whether it has been edited since."""
    total = zlib.crc32(text.encode(errors="surrogateescape"))
    return re.sub(rf"^({_WRITTEN} [^;\s]+)", rf"\1 ({total:08x})", text, count=1, flags=re.M)


def _assign(name: str, value: str, old: re.Match[str]) -> str:
    """An assignment that keeps the old one's comment."""
    return f"{f'{name}={value}':<30} {old[1] or ''}".rstrip()


def _new_lines(options: Options) -> list[str]:
    """Directives for the options that the template has no line for; takes them."""
    lines = [directive(name, value) for name, value in options.items() if value is not None]
    options.clear()
    return lines


def _environment(site: Site) -> list[str]:
    """Lines that make hdb and its MPI available to the job."""
    lines = list(site.setup)
    if site.modules:
        return [*lines, f"module load {shlex.join(site.modules)}"]
    if lines:
        return lines
    return [f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"']
