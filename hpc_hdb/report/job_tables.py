"""What ``hdb slurm`` shows of a job: its ranks, and its predicted time beside the limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpc_hdb.plan import TrainingPlan
from hpc_hdb.plan.layout import NodeRanks
from hpc_hdb.report.tables import TextTable
from hpc_hdb.report.units import format_count, format_seconds


def layout_table(layout: Sequence[NodeRanks], gpus_per_node: int, cpus_per_task: int) -> TextTable:
    """The ranks of each node; nodes that are alike share a row."""
    rows = []
    begin = 0
    for position, node in enumerate(layout):
        after = layout[position + 1] if position + 1 < len(layout) else None
        if after and (after.servers, after.ranks) == (node.servers, node.ranks):
            continue
        first = layout[begin]
        several = " each" if position > begin else ""
        rows.append(
            (
                str(begin + 1) if position == begin else f"{begin + 1} to {position + 1}",
                str(first.first) if first.first == node.last else f"{first.first} to {node.last}",
                f"{node.servers}{several}" if node.servers else "-",
                f"{node.workers}{several}",
                f"{min(gpus_per_node, node.workers)}{several}" if gpus_per_node else "-",
                f"{node.ranks * cpus_per_task}{several}",
            )
        )
        begin = position + 1
    columns = ("node", "ranks", "servers", "workers", "GPUs in use", "cores in use")
    return TextTable("Ranks", columns, rows)


def time_lines(plan: TrainingPlan, limit: float, grace: int) -> str:
    """Predicted time of a run beside the job's time limit.

    Parameters
    ----------
    plan : TrainingPlan
    limit : float
        In seconds.
    grace : int
        Seconds before the limit at which the run is told to save and end.
    """
    needed = plan.predicted_seconds()
    epochs = plan.stages[-1].end_epoch
    shortest, longest = (
        format_seconds(choose(solved.epoch_seconds for solved in plan.plans))
        for choose in (min, max)
    )
    an_epoch = shortest if shortest == longest else f"{shortest} to {longest}"
    told = (
        f"{format_count(epochs, 'epoch')} of {format_count(plan.samples, 'image')}: "
        f"predicted {format_seconds(needed)} ({an_epoch} an epoch)"
    )
    if math.isinf(limit):
        return f"{told}; no time limit"
    usable = limit - grace
    if needed <= usable:
        return f"{told}; the limit of {format_seconds(limit)} is enough"
    if usable <= 0:
        return f"{told}; the limit of {format_seconds(limit)} leaves no time to train"
    jobs = math.ceil(needed / usable)
    return (
        f"{told}; the limit of {format_seconds(limit)} cuts it into {jobs} turns, "
        "each of which goes on where the one before was"
    )
