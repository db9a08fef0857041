"""A small campaign on each pair: a sample of what `make faults` does in hours."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Callable

import pytest

from tests.faults.pairs import PAIRS, PLAIN, Pair, Servers
from tests.faults.sqlite_calls import ignoring_errors, is_reachable
from tests.faults.sweeps import Sweeps, Tally
from tests.faults.zygote import Zygote

COMMANDS = ("learn", "evict_and_prune")

pytestmark = [
    pytest.mark.slow,
    # A cursor of the server whose connection was cut cannot be closed any more.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def sweeps_on(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Sweeps]:
    """Return the failures on a pair."""

    def make(name: str) -> Sweeps:
        root = tmp_path_factory.mktemp("sweeps")
        running = Servers() if name == PLAIN else request.getfixturevalue("running")
        return Sweeps(Pair(name, root, running), root)

    return make


@pytest.fixture(scope="module", params=PAIRS)
def each(sweeps_on: Callable[[str], Sweeps], request: pytest.FixtureRequest) -> Sweeps:
    """The same on each pair."""
    return sweeps_on(request.param)


def check(tally: Tally, least: int) -> None:
    assert (tally.is_clean, tally.examples) == (True, [])
    assert tally.faults >= least


def test_kills_lose_nothing(each: Sweeps, zygote: Zygote) -> None:
    check(each.kills(zygote, COMMANDS, 2, random.Random(1)), 4)


def test_failing_calls_lose_nothing(each: Sweeps) -> None:
    check(each.calls(["evict_and_prune"], stride=37), 1)


def test_failing_calls_of_sqlite_lose_nothing_and_one_that_is_ignored_is_caught(
    sweeps_on: Callable[[str], Sweeps],
) -> None:
    if not is_reachable():
        pytest.skip("the SQLite of this Python hides its functions")
    sweeps = sweeps_on(PLAIN)
    check(sweeps.sqlite(["evict_and_prune"], stride=199), 5)
    with ignoring_errors():  # not of a prune, which retries until it succeeds
        assert sweeps.sqlite(["learn"], stride=61).lost > 0


def test_power_losses_lose_nothing(each: Sweeps) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if not each.pair.folder.exists():
        pytest.skip("nothing of this pair is on this machine")
    check(each.power_losses(["evict_and_prune"], 10, random.Random(1)), 10)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "postgres" in pair])
def test_cut_connections_and_restarts_lose_nothing(sweeps_on: Callable[[str], Sweeps], pair: str) -> None:
    sweeps = sweeps_on(pair)
    check(sweeps.statements(["evict_and_prune"], stride=150), 3)
    check(sweeps.restarts(["evict_and_prune"], 1, random.Random(1)), 1)
    gc.collect()  # it reports errors of cursors here


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "s3" in pair])
def test_faults_of_the_bucket_lose_nothing(sweeps_on: Callable[[str], Sweeps], pair: str) -> None:
    check(sweeps_on(pair).requests(["evict_and_prune"], stride=14), 2)


def test_a_sync_that_is_skipped_is_caught(sweeps_on: Callable[[str], Sweeps]) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    assert sweeps_on(PLAIN).power_losses(["learn"], 10, random.Random(1), "without_sync").problems > 0
