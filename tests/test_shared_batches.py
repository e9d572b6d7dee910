"""How a batch is shared by ranks: rows, augmentation, dropout, and which ranks make a worker."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dali_pipelines.augmentation import Augmentation
from hpc_hdb.cluster.roles import count_workers, place_workers
from hpc_hdb.config import Data, Model, Settings
from hpc_hdb.errors import UserError
from hpc_hdb.plan import BatchTime
from hpc_hdb.plan.cuts import rows_of
from hpc_hdb.run.planning import known_timing, make_plan
from hpc_hdb.train.data import open_data
from hpc_hdb.train.loader import make_loader
from hpc_hdb.train.model import build_model, set_dropout, set_rows

CPU = torch.device("cpu")


@given(batch=st.integers(0, 200), ranks=st.integers(1, 20))
def test_every_row_belongs_to_one_rank(batch: int, ranks: int) -> None:
    parts = [list(range(batch))[rows_of(batch, rank, ranks)] for rank in range(ranks)]
    assert [row for part in parts for row in part] == list(range(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_what_ranks_are_given_makes_up_the_batch(digits: Path, loader: str, ranks: int) -> None:
    """Flips, rotations and zooms of an image do not depend on the number of ranks."""
    if loader == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    settings = Data(source="digits", path=digits, loader=loader)
    data = open_data(settings, "train")
    indices, sizes = np.random.default_rng(0).permutation(len(data.labels))[:35], [12, 12, 11]

    def batches(rank: int, of: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = partial(rows_of, rank=rank, ranks=of) if of > 1 else None
        own = make_loader(data, settings, Augmentation(), CPU, rows)
        return list(own.batches(indices, sizes, 16, seed=3))

    whole = batches(0, 1)
    parts = zip(*(batches(rank, ranks) for rank in range(ranks)), strict=True)
    for part, expected in zip(parts, whole, strict=True):
        images, labels = (torch.cat(tensors) for tensors in zip(*part, strict=True))
        assert torch.equal(labels, expected[1])
        torch.testing.assert_close(images, expected[0], rtol=0, atol=1e-5)


def test_dropout_draws_for_the_whole_batch() -> None:
    model = build_model(Model(name="resnet8"), 10)
    (dropout,) = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    set_dropout(model, 0.5)
    features = torch.randn(7, 64)

    def dropped(rows: slice) -> torch.Tensor:
        torch.manual_seed(1)
        return dropout(features[rows])

    whole = dropped(slice(7))
    assert 0 < (whole == 0).float().mean() < 1
    for rank in range(3):
        rows = rows_of(7, rank, 3)
        set_rows(model, 7, rows.start)
        assert torch.equal(dropped(rows), whole[rows])
    model.eval()
    assert torch.equal(dropped(slice(2)), features[:2])


@pytest.mark.parametrize(
    ("nodes", "ranks_per_worker", "workers"),
    [
        ("aaaaa", 2, [[1, 2], [3, 4]]),
        ("aaaaabbbb", 4, [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("aaaabbbb", 1, [[1], [2], [3], [4], [5], [6], [7]]),
        # The server takes a place on the first node: its last rank joins the leftover of others.
        ("aaaabbbbc", 2, [[1, 2], [3, 8], [4, 5], [6, 7]]),
        ("ababa", 2, [[1, 3], [2, 4]]),
        ("abcde", 2, [[1, 2], [3, 4]]),
    ],
)
def test_a_workers_ranks_are_on_one_node_where_they_can(
    nodes: str, ranks_per_worker: int, workers: list[list[int]]
) -> None:
    assert place_workers([ord(node) for node in nodes], ranks_per_worker) == workers


@pytest.mark.parametrize(
    ("ranks", "ranks_per_worker", "told"),
    [(4, 2, "start 3 or 5"), (2, 4, "start 5"), (10, 4, "start 9 or 13")],
)
def test_ranks_that_do_not_divide(ranks: int, ranks_per_worker: int, told: str) -> None:
    with pytest.raises(UserError, match=f"{ranks} ranks do not divide .* {told}"):
        count_workers(ranks, 1, ranks_per_worker)


def planned(workers: int, **server: object) -> tuple[int, int, int, float]:
    """Workers, ranks and batch of the plan for so many, and a in its time model."""
    settings = Settings.model_validate(
        {
            "plan": {"small_workers": 0, "timing": {"32": (8e-3, 1e-2)}},
            "schedule": {"large_batch": [60]},
            "server": server,
        }
    )
    timing = known_timing(settings, workers)
    assert timing is not None
    plan = make_plan(settings, workers, 2400, timing)
    line: BatchTime = plan.timing[32]
    return plan.shares.workers, plan.ranks, plan.shares.large_batch, line.seconds_per_image


def test_a_workers_batch_is_as_configured_and_its_ranks_share_the_time() -> None:
    assert planned(4) == (4, 1, 60, 8e-3)
    assert planned(4, ranks_per_worker=2) == (4, 2, 60, 4e-3)


def test_with_all_reduce_the_batch_is_each_ranks() -> None:
    assert planned(4, sync="allreduce") == (1, 4, 240, 2e-3)
