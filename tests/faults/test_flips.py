"""Bits flip and databases are lost: no task is deleted, swapped or hidden, and `icm verify --repair` restores all."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.faults.flips import Damages, Tally, believing, without_comparing
from tests.faults.pairs import PAIRS, PLAIN, Pair, Servers


@pytest.fixture(scope="module")
def damages_on(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Damages]:
    """Return the store that is damaged, on a pair."""

    def make(name: str) -> Damages:
        root = tmp_path_factory.mktemp("damages")
        return Damages(Pair(name, root, Servers() if name == PLAIN else request.getfixturevalue("running")), root)

    return make


@pytest.fixture(scope="module")
def damages(damages_on: Callable[[str], Damages]) -> Damages:
    """The store in a folder."""
    return damages_on(PLAIN)


def check(tally: Tally) -> None:
    assert (tally.is_clean, tally.examples) == (True, [])


def test_flips_in_the_database_are_repaired(damages: Damages) -> None:
    tally = damages.study("registry.db", 60, random.Random(1))
    check(tally)
    assert 0 < tally.without_effect < 60


def test_flips_in_other_files_are_repaired_or_named(damages: Damages) -> None:
    tallies = {kind: damages.study(kind, 1, random.Random(kind)) for kind in damages.tries}
    for tally in tallies.values():
        check(tally)
    assert tallies["large originals"].named == 1


def test_a_database_from_before_loses_nothing_that_was_recorded_since(damages: Damages) -> None:
    check(damages.study("database from before", 1, random.Random(1)))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [PAIRS[-1], *(pytest.param(pair, marks=pytest.mark.fault) for pair in PAIRS[1:-1])])
def test_other_pairs_are_repaired_as_well(damages_on: Callable[[str], Damages], pair: str) -> None:
    damages = damages_on(pair)
    for kind in ("manifests of task", "codes", "BLOBS", "database from before", "database without rows"):
        if kind in damages.tries:
            check(damages.study(kind, 2, random.Random(1)))


@pytest.mark.slow
def test_bytes_that_are_believed_are_caught(damages: Damages) -> None:
    with believing():
        tallies = [damages.study(kind, 4, random.Random(1)) for kind in ("originals", "codes", "bundle")]
    assert sum(tally.wrong + tally.lost for tally in tallies) > 0


@pytest.mark.slow
def test_a_prune_that_compares_nothing_is_caught(damages: Damages) -> None:
    with without_comparing():
        assert damages.study("database from before", 1, random.Random(1)).lost > 0
