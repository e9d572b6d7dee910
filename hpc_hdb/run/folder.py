"""The run folder: what a run leaves behind, and the lock that keeps a second run out."""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dali_pipelines.files import write_whole
from hpc_hdb.config import Settings
from hpc_hdb.config_files import read_settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import TrainingPlan
from hpc_hdb.run.lock import FolderLock

_OF_A_RUN = ("config.toml", "events.jsonl", "checkpoint", "model.pt")
"""What only a run leaves that can be gone on with: `RunFolder.begin` writes config.toml last."""

_ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EACCES: "make it yours to write",
    errno.EPERM: "make it yours to write",
    errno.EROFS: "make it writable",
}


class RunFolder:
    """A locked run folder; made by `create` or `reopen`.

    As a context it unlocks at the end, and takes a new folder away again in which no run began.

    Attributes
    ----------
    path : Path
    resumed : bool
        Whether it holds a run that goes on.
    goes_back : bool
        Whether that goes on from its best checkpoint instead of the newest.
    """

    def __init__(
        self,
        path: Path,
        note: Callable[[str], None],
        resumed: bool,
        goes_back: bool = False,
        made: bool = False,
    ) -> None:
        self.path = path
        self.resumed = resumed
        self.goes_back = goes_back
        self._made = made
        self._begun = resumed
        self._lock = FolderLock(path, note)

    @classmethod
    def create(cls, settings: Settings, name: str, note: Callable[[str], None]) -> RunFolder:
        """Make a new run folder; `note` is as in `FolderLock`.

        Raises
        ------
        UserError
            If it cannot be made, is in use, or already holds a run.
        """
        path = settings.run.output or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with _to_be_written(path):
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, note, resumed=False, made=made)
            with folder._left_on_errors():
                if any((path / of_a_run).exists() for of_a_run in _OF_A_RUN):
                    raise UserError(
                        f"{path} already holds a run: go on with it by --resume {_quoted(path)}, "
                        "or choose another run.output"
                    )
                folder._lock.sign()
        return folder

    @classmethod
    def reopen(
        cls, path: Path, goes_back: bool, note: Callable[[str], None]
    ) -> tuple[RunFolder, Settings]:
        """Open the folder of an interrupted run, and the settings it was started with.

        Parameters
        ----------
        goes_back : bool
            As the attribute.
        note : callable
            As in `FolderLock`.

        Raises
        ------
        UserError
            If it is not a run folder, its settings are damaged, or another run is using it.
        """
        if not path.is_dir():
            raise UserError(f"--resume {path}: there is no such run folder")
        with _to_be_written(path):
            settings = read_settings(path / "config.toml")
            folder = cls(path, note, resumed=True, goes_back=goes_back)
            with folder._left_on_errors():
                folder._lock.sign()
        return folder, settings

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._made and not self._begun:
            with contextlib.suppress(OSError):  # it may have been filled meanwhile
                (self.path / ".lock").unlink()
                self.path.rmdir()

    @contextlib.contextmanager
    def _left_on_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.__exit__()
            raise

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, and its model is there."""
        return (self.path / "summary.json").exists() and self.model.exists()

    def check(self) -> None:
        """Raise UserError where another run has taken the folder over."""
        self._lock.check()

    def begin(self, settings: Settings, plan: TrainingPlan) -> None:
        """Write what the run is to do; from now on the folder holds a run.

        Raises
        ------
        UserError
            If it cannot be written.
        """
        with _to_be_written(self.path):
            self.write_json("plan.json", _without_rates(plan.to_dict()))
            write_whole(self.path / "config.toml", settings.to_toml().encode())
        self._begun = True

    def read_plan(self, settings: Settings) -> TrainingPlan | None:
        """The plan that the run was started with; None for a new run.

        Its learning rates are those of the settings.

        Raises
        ------
        UserError
            If it is missing or damaged, or has other learning rates.
        """
        if not self.resumed:
            return None
        path = self.path / "plan.json"
        rates = settings.schedule.rates()
        try:
            values = json.loads(path.read_text())
            stages = [
                {"learning_rate": rates.of_stage(stage["start_epoch"])} | stage
                for stage in values["stages"]
            ]
            plan = TrainingPlan.from_dict(values | {"stages": stages}, settings.plan.time_ratio)
        except Exception as error:  # a damaged file raises whatever its bytes lead to
            what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
            again = _quoted(self.path / "config.toml")
            raise UserError(
                f"{path} {what} ({type(error).__name__}: {error}): start the run again with "
                f"hdb train {again} --set run.output=..."
            ) from None
        if any(rates.of_stage(stage.start_epoch) != stage.learning_rate for stage in plan.stages):
            raise UserError(
                f"{path} has other learning rates than {self.path / 'config.toml'}, whose "
                "[schedule] counts: set them there, and take learning_rate out of the plan's stages"
            )
        return plan

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        write_whole(self.path / name, (json.dumps(values, indent=2) + "\n").encode())


def _without_rates(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan's values without what the settings say at every moment of a run."""
    stages = [
        {key: value for key, value in stage.items() if key != "learning_rate"}
        for stage in plan["stages"]
    ]
    return plan | {"stages": stages}


@contextlib.contextmanager
def results_in(path: Path, check: Callable[[], None] | None = None) -> Iterator[None]:
    """For the time in which a run writes into its folder `path`: a failing disk is a UserError.

    So is, if `check` says so, another run that has taken the folder over and tidied it up.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):  # torch.save hides it behind a RuntimeError
            raise
        if check is not None:
            check()
        advice = _ADVICE.get(cause.errno or 0, "mend that")
        raise UserError(
            f"run folder {path}: {_reason(cause)}: {advice}, then go on with "
            f"hdb train --resume {_quoted(path)}"
        ) from None


@contextlib.contextmanager
def _to_be_written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot use the run folder {path}: {_reason(error)}: choose a run.output on a disk "
            "with room where you may write"
        ) from None


def _reason(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
