"""Where a search along a ladder of codes looks, and what it comes back with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import pytest

from icmlora.errors import DataError
from icmlora.fleet.context import Event
from icmlora.fleet.measure import RungResult
from icmlora.fleet.search import LADDER, Attempt, Candidate, Found, coarsest_kept, nearest_kept
from icmlora.generator.encoding import Encoded

GAINS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99)  # by place, coarse to fine
Search = Callable[[Attempt], Generator[Event, None, Found | None]]


def end_of(
    search: Search, gains: Sequence[float | None] = GAINS, stop_at: int | None = None
) -> tuple[Found | None, list[int]]:
    """Run a search to its end, and return what it found and the places that it tried."""
    tried: list[int] = []

    def attempt(place: int) -> Generator[Event, None, Candidate | None]:
        yield from ()
        tried.append(place)
        if place == stop_at:
            return None
        return Candidate(Encoded(b"", 0.0, 0.0), RungResult("code", 1.0, 1, 1, gains[place], 0.0))

    steps = search(attempt)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, tried


def halved(limit: float) -> Search:
    return lambda attempt: coarsest_kept(len(GAINS), limit, attempt)


def near(start: int, limit: float = 0.9) -> Search:
    return lambda attempt: nearest_kept(start, len(GAINS), limit, attempt)


@pytest.mark.parametrize(("limit", "place"), [(0.0, 0), (0.31, 2), (0.9, 4), (0.99, 7)])
def test_halving_finds_the_coarsest_place_that_keeps_the_gain(limit: float, place: int) -> None:
    found, tried = end_of(halved(limit))
    assert found is not None
    assert (found.place, found.keeps, found.candidate.gain) == (place, True, GAINS[place])
    assert len(tried) <= 4


def test_where_nothing_keeps_the_gain_the_finest_comes_back() -> None:
    for search in (halved(1.0), near(3, 1.0)):
        found, _ = end_of(search)
        assert found is not None
        assert (found.place, found.keeps) == (len(GAINS) - 1, False)


@pytest.mark.parametrize(("start", "places"), [(4, [4, 3]), (3, [3, 4]), (6, [6, 5, 4, 3]), (1, [1, 2, 3, 4])])
def test_from_a_place_it_goes_coarser_while_the_gain_is_kept_or_finer_until_it_is(
    start: int, places: list[int]
) -> None:
    found, tried = end_of(near(start))
    assert found is not None
    assert (found.place, found.keeps, tried) == (4, True, places)


def test_from_the_ends_of_the_ladder_it_goes_no_further() -> None:
    assert end_of(near(0, 0.0))[1] == [0]
    found, tried = end_of(near(7, 1.0))
    assert (found is not None, tried) == (True, [7])


def test_a_user_who_stops_gets_nothing() -> None:
    assert end_of(halved(0.9), stop_at=5)[0] is None
    assert end_of(near(6), stop_at=4)[0] is None


def test_an_original_without_a_gain_is_refused() -> None:
    for search in (halved(0.9), near(2)):
        with pytest.raises(DataError, match="no gain to keep"):
            end_of(search, [None] * len(GAINS))


def test_the_ladder_goes_down_from_nearly_nothing_kept() -> None:
    assert list(LADDER) == sorted(LADDER, reverse=True)
    assert LADDER[0] == 0.95
    assert LADDER[1:3] == (pytest.approx(0.7071, abs=1e-4), 0.5)
