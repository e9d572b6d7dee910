"""How a model's buffer is cut into parts and slices."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hpc_hdb.cluster.slices import Slices


@given(size=st.integers(1, 1_000_000_000), servers=st.integers(1, 70))
def test_slices_follow_one_another_and_hold_whole_parts(size: int, servers: int) -> None:
    slices = Slices(size, servers)
    parts = [part for server in range(servers) for part in slices.parts(server)]
    assert parts == Slices(size, 1).parts(0), "the parts depend on the size alone"
    assert parts[0].start == 0 and parts[-1].stop == size
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
    assert all(part.start < part.stop for part in parts)
    for server in range(servers):
        own = slices.parts(server)
        if own:
            assert slices.bounds(server) == (own[0].start, own[-1].stop)


@given(size=st.integers(1_000_000, 1_000_000_000), servers=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_slices_are_of_one_length(size: int, servers: int) -> None:
    lengths = [end - begin for begin, end in map(Slices(size, servers).bounds, range(servers))]
    longest_part = max(part.stop - part.start for part in Slices(size, servers).parts(0))
    assert max(lengths) - min(lengths) <= longest_part + 2


@given(size=st.integers(1, 100_000_000), servers=st.integers(1, 9))
def test_servers_take_turns(size: int, servers: int) -> None:
    slices = Slices(size, servers)
    turns = slices.interleaved()
    assert sorted(turns, key=lambda turn: turn[1].start) == [
        (server, part) for server in range(servers) for part in slices.parts(server)
    ]
    seen = [0] * servers
    for server, _ in turns:
        seen[server] += 1
        behind = [s for s in range(servers) if seen[s] < min(max(seen) - 1, len(slices.parts(s)))]
        assert not behind
