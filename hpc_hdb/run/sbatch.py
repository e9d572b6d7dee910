"""Slurm's sbatch: its options, as directives of a script; its time limits; and submitting."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hpc_hdb.errors import UserError

Options = dict[str, str | bool | None]
"""Values by long names; True for an option without value, False or None for one left out."""

_PLAIN = re.compile(r"[\w./:=,@%+^-]+", re.ASCII)
_OWN = {
    **{name: f"--{name}" for name in ("account", "constraint", "cpus-per-task", "gpus-per-node")},
    **{name: f"--{name}" for name in ("job-name", "nodes", "partition", "qos", "time")},
    "array": "several CONFIGs",
    "chdir": "the folder that it is typed in",
    "mem": "--memory",
    "ntasks": "--workers",
    "ntasks-per-node": "--workers",
    "signal": "the site file's grace",
}
_OF_THE_JOB = re.compile(
    "begin|comment|deadline|dependency|error|export|get-user-env|hold|licenses|mail-.*|nice|"
    "no-requeue|open-mode|output|priority|requeue|wckey"
)
_OF_THE_WORKERS = re.compile("gres.*|gpu.*|.*-per-gpu|nodelist")
_OF_A_JOB_AROUND = re.compile("(SLURM|SLURMD|PMI|PMIX|OMPI_COMM|OMPI_UNIVERSE)_")


def typed_options(typed: Sequence[str]) -> Options:
    """Options from ``NAME=VALUE``, or ``NAME`` where sbatch takes no value."""
    options: Options = {}
    for option in typed:
        name, equals, value = option.partition("=")
        options[name.removeprefix("--")] = value if equals else True
    return options


def check_options(options: Options) -> None:
    """Raise UserError for what ``hdb slurm`` itself tells sbatch."""
    for name in options:
        if name in _OWN:
            raise UserError(f"option {name} of sbatch: hdb slurm has {_OWN[name]} for that")


def split_options(options: Options) -> tuple[Options, Options]:
    """Options for the server's part of a heterogeneous job, which is the first, and the workers'.

    What is of the whole job is in the first alone, what is of GPUs or of nodes by name in the
    second alone, and the rest in both.
    """
    server = {k: v for k, v in options.items() if not _OF_THE_WORKERS.fullmatch(k)}
    workers = {k: v for k, v in options.items() if not _OF_THE_JOB.fullmatch(k)}
    return server, workers


def directive(name: str, value: str | bool) -> str:
    """An ``#SBATCH`` line: what is typed stays text, whatever it holds.

    Raises
    ------
    UserError
        If the name is no option's, or the value would not stay one line.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UserError(f"--sbatch {name}: give the long name of an sbatch option, without dashes")
    if isinstance(value, bool):
        return f"#SBATCH --{name}"
    if not value.isprintable():
        raise UserError(f"--{name} {value!r}: Slurm takes no control characters there")
    if _PLAIN.fullmatch(value):
        return f"#SBATCH --{name}={value}"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{quoted}"'


def output_pattern(folder: Path, pattern: str) -> str:
    """A file name for the job's output, such as ``hdb-%j.out``, that Slurm finds in `folder`.

    Slurm also replaces what begins with % in the folder of a relative name.
    """
    if "%" not in str(folder) or pattern.startswith("/"):
        return pattern
    return f"{folder}/".replace("%", "%%") + pattern


def submit(script: Path) -> str:
    """Hand a script to sbatch; the job's id.

    Within a job, that job's own variables are kept from the new one.

    Raises
    ------
    UserError
        If there is no sbatch, or it refuses.
    """
    environment = dict(os.environ)
    if "SLURM_JOB_ID" in environment:
        kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
        environment = {
            name: value
            for name, value in environment.items()
            if name in kept or not _OF_A_JOB_AROUND.match(name)
        }
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
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
    """Seconds of a time limit as Slurm writes it; infinite for UNLIMITED, and for zero.

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
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds) or math.inf
