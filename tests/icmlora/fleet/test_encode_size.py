"""`Fleet.encode` by size: the most accurate code of so many bytes, with other limits and without."""

from __future__ import annotations

import pytest

from icmlora import Fleet
from tests.icmlora.fleet.stores import blob_of, code_blobs, files_of

SIZE = 500


@pytest.mark.slow
def test_every_code_has_at_most_the_bytes(fleet: Fleet) -> None:
    report = fleet.encode(size=SIZE)
    assert [(task.status, task.reason) for task in report.done] == [("encoded", None)] * 3
    sizes = [blob_of(fleet, digest).stat().st_size for digest in code_blobs(fleet).values()]
    assert all(0.7 * SIZE < size <= SIZE for size in sizes), sizes


def test_more_bytes_make_it_more_accurate(fleet: Fleet) -> None:
    errors = [fleet.encode(["rules"], size=size).done[0].relative_error or 1 for size in (300, 600, 1200)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.slow
def test_the_same_size_again_changes_no_byte(fleet: Fleet) -> None:
    fleet.encode(size=SIZE)
    before = files_of(fleet.path)
    assert [task.status for task in fleet.encode(size=SIZE).done] == ["known"] * 3
    assert files_of(fleet.path) == before
    assert [task.status for task in fleet.encode(size=SIZE + 1).done] == ["encoded"] * 3


def test_where_no_code_is_small_enough_the_smallest_is_stored_and_its_size_is_said(fleet: Fleet) -> None:
    report = fleet.encode(["poems"], size=20)
    (task,) = report.done
    assert (task.status, report.short) == ("below", [task])
    assert task.reason == f"its smallest code takes {task.size} bytes"
    assert [line.status for line in fleet.encode(["poems"], size=20).done] == ["below"]


@pytest.mark.one_case
@pytest.mark.parametrize(("limit", "status"), [(0.9, "encoded"), (0.01, "below")])
def test_another_limit_is_checked_as_well(fleet: Fleet, limit: float, status: str) -> None:
    (task,) = fleet.encode(["poems"], size=SIZE, max_error=limit).done
    assert task.status == status
    assert (task.size or 0) <= SIZE
