"""A bit that flips in the database is noticed, writes no wrong adapter and deletes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.flips import Flips, Tally, checks_off, decides, summed
from tests.faults.pages import Place
from tests.faults.pairs import Pair, Servers
from tests.faults.row_flips import KNOWN, RowFlips


@pytest.fixture(scope="module")
def flips(tmp_path_factory: pytest.TempPathFactory) -> Flips:
    return Flips(tmp_path_factory.mktemp("flips"))


def check(tally: Tally) -> None:
    bad = (tally.unnoticed, tally.wrong_adapters, tally.deleted, tally.examples)
    assert tally.flips > 0
    assert bad == (0, 0, 0, [])


def test_a_few_flips_anywhere_in_the_rows_are_noticed(flips: Flips) -> None:
    check(summed(flips.study(list(flips.bits(lambda place: True))[::397], commands=False)))


def test_a_few_flips_of_what_decides_delete_nothing_and_write_nothing_wrong(flips: Flips) -> None:
    check(summed(flips.study(list(flips.bits(decides))[::211], commands=True)))


@pytest.mark.fault
def test_every_flip_anywhere_in_the_rows_is_noticed(flips: Flips) -> None:
    check(summed(flips.study(flips.bits(lambda place: True), commands=False)))


@pytest.mark.fault
def test_no_flip_of_what_decides_deletes_anything_or_writes_anything_wrong(flips: Flips) -> None:
    check(summed(flips.study(flips.bits(decides), commands=True)))


@pytest.mark.slow
def test_the_harness_sees_what_happens_without_the_checks(flips: Flips) -> None:
    def known(place: Place) -> bool:
        return (place.table, place.column) in {("codes", "blob_id"), ("tasks", "pinned")}

    with checks_off():
        tally = summed(flips.study(list(flips.bits(known))[::3], commands=True))
    assert tally.unnoticed > 0
    assert tally.wrong_adapters > 0
    assert tally.deleted > 0


@pytest.mark.slow
def test_false_values_on_a_server_delete_nothing_and_write_nothing_wrong(running: Servers, tmp_path: Path) -> None:
    flips = RowFlips(Pair("postgres+s3", tmp_path, running), tmp_path / "built", random.Random(1))
    check(summed(dict(flips.study(KNOWN, each=1))))
    with checks_off():
        tally = summed(dict(flips.study(KNOWN, each=1)))
    assert tally.unnoticed > 0
    assert tally.wrong_adapters > 0
    assert tally.deleted > 0
