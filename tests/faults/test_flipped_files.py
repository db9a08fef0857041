"""A bit that flips in a file of the store, or in one that it wrote elsewhere, is noticed and loses nothing."""

from __future__ import annotations

import pytest

from tests.faults.file_flips import FileFlips, digests_off
from tests.faults.flips import Tally, summed


@pytest.fixture(scope="module")
def flips(tmp_path_factory: pytest.TempPathFactory) -> FileFlips:
    return FileFlips(tmp_path_factory.mktemp("flips"))


def check(tally: Tally) -> None:
    assert tally.flips > 0
    assert (tally.unnoticed, tally.wrong_adapters, tally.deleted, tally.examples) == (0, 0, 0, [])


@pytest.mark.fault
def test_flips_in_every_kind_of_file_are_noticed_write_nothing_wrong_and_lose_nothing(flips: FileFlips) -> None:
    check(summed(flips.study(flips.kinds, each=4)))


@pytest.mark.fault
def test_the_harness_sees_what_happens_without_digests(flips: FileFlips) -> None:
    with digests_off():
        tally = summed(flips.study([*flips.blobs, "bundle"], each=4))
    assert tally.unnoticed > 0
    assert tally.wrong_adapters > 0
    assert tally.deleted > 0
