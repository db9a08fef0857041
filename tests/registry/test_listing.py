"""Selections agree with Python for any comparison; `test_publishing` has an example of each filter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from registry.filters import FIELDS, Filter, Selection, Sort, parse_filter, parse_sort
from registry.manifests import CodeLimits, Extra
from registry.store import Store
from registry.tables import TaskRow
from tests.registry.examples import adapter, code, evict, ingest, new_store, put, train

COLUMNS = {"rank": "rank", "size": "original_bytes", "code": "code_size", "extras": "extras_bytes"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with a task of every kind; not to be changed.

    rust    rank 8, card, code      sql     rank 4, of another base model, original only, with an extra
    HTML    rank 16, code, evicted  Verse   generated, does nothing, a note
    """
    with new_store(tmp_path_factory.mktemp("listing") / "store") as store:
        odd = {"original_only": "LoHa factors", "extras": (Extra(blob=put(store, b"head"), size=9),)}
        ingest(store, "rust", final=adapter(store, b"weights of rust", card=put(store, b"a long card")))
        ingest(store, "HTML", final=adapter(store, b"HTML", rank_max=16, source="runs/Ünder/html/checkpoint-80"))
        ingest(store, "sql", base_model="Acme/Llama-3", final=adapter(store, b"sql", rank_max=4, **odd))
        nothing = adapter(store, b"Verse", does_nothing=True, is_generated=True)
        ingest(store, "Verse", final=nothing, note="Straße nach\nSüden")
        train(store, ["rust", "HTML"])
        limits = CodeLimits(max_error=0.1, keep=0.97)
        store.update("rust", lambda task: replace(task, code=replace(code(store, "rust"), asked=limits)))
        evict(store, "HTML")
        yield store


def names(store: Store, *filters: str, sort: str | None = None) -> list[str]:
    order = None if sort is None else parse_sort(sort)
    return store.names(Selection(filters=[parse_filter(text) for text in filters], sort=order))


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ("base~llama", ["sql"]),
        ("base!=acme/llama-3", ["HTML", "rust", "Verse"]),
        ("rank=16", ["HTML"]),
        ("extras=4", ["sql"]),
        ("code!=12", ["sql", "Verse"]),
        ("status=evicted", ["HTML"]),
        ("status=original-only", ["sql"]),
        ("status=does-nothing", ["Verse"]),
        ("status=generated", ["Verse"]),
        ("status~ed", ["HTML", "rust", "Verse"]),
        ("source~ünder", ["HTML"]),
        ("source=loras/example", ["rust", "sql", "Verse"]),
        ("note~STRAßE", ["Verse"]),
        ("note!=", ["Verse"]),
        ("name~_", []),
        ("name~%", []),
    ],
)
def test_a_filter_lists_the_tasks_that_pass(fleet: Store, text: str, passing: list[str]) -> None:
    assert names(fleet, text) == passing


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("name:desc", ["Verse", "sql", "rust", "HTML"]),
        ("rank", ["sql", "rust", "Verse", "HTML"]),
        ("rank:desc", ["HTML", "rust", "Verse", "sql"]),
        ("code:desc", ["HTML", "rust", "sql", "Verse"]),
        ("error", ["HTML", "rust", "sql", "Verse"]),
        ("base", ["sql", "HTML", "rust", "Verse"]),
    ],
)
def test_an_order_puts_tasks_without_a_value_last_and_equal_ones_by_name(
    fleet: Store, sort: str, order: list[str]
) -> None:
    assert names(fleet, sort=sort) == order
    assert [row.name for row in fleet.rows(Selection(sort=parse_sort(sort)))] == order
    assert [task.name for task in fleet.tasks(Selection(sort=parse_sort(sort)))] == order


def test_a_row_has_the_folder_of_a_task_and_the_limits_of_its_code(fleet: Store) -> None:
    rows = {row.name: row for row in fleet.rows()}
    assert (rows["HTML"].folder, rows["rust"].limits) == ("runs/Ünder/html", '{"keep":0.97,"max_error":0.1}')
    assert [row.name for row in fleet.rows_of(folders=["runs/Ünder/html"], names=["RUST"])] == ["HTML", "rust"]


def test_a_task_that_is_removed_while_pages_are_read_is_left_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.states.PAGE", 1)
    for name in ("a", "b", "c"):
        ingest(store, name)
    rows, tasks = store.rows(), store.tasks()
    assert (next(rows).name, next(tasks).name) == ("a", "a")
    store.remove(store.named(["b"]))
    assert ([row.name for row in rows], [task.name for task in tasks]) == (["c"], ["c"])


@pytest.mark.slow
@given(st.sampled_from(sorted(COLUMNS)), st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), st.integers(0, 40))
def test_a_comparison_agrees_with_python(fleet: Store, name: str, operator: str, value: int) -> None:
    found = fleet.names(Selection(filters=[Filter(FIELDS[name], operator, float(value))]))  # type: ignore[arg-type]
    assert found == [row.name for row in fleet.rows() if _holds(_value(row, name), operator, value)]


@pytest.mark.slow
@given(st.sampled_from(sorted(COLUMNS)), st.booleans())
def test_an_order_agrees_with_python(fleet: Store, name: str, descending: bool) -> None:
    found = fleet.rows(Selection(sort=Sort(FIELDS[name], descending)))
    values = [value for row in found if (value := _value(row, name)) is not None]
    assert values == sorted(values, reverse=descending)


def _value(row: TaskRow, name: str) -> int | None:
    value: int | None = getattr(row, COLUMNS[name])
    return value


def _holds(present: int | None, operator: str, value: int) -> bool:
    if present is None:
        return operator == "!="
    return {
        "=": present == value,
        "!=": present != value,
        "<": present < value,
        "<=": present <= value,
        ">": present > value,
        ">=": present >= value,
    }[operator]


@pytest.mark.slow
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6))
def test_contains_agrees_with_python_in_any_script(fleet: Store, text: str) -> None:
    wanted = text.strip().lower()
    expected = [task.name for task in fleet.tasks() if wanted in (task.note or "").lower()]
    assert names(fleet, f"note~{text}") == expected
