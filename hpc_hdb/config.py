"""A run's settings as validated objects; `hpc_hdb.config_files` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime, RateSchedule, Stage, cut_stages, scale_rate

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _paths_hold_no_null_characters(self) -> Section:
        for name, value in self:
            if isinstance(value, Path) and "\0" in str(value):
                raise ValueError(f"{type(self).__name__.lower()}.{name} holds a null character")
        return self


class Data(Section):
    """Where the images come from."""

    source: Literal["digits", "cifar10", "cifar100", "folder", "shards", "synthetic"] = "digits"
    path: Path = Path("data")
    """An image folder with train/ and val/ or test/, or what 'hdb pack' made of one ("shards");
    for the other sources, where they are kept."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """Processes (torch) or threads (DALI) that decode beside the rank; 0 decodes in the rank."""
    on_bad_image: Literal["error", "skip"] = "error"
    """"error" ends the run and names the file; "skip" leaves it out and lists it in the report."""
    synthetic_classes: Positive = 10
    synthetic_samples: Positive = 2000
    synthetic_side: Positive = 32


class Model(Section):
    """What is trained."""

    name: str = "resnet18"
    """A torchvision model, "resnet8" or "resnet20", or "package.module:function" of your own."""
    stem: Literal["small", "imagenet"] = "small"
    """"small" gives a torchvision ResNet a 3x3 first convolution and no max-pool."""


class Plan(Section):
    """The dual-batch plan."""

    workers: Positive = 4
    """Workers to plan for or to simulate; under a launcher the ranks less the servers count."""
    small_workers: Annotated[int, Field(ge=0)] = 1
    time_ratio: Annotated[float, Field(ge=1)] = 1.05
    """k: permitted epoch time relative to large batches alone."""
    timing: Path | Literal["profile"] | dict[str, tuple[float, float]] = "profile"
    """A timing.json, "profile" to measure at the start, or {resolution = [a, c]} in seconds."""
    network: Path | None = None
    """A network.json, for what topology is best; by default the one beside timing.json."""


class Schedule(Section):
    """Epochs, learning rate, and the resolutions that cycle within each of its stages."""

    epochs: Positive = 10
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    milestones: list[Positive] = []
    """Epochs at which a cycle of resolutions begins, and at which step decay lowers the rate."""
    factor: Annotated[float, Field(gt=0)] = 0.1
    decay: Literal["step", "cosine", "linear"] = "step"
    """Times `factor` at each milestone, or to zero at the end of training."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Epochs in which the rate rises from zero."""
    scale_with_workers: Literal["none", "linear", "sqrt"] = "none"
    """How the rate grows with the number of workers."""
    scale_with_batch: Literal["none", "linear", "sqrt"] = "none"
    """How the rate grows with a worker's batch, from `reference_batch` on."""
    reference_batch: Positive | None = None
    """The batch for which `learning_rate` is meant, in images."""
    resolutions: list[Annotated[int, Field(ge=4)]] = [32]
    dropout: list[Probability] = [0.0]
    large_batch: list[Positive] = []
    """B_L of each resolution; empty takes the largest that 'hdb profile' found."""
    cyclic: bool = True
    """False trains at the highest resolution alone."""

    def stages(self) -> tuple[Stage, ...]:
        """The stages of training; raises UserError where they cannot be cut."""
        return cut_stages(
            self.epochs,
            self.learning_rate,
            self.milestones,
            self.factor,
            self.resolutions,
            self.dropout,
            self.large_batch,
            self.cyclic,
            self.decay,
            self.warmup,
        )

    def rates(self) -> RateSchedule:
        """The learning rate over the epochs, before it is scaled."""
        return RateSchedule(
            self.learning_rate,
            self.epochs,
            self.decay,
            tuple(self.milestones),
            self.factor,
            self.warmup,
        )

    def rate_scale(self, workers: int, batch: int) -> float:
        """What the rate is multiplied by for one of `workers` workers with that batch."""
        scale = scale_rate(self.scale_with_workers, workers)
        if self.reference_batch is not None:
            scale *= scale_rate(self.scale_with_batch, batch / self.reference_batch)
        return scale


