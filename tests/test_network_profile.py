"""``hdb profile --network`` among real MPI ranks, and what plan and simulate make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TIMING, run
from test_command_line import Terminal, hdb, sets

from hpc_hdb.plan.network import Network

__all__ = ["hdb"]

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks have measured their network."""
    folder = tmp_path_factory.mktemp("network")
    words = ["hdb", "profile", "digits", "--network", "--output", "out/timing.json"]
    (folder / "out").mkdir()
    done = run(*words, ranks=RANKS, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_the_constants_are_written_beside_the_timing(folder: Path) -> None:
    values = json.loads((folder / "out/network.json").read_text())
    assert (values["ranks"], values["nodes"]) == (RANKS, 1)
    assert "MPI" in values["mpi"]
    network = Network.from_dict(values)
    # Wide enough for any machine, narrow enough to tell seconds from bytes.
    assert 1e-7 < network.latency < 0.02
    assert 1e-6 < network.overhead < 0.1
    assert 1e6 < network.bandwidth < 1e12
    assert 1e6 < network.merge_rate < 1e13
    assert [path.name for path in (folder / "out").iterdir()] == ["network.json"]


def test_one_rank_shows_them_once(folder: Path) -> None:
    shown = (folder / "stdout").read_text()
    for words in ("latency of a message", "commits, several workers at once", "written to"):
        assert shown.count(words) == 1


def test_plan_and_simulate_read_them(
    folder: Path, hdb: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "out")
    words = ["digits", "--samples", "1437", *sets(TIMING)]
    source = f"measured with {RANKS} ranks, network.json"
    assert hdb.json("plan", *words)["topology"]["network"] == source
    simulated = hdb.json("simulate", *words, "--timing-only", "--workers", "4")
    assert simulated["network"]["source"] == source


def test_a_missing_folder_is_one_line_from_all_ranks(tmp_path: Path) -> None:
    words = ["hdb", "profile", "digits", "--network", "--output", "gone/timing.json"]
    done = run(*words, ranks=2, cwd=tmp_path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("hdb: ")]
    assert lines == ["hdb: --output gone/timing.json: there is no folder gone"]
