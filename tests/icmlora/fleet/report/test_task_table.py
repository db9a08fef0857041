"""The rows of a report's table."""

from typing import Any

import pytest

from icmlora.fleet.report.task_table import COLUMNS, KEPT
from tests.icmlora.fleet.report.made_up import Made, page_of


def rows_of(*made: Made) -> list[dict[str, Any]]:
    table = page_of(list(made), with_map=False).table
    return [dict(zip(COLUMNS, row, strict=True)) for row in table.rows]


def test_rows_are_in_the_order_in_which_people_count() -> None:
    rows = rows_of(Made("task-10"), Made("Task-9"), Made("task-2"))
    assert [row["name"] for row in rows] == ["task-2", "Task-9", "task-10"]


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        (Made("a"), "original + code"),
        (Made("a", evicted=True), "code"),
        (Made("a", code=None), "original"),
        (Made("a", code=None, original_only="it is a LoHa"), "original only"),
    ],
)
def test_what_the_store_has_of_a_task(made: Made, kept: str) -> None:
    (row,) = rows_of(made)
    assert KEPT[row["kept"]] == kept


def test_bytes_and_shares_are_those_of_the_bill() -> None:
    (row,) = rows_of(Made("a", original=1_000_000, code=20_000))
    assert (row["original"], row["code"], row["vectors"], row["size"], row["share"]) == (
        1_000_000,
        20_000,
        1500,
        21_500,
        0.021,
    )


@pytest.mark.parametrize("made", [Made("a", code=None), Made("a", code=None, original_only="it is a LoHa")])
def test_a_task_without_a_code_has_nothing_in_its_place(made: Made) -> None:
    (row,) = rows_of(made)
    assert (row["size"], row["share"], row["error"], row["gain"]) == (None, None, None, None)


def test_texts_that_rows_share_are_stored_once() -> None:
    page = page_of(
        [Made("a", "acme/two", ("x",)), Made("b", "acme/one", ("x", "y")), Made("c", "acme/two")], with_map=False
    )
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in page.table.rows]
    assert page.table.lists["base"] == ["acme/one", "acme/two"]
    assert page.table.lists["tags"] == ["x", "y"]
    assert [row["base"] for row in rows] == [1, 0, 1]
    assert [row["tags"] for row in rows] == [[0], [0, 1], []]


def test_places_on_the_map_are_in_the_row() -> None:
    page = page_of([Made("a"), Made("b"), Made("c")])
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in page.table.rows]
    assert all(row["cluster"] is not None and row["nearest"][0] in "abc" for row in rows)
