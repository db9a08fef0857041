"""Where a search along a ladder of codes looks, and what it comes back with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from icmlora.errors import DataError
from icmlora.fleet.encode.search import LADDER, Attempt, LadderResult, Trial, bisect, ladder_within, walk
from icmlora.fleet.measure.measure import SourceResult
from icmlora.fleet.measure.metric_result import MetricResult
from icmlora.generator.encoding import Encoded

GAINS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99)  # by index, coarse to fine
Search = Callable[[Attempt], LadderResult]


def searched(search: Search, gains: Sequence[float | None] = GAINS) -> tuple[LadderResult, list[int]]:
    """Return what a search found, and the indices that it tried."""
    tried: list[int] = []

    def attempt(index: int) -> Trial:
        tried.append(index)
        result = SourceResult("code", MetricResult("nats per token", 1.0, 1), gains[index], 0.0)
        return Trial(Encoded(b"", 0.0, 0.0), result)

    return search(attempt), tried


def bisected(limit: float) -> Search:
    return lambda attempt: bisect(len(GAINS), limit, attempt)


def walked(first: int, limit: float = 0.9) -> Search:
    return lambda attempt: walk(first, len(GAINS), limit, attempt)


@pytest.mark.parametrize(("limit", "index"), [(0.0, 0), (0.31, 2), (0.9, 4), (0.99, 7)])
def test_bisection_finds_the_coarsest_entry_that_keeps_the_gain(limit: float, index: int) -> None:
    found, tried = searched(bisected(limit))
    assert (found.index, found.is_kept, found.trial.gain) == (index, True, GAINS[index])
    assert len(tried) <= 4


def test_where_nothing_keeps_the_gain_the_finest_comes_back() -> None:
    for search in (bisected(1.0), walked(3, 1.0)):
        found, _ = searched(search)
        assert (found.index, found.is_kept) == (len(GAINS) - 1, False)


@pytest.mark.parametrize(("first", "indices"), [(4, [4, 3]), (3, [3, 4]), (6, [6, 5, 4, 3]), (1, [1, 2, 3, 4])])
def test_a_walk_goes_coarser_while_the_gain_is_kept_or_finer_until_it_is(first: int, indices: list[int]) -> None:
    found, tried = searched(walked(first))
    assert (found.index, found.is_kept, tried) == (4, True, indices)


def test_a_walk_ends_at_the_ends_of_the_ladder() -> None:
    assert searched(walked(0, 0.0))[1] == [0]
    assert searched(walked(7, 1.0))[1] == [7]


def test_an_original_without_a_gain_is_refused() -> None:
    for search in (bisected(0.9), walked(2)):
        with pytest.raises(DataError, match="no gain to keep"):
            searched(search, [None] * len(GAINS))


def test_the_ladder_goes_down_from_nearly_nothing_kept() -> None:
    assert list(LADDER) == sorted(LADDER, reverse=True)
    assert LADDER[0] == 0.95
    assert LADDER[1:3] == (pytest.approx(0.7071, abs=1e-4), 0.5)


@pytest.mark.parametrize("tolerance", [0.001, 0.1, 0.5, 0.97])
def test_within_a_tolerance_a_search_tries_that_tolerance_and_what_is_finer(tolerance: float) -> None:
    ladder = ladder_within(tolerance)
    assert ladder[0] == tolerance
    assert list(ladder[1:]) == [entry for entry in LADDER if entry < tolerance]


def test_without_a_tolerance_a_search_tries_the_whole_ladder() -> None:
    assert ladder_within(None) == LADDER
