"""The method as pure arithmetic: no torch, no MPI, no files."""

from hpc_hdb.plan.batch_time import BatchTime, BatchTimeFit, fit_batch_time, fit_timings
from hpc_hdb.plan.cuts import Round
from hpc_hdb.plan.dual_batch import DualBatchPlan, Group, plan_dual_batch
from hpc_hdb.plan.learning_rate import RateSchedule, scale_rate
from hpc_hdb.plan.progressive import Stage, cut_stages, stage_index
from hpc_hdb.plan.rounds import RoundBook
from hpc_hdb.plan.training import TrainingPlan, plan_training

__all__ = [
    "BatchTime",
    "BatchTimeFit",
    "DualBatchPlan",
    "Group",
    "RateSchedule",
    "Round",
    "RoundBook",
    "Stage",
    "TrainingPlan",
    "cut_stages",
    "fit_batch_time",
    "fit_timings",
    "plan_dual_batch",
    "plan_training",
    "scale_rate",
    "stage_index",
]