class Server(Section):
    """How commits are merged."""

    sync: Literal["asp", "bsp", "ssp", "allreduce"] = "asp"
    """"allreduce" is conventional training, all ranks together, without a parameter server."""
    merge: Literal["weighted", "compsac"] = "weighted"
    """ASP and SSP: (w + f*w_i)/(1 + f), or the COMPSAC paper's ((2 - f)*w + f*w_i)/2."""
    staleness: Annotated[int, Field(ge=0)] = 1
    """SSP: commits that a worker may be ahead of the slowest."""
    commits_per_epoch: Positive = 1
    """Commits of each worker in an epoch."""
    optimizer: Literal["average", "nesterov", "slowmo"] = "average"
    """The server's own step after a merge: none, or with momentum (DiLoCo, SlowMo)."""
    outer_rate: Annotated[float, Field(gt=0)] = 1.0
    """The server optimizer's learning rate: DiLoCo's, or SlowMo's alpha."""
    outer_momentum: Probability = 0.5
    average: Literal["none", "ema", "swa"] = "none"
    """The weight average that is evaluated and saved as the result; workers never see it."""
    average_half_life: Annotated[float, Field(gt=0)] = 1.0
    """"ema": epochs after which the weight of a version has halved."""
    average_from: Annotated[float, Field(ge=0)] = 0.0
    """"swa": the epoch after which versions count."""
    recalibrate: Annotated[int, Field(ge=0)] = 0
    """Training images that give the evaluated model its batch-norm statistics; 0 merges them."""
    servers: Positive = 1
    """Ranks over which the global model is spread; the first ones."""
    ranks_per_worker: Positive = 1
    """Ranks (one GPU each) that share each batch of a worker; more than 1 needs Horovod."""
    adaptive: bool = False
    """BSP and SSP: shares follow the workers' measured speeds, so that a slow one keeps none
    waiting; in ASP the fast ones take more rounds anyway."""
    refusals: Positive = 3
    """Rounds in a row that may end in NaN or infinity before a worker is dropped."""
    silent_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Without a word from a worker under way, and three predicted rounds: it is reported."""
    silent_worker: Literal["report", "drop"] = "report"
    """"drop" also ends it, and lets the others take over its share (with fault tolerance)."""

    replacements: Annotated[int, Field(ge=0)] = 0
    """Processes started in place of workers that have died, at most (with fault tolerance)."""

    @property
    def synchronous(self) -> bool:
        """Whether a round ends for all workers at once."""
        return self.sync in ("bsp", "allreduce")

    @property
    def adapts(self) -> bool:
        """Whether shares follow the workers' speeds."""
        return self.adaptive and self.sync != "asp"

    @property
    def patience(self) -> float:
        """Seconds without a word after which a rank is given up; never where it is reported."""
        return self.silent_seconds if self.silent_worker == "drop" else float("inf")

    @property
    def server_ranks(self) -> int:
        """Ranks that serve instead of training."""
        return 0 if self.sync == "allreduce" else self.servers

    @property
    def rates(self) -> str:
        """The settings that a training that diverges wants lower, in words."""
        server = "" if self.optimizer == "average" else " or server.outer_rate"
        return f"schedule.learning_rate{server}"

    @property
    def shared(self) -> bool:
        """Whether several ranks share a batch."""
        return self.sync == "allreduce" or self.ranks_per_worker > 1


class Train(Section):
    """The local steps."""

    momentum: Probability = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay_norms: bool = True
    """Whether weight decay takes biases and the parameters of normalisation too."""
    nesterov: bool = False
    keep_momentum: bool = True
    """Whether the optimizer's state outlives a round."""
    label_smoothing: Probability = 0.0
    """Share of each training label that is spread over all classes."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """"auto" is bf16 on a GPU that has it and fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    flip: bool = True
    rotation: Annotated[float, Field(ge=0, le=180)] = 18.0
    """Degrees to either side."""
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Largest relative change of size, to either side."""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Least share of an image that a random crop keeps, such as 0.08; 1 takes the centre."""


class Run(Section):
    """Where results go, and how often."""

    output: Path | None = None
    """The run folder; by default runs/NAME-DATE-TIME."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per rank; 0 shares the node's cores (or takes OMP_NUM_THREADS)."""
    checkpoint_every: Positive = 1
    """Commits of one worker that may be unsaved."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept; beside them the best by accuracy is."""
    evaluate_every: Positive = 1
    """Epochs between evaluations of the merged model."""
    evaluation_batch: Positive = 250
    report: bool = True
    """Whether rank 0 writes report.html and plots/ at the end, as 'hdb report' does."""

    @property
    def states_kept(self) -> int:
        """Commits of a worker back to which its state is kept, so that each checkpoint has its own.

        Each is at most `checkpoint_every` commits behind the next, and one more is under way.
        """
        return self.keep_checkpoints * (self.checkpoint_every + 1)


class Settings(Section):
    """Everything a run needs. Each key has a default; presets are files of these."""

    data: Data = Data()
    model: Model = Model()
    plan: Plan = Plan()
    schedule: Schedule = Schedule()
    server: Server = Server()
    train: Train = Train()
    run: Run = Run()

    @model_validator(mode="after")
    def _settings_go_together(self) -> Settings:
        self.schedule.stages()
        if self.schedule.scale_with_batch != "none" and self.schedule.reference_batch is None:
            raise UserError(
                f'schedule.scale_with_batch = "{self.schedule.scale_with_batch}" needs '
                "schedule.reference_batch: set it to the batch that schedule.learning_rate is for"
            )
        server, epochs = self.server, self.schedule.epochs
        if server.average == "swa" and server.average_from >= epochs:
            raise UserError(
                f"server.average_from = {server.average_from:g} leaves nothing to average in "
                f"{epochs} epochs: make it smaller"
            )
        return self

    def inline_timing(self) -> dict[int, BatchTime] | None:
        """The time model where the configuration holds it, else None."""
        if not isinstance(self.plan.timing, dict):
            return None
        try:
            return {int(side): BatchTime(*line) for side, line in self.plan.timing.items()}
        except ValueError:
            raise UserError(
                f"plan.timing: its keys are resolutions, not {', '.join(self.plan.timing)}"
            ) from None

    def to_toml(self) -> str:
        """The settings as TOML, every key written out."""
        lines = []
        for section, values in self.model_dump(mode="json", exclude_none=True).items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
            lines.append("")
        return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
