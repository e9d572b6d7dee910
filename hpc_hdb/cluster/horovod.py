"""Horovod, where the installed one fits this torch and MPI."""

from __future__ import annotations

import json
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch

from hpc_hdb.errors import UserError

_BUILD = "build it with 'make horovod' or 'python -m hpc_hdb.run.install_horovod'"


def load_horovod(needed_by: str) -> Any:
    """The module ``horovod.torch``.

    Parameters
    ----------
    needed_by : str
        The setting that needs it, for messages.

    Raises
    ------
    UserError
        If Horovod is missing, or was built for another torch or MPI.
    """
    try:
        package = util.find_spec("horovod.torch")
    except ModuleNotFoundError:
        package = None
    if package is None or package.origin is None:
        raise UserError(f"{needed_by} needs Horovod, which is not installed: {_BUILD}")
    built_for = _built_for(Path(package.origin).parents[1] / "metadata.json")
    if built_for != torch.__version__:
        raise UserError(
            f"{needed_by} needs Horovod, and the installed one was built for torch "
            f"{built_for or '(none)'}, not {torch.__version__}: {_BUILD}"
        )
    try:
        horovod = import_module("horovod.torch")
        if not horovod.mpi_built():
            raise ImportError("it was built without MPI")
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{needed_by} needs Horovod, and the installed one does not load ({reason}): {_BUILD}"
        ) from None
    return horovod


def _built_for(path: Path) -> str:
    """Version of the torch that the installed Horovod was built for; empty if unknown."""
    try:
        return json.loads(path.read_text())["pytorch"]
    except (OSError, ValueError, KeyError):
        return ""
