"""`Fleet.duplicates`: every pair of a fleet within the limit, in any number of parts, and how it stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import Cancelled, Fleet, Progress, save_adapter
from icmlora.adapter.arithmetic import plus, times
from icmlora.adapter.metrics import distance, dw_norm
from icmlora.errors import DataError
from tests.icmlora.fleet.stores import files_of, stop_after
from tests.icmlora.small_fleet import make_adapter


@pytest.fixture
def crowd(tmp_path: Path) -> Fleet:
    """Twenty adapters: eight alone, and four with two near copies each, of which one is just too far."""
    adapters = {f"alone-{seed}": make_adapter(seed, own=5.0) for seed in range(8)}
    for seed in range(8, 12):
        one, other = make_adapter(seed, own=5.0), make_adapter(seed + 100, own=5.0)
        for name, share in (("a", 0.0), ("b", 0.09), ("c", 0.12)):
            changed = plus(one, times(other.modules, share * dw_norm(one) / dw_norm(other)))
            adapters[f"group-{seed}-{name}"] = changed
    for name, adapter in adapters.items():
        save_adapter(adapter, tmp_path / "loras" / name, dtype="float32")
    fleet = Fleet(tmp_path / "store")
    fleet.ingest([tmp_path / "loras"])
    return fleet


def test_all_near_copies_of_a_fleet_are_found(crowd: Fleet) -> None:
    found = crowd.duplicates(max_distance=0.1)
    names = {group.tasks for group in found.groups}
    assert (found.compared, found.left_out) == (20, [])
    assert names == {tuple(f"group-{seed}-{part}" for part in "abc") for seed in range(8, 12)}


def test_distances_are_exact_and_a_chain_is_told_as_one(crowd: Fleet) -> None:
    for group in crowd.duplicates(max_distance=0.1).groups:
        likes = {pair.task[-1]: pair.like[-1] for pair in group.pairs}
        assert likes == {"b": "a", "c": "b"}  # c is too far from a
        for pair in group.pairs:
            assert pair.distance == distance(crowd.load(pair.like), crowd.load(pair.task))


def test_nothing_in_the_store_changes(crowd: Fleet) -> None:
    before = files_of(crowd.path)
    crowd.duplicates()
    assert files_of(crowd.path) == before


def test_progress_counts_every_adapter_and_it_stops_on_demand(crowd: Fleet) -> None:
    heard: list[object] = []
    Fleet(crowd.path, on_event=heard.append).duplicates()
    last = heard[-1]
    assert isinstance(last, Progress)
    assert last.done == last.total
    with pytest.raises(Cancelled):
        Fleet(crowd.path, on_event=stop_after(3, Progress)).duplicates()


@pytest.mark.parametrize("limit", [-0.1, 0.51, float("nan")])
def test_an_impossible_limit_is_refused(crowd: Fleet, limit: float) -> None:
    with pytest.raises(DataError, match="between 0 and"):
        crowd.duplicates(max_distance=limit)
