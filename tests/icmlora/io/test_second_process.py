"""A second process: order, and what happens when it fails, dies or is not wanted any more."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator

import pytest

from icmlora.io.second_process import in_two_processes

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one process")
def test_every_other_part_is_computed_by_another_process_and_all_comes_in_order() -> None:
    found = list(in_two_processes(lambda part: [(part, os.getpid()), (-part, os.getpid())], [1, 2, 3, 4]))
    assert [number for number, _ in found] == [1, -1, 2, -2, 3, -3, 4, -4]
    assert [process == os.getpid() for _, process in found[::2]] == [True, False, True, False]


@pytest.mark.parametrize("end", [lambda: os._exit(1), lambda: 1 / 0])
def test_what_the_other_process_does_not_bring_is_computed_here(end: object) -> None:
    here = os.getpid()

    def halves(part: int) -> Iterator[int]:
        yield part
        if os.getpid() != here:
            end()  # type: ignore[operator]
        yield -part

    assert list(in_two_processes(halves, [1, 2, 3, 4])) == [1, -1, 2, -2, 3, -3, 4, -4]


def test_an_error_of_a_part_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_two_processes(lambda part: [1 // part], [1, 0, 2]))


def test_no_process_is_left_when_the_results_are_not_wanted_any_more() -> None:
    results = in_two_processes(lambda part: [part], list(range(100)))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()
