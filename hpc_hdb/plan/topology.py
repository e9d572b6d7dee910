"""Who commits to whom: one server, several with a slice each, groups of ranks, or a tree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Who commits to whom.

    Parameters
    ----------
    name : str
        "star", "sharded", "grouped" or "tree".
    servers : int
        ``k``; each holds a slice of the model.
    ranks_per_worker : int
        ``g``; they all-reduce their gradients after each step, and one of them commits.
    fan_out : int
        Most that commit to one server; 0 for all. Where there are more, servers commit to
        servers: each one time for as many commits as it has members.
    """

    name: str
    servers: int = 1
    ranks_per_worker: int = 1
    fan_out: int = 0

    def levels(self, workers: int) -> list[int]:
        """Numbers of those that commit, from the workers up to the members of the root.

        >>> Topology("tree", fan_out=16).levels(1000)
        [1000, 63, 4]
        """
        levels = [workers]
        while self.fan_out and levels[-1] > self.fan_out:
            levels.append(-(-levels[-1] // self.fan_out))
        return levels

    def server_ranks(self, workers: int) -> int:
        """Ranks that serve instead of training."""
        return self.servers + sum(self.levels(workers)[1:])

    def most_members(self, workers: int) -> int:
        """Members of the server that has the most."""
        levels = self.levels(workers)
        full = self.fan_out if len(levels) > 1 else 0
        return max(full, levels[-1])
