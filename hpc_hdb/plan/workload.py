"""What the workers of a run train between two commits, and from how many on servers saturate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_hdb.errors import InfeasiblePlan
from hpc_hdb.plan.batch_time import BatchTime
from hpc_hdb.plan.cuts import split_evenly
from hpc_hdb.plan.dual_batch import Group
from hpc_hdb.plan.network import (
    Network,
    all_reduce_seconds,
    broadcast_seconds,
    commit_cost,
    reduction_seconds,
)
from hpc_hdb.plan.progressive import Stage
from hpc_hdb.plan.topology import Topology
from hpc_hdb.plan.training import TrainingPlan, plan_training


@dataclass(frozen=True)
class GroupRound:
    """A round of one group's workers, averaged over the epochs of a schedule.

    Attributes
    ----------
    workers : int
    seconds : float
        Of its local steps.
    steps : float
    """

    workers: int
    seconds: float
    steps: float


@dataclass(frozen=True)
class Workload:
    """A training run, for any number of workers of one rank each.

    Attributes
    ----------
    stages : sequence of Stage
        With the large batch of a rank.
    timing : mapping of int to BatchTime
        Of a rank, by resolution.
    samples : int
        Training images per epoch.
    small_share : float
        ``n_S / n``, the part of the workers that train with the small batch.
    time_ratio : float
        ``k``.
    commits_per_epoch : int
    model_bytes : float
    """

    stages: Sequence[Stage]
    timing: Mapping[int, BatchTime]
    samples: int
    small_share: float
    time_ratio: float
    commits_per_epoch: int
    model_bytes: float

    def plan(self, workers: int) -> TrainingPlan:
        """The plan for so many workers: with large batches alone where there is no other.

        Raises
        ------
        InfeasiblePlan
            If there are more workers than samples.
        """

        def solve(small_workers: int) -> TrainingPlan:
            ratio = self.time_ratio
            return plan_training(
                self.stages, self.timing, self.samples, workers, small_workers, ratio
            )

        try:
            return solve(round(self.small_share * workers))
        except InfeasiblePlan:
            return solve(0)

    def rounds(self, workers: int) -> list[GroupRound]:
        """The rounds of the groups that have workers.

        Raises
        ------
        InfeasiblePlan
            If there are more workers, or commits of each, than samples.
        """
        plan = self.plan(workers)
        groups = []
        for group in Group:
            size = plan.shares.size(group)
            if not size:
                continue
            share = plan.shares.small_share if group is Group.SMALL else plan.shares.large_share
            samples = share // self.commits_per_epoch
            if not samples:
                raise InfeasiblePlan(
                    f"{self.commits_per_epoch} commits an epoch cut a share of {share} samples "
                    f"into nothing with {workers} workers: use fewer workers, or fewer commits"
                )
            seconds = steps = 0.0
            for number, stage in enumerate(plan.stages):
                part = (stage.end_epoch - stage.start_epoch) / plan.stages[-1].end_epoch
                count = len(split_evenly(samples, plan.batch(number, group)))
                seconds += part * self.timing[stage.resolution].of_steps(samples, count)
                steps += part * count
            groups.append(GroupRound(size, seconds, steps))
        return groups

    def members(
        self, network: Network, topology: Topology, ranks: int
    ) -> tuple[list[float], list[float]]:
        """Seconds of each worker's round: of its steps, and of what its ranks exchange.

        Parameters
        ----------
        ranks : int
            That train; a worker has ``topology.ranks_per_worker`` of them, each of which keeps
            the batch and the samples that it would have on its own.
        """
        train: list[float] = []
        inside: list[float] = []
        seen = 0
        for group in self.rounds(ranks):
            seen += group.workers
            size = seen // topology.ranks_per_worker - len(train)
            train += [group.seconds] * size
            inside += [self._inside(network, topology, group)] * size
        return train, inside

    def saturation(self, network: Network, topology: Topology, sync: str) -> int | None:
        """From how many training ranks on communication limits the run, in closed form.

        In ASP and SSP that is where the busiest server is never idle, ``n*P >= Z + C``; in BSP
        where a merge takes as long as a round's steps. None where no number of ranks that the
        samples suffice for does.
        """
        size = topology.ranks_per_worker
        low, high = 0, self.samples // self.commits_per_epoch // size
        while high and not self._suffices(high * size):  # small shares are smaller than the mean
            high = high * 9 // 10
        if not high or self._load(network, topology, high * size, sync) < 1:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._load(network, topology, middle * size, sync) < 1:
                low = middle
            else:
                high = middle
        return high * size

    def _suffices(self, ranks: int) -> bool:
        """Whether there is a sample for each commit of so many training ranks."""
        try:
            return bool(self.rounds(ranks))
        except InfeasiblePlan:
            return False

    def _load(self, network: Network, topology: Topology, ranks: int, sync: str) -> float:
        groups = self.rounds(ranks)
        train = sum(group.workers * group.seconds for group in groups) / ranks
        inside = sum(group.workers * self._inside(network, topology, group) for group in groups)
        workers = ranks // topology.ranks_per_worker
        if sync == "bsp":
            return reduction_seconds(network, topology, self.model_bytes, workers)[0] / train
        cost = commit_cost(network, self.model_bytes, topology.servers)
        alone = train + inside / ranks + cost.alone
        return topology.most_members(workers) * cost.period / alone

    def _inside(self, network: Network, topology: Topology, group: GroupRound) -> float:
        """Seconds of a worker's round in which its own ranks exchange gradients and models."""
        ranks = topology.ranks_per_worker
        reductions = group.steps * all_reduce_seconds(network, self.model_bytes, ranks)
        return reductions + broadcast_seconds(network, self.model_bytes, ranks)
