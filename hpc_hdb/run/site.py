"""What a user's cluster wants of every job: the site file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hpc_hdb.config_files import nearest, read_toml, wrong_value
from hpc_hdb.errors import UserError


class Site(BaseModel):
    """Defaults of ``hdb slurm`` on one cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory: str | None = None
    """Of each node, as sbatch's --mem."""
    time: str | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    gpus: str = "gpus-per-node={n}"
    """The option of sbatch that asks for {n} GPUs of a node."""
    cpus_per_task: Annotated[int, Field(ge=1)] = 8
    launcher: str = "auto"
    """"mpirun", "srun --mpi=pmix", ...; "auto" looks for an mpirun."""
    bind: bool | Literal["cores"] = True
    """Whether the launcher binds each rank to cores of its own; "cores" where a CPU of Slurm's is a
    core, and not a hardware thread."""
    grace: Annotated[int, Field(ge=10, le=3600)] = 180
    """Seconds before the time limit at which a run is told to save and end."""
    scratch: str | None = None
    """Folder on each node's own disk; may hold environment variables of the job."""
    modules: list[str] = []
    """What 'module load' is to load in the job."""
    setup: list[str] = []
    """Lines of shell for the job, before anything else."""
    options: dict[str, bool | int | str] = {}
    """More options of sbatch, by their long names; true for those without a value."""

    @field_validator("scratch")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w./+-]*(\$(\w+|\{\w+\})[\w./+-]*)*", value):
            raise ValueError("a path with $VARIABLES at most")
        return value

    @field_validator("gpus")
    @classmethod
    def _is_an_option(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z-]+=[^{}]*\{n\}[^{}]*", value):
            raise ValueError('an option of sbatch such as "gres=gpu:a100:{n}"')
        return value


def load_site() -> Site:
    """Read ``$HDB_SITE``, or ``~/.config/hpc-hdb/site.toml`` where there is one.

    Raises
    ------
    UserError
        If the file that HDB_SITE names is missing, or a file is no valid site file.
    """
    chosen = os.environ.get("HDB_SITE")
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    path = Path(chosen) if chosen else Path(config) / "hpc-hdb" / "site.toml"
    try:
        values = read_toml(path)
    except FileNotFoundError:
        if chosen:
            raise UserError(f"HDB_SITE names {chosen}, and there is no such file") from None
        return Site()
    try:
        return Site.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(key, list(Site.model_fields))}"
    return wrong_value(key, problem["msg"], problem["input"])
