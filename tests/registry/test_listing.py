"""Which tasks a selection lists, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.filters import FIELDS, Filter, Selection, parse_filter, parse_sort
from registry.records import (
    CodeLimits,
    Extra,
    NewAdapter,
    NewEvaluation,
    NewResidual,
    TaskFigures,
    TaskIngest,
    TaskSummary,
)
from registry.store import Store
from registry.tables import summaries
from tests.registry.examples import BASE, adapter, code_of, evaluation, eviction, generator, ingest, new_store
from tests.registry.pairs import rewrite

# rust    rank 8, code and residual, measured on its own text and on another
# HTML    rank 16, code, evicted, measured on another text
# sql     rank 4, of another base model, original only, with an extra
# Verse   generated, does nothing


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with a task of every kind; not to be changed."""
    with new_store(tmp_path_factory.mktemp("listing") / "store") as store:
        fill(store)
        yield store


def fill(store: Store) -> None:
    ingest(store, "rust", steps=[80], eval_data=b"texts", card=b"a long card")
    store.tasks.ingest([TaskIngest("HTML", BASE, [made(store, "HTML", rank_max=16, source="runs/Ünder/html")])])
    extra = Extra(store.blobs.put(b"head"), None, 9, 4)
    odd = made(store, "sql", rank_max=4, original_only="LoHa factors", extras=(extra,))
    store.tasks.ingest([TaskIngest("sql", "Acme/Llama-3", [odd])])
    store.tasks.ingest([TaskIngest("Verse", BASE, [made(store, "Verse", does_nothing=True)])])
    old = store.generators.add(generator(store, ["rust"], data=b"old"))
    now = store.generators.add(generator(store, ["rust", "HTML"], data=b"now", parent_id=old.id))
    residual = NewResidual(store.blobs.put(b"residual of rust"), 0.0025)
    store.codes.replace_residual(code_of(store, "rust"), residual, CodeLimits(max_error=0.1, keep=0.97))
    own = store.tasks.get("rust").eval_data
    assert own is not None
    store.evaluations.add(
        [
            of_residual("rust", 0.9, now.id, own),
            of_residual("rust", 0.5, now.id, "cd" * 32),
            evaluation("rust", generator_id=old.id),
            evaluation("HTML", generator_id=now.id),
        ]
    )
    store.originals.evict(eviction(store, "HTML"))
    store.tasks.edit(["rust"], pinned=True)
    store.tasks.edit(["rust", "sql"], add_tags=["prod", "Team/Search"])
    store.tasks.edit(["HTML"], add_tags=["trial"])
    store.tasks.edit(["Verse"], note="Straße nach\nSüden")
    verse = store.tasks.final("Verse").id
    rewrite(store, f"UPDATE adapters SET is_generated = TRUE WHERE id = {verse}")


def made(store: Store, name: str, **fields: object) -> NewAdapter:
    return replace(adapter(store, f"weights of {name}".encode(), is_final=True), **fields)  # type: ignore[arg-type]


def of_residual(task: str, gain: float, generator_id: int, data: str) -> NewEvaluation:
    return replace(evaluation(task, generator_id=generator_id), rung="residual", data=data, retained_gain=gain)


def names(store: Store, *filters: str, sort: str | None = None, limit: int | None = None) -> list[str]:
    order = None if sort is None else parse_sort(sort)
    return store.tasks.names(Selection(filters=[parse_filter(text) for text in filters], sort=order, limit=limit))


def test_what_a_bill_says_of_a_task_is_what_a_listing_shows_of_it(fleet: Store) -> None:
    rows = list(fleet.listing.summaries())
    assert list(fleet.listing.figures(without=())) == list(map(TaskFigures.of, rows))
    left = list(fleet.listing.figures(without=[rows[1].task.id]))
    assert [row.task for row in left] == [row.task.name for row in rows if row is not rows[1]]


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ("name=RUST", ["rust"]),
        ("name~r", ["rust", "Verse"]),
        ("name!=rust", ["HTML", "sql", "Verse"]),
        ("base~llama", ["sql"]),
        ("base=acme/llama-3", ["sql"]),
        ("rank>=8", ["HTML", "rust", "Verse"]),
        ("rank<8", ["sql"]),
        ("rank=16", ["HTML"]),
        ("size>30", ["rust"]),
        ("size<1KB", ["HTML", "rust", "sql", "Verse"]),
        ("size>=1MiB", []),
        ("code>0", ["HTML", "rust"]),
        ("code=28", ["rust"]),
        ("code!=28", ["HTML", "sql", "Verse"]),
        ("extras>0", ["sql"]),
        ("extras=4", ["sql"]),
        ("gain>=0.9", ["HTML", "rust"]),
        ("gain>0.95", ["HTML"]),
        ("gain<0.95", ["rust"]),
        ("gain!=0.9", ["HTML", "sql", "Verse"]),
        ("error<=0.06", ["rust"]),
        ("error>0.06", ["HTML"]),
        ("tag=PROD", ["rust", "sql"]),
        ("tag=pro", []),
        ("tag~search", ["rust", "sql"]),
        ("tag!=prod", ["HTML", "Verse"]),
        ("status=evicted", ["HTML"]),
        ("status=pinned", ["rust"]),
        ("status=coded", ["HTML", "rust"]),
        ("status!=coded", ["sql", "Verse"]),
        ("status=original-only", ["sql"]),
        ("status=does-nothing", ["Verse"]),
        ("status=generated", ["Verse"]),
        ("source~ünder", ["HTML"]),
        ("source=loras/example", ["rust", "sql", "Verse"]),
        ("note~STRASSE", ["Verse"]),
        ("note=", ["HTML", "rust", "sql"]),
        ("note!=", ["Verse"]),
    ],
)
def test_a_filter_lists_the_tasks_that_pass(fleet: Store, text: str, passing: list[str]) -> None:
    assert names(fleet, text) == passing


@pytest.mark.parametrize(
    ("text", "passing"),
    [("base~MIRROR", ["sql"]), ("base=some/mirror", ["sql"]), ("base!=some/mirror", ["HTML", "rust", "Verse"])],
)
def test_a_base_model_is_found_under_its_other_names_too(fleet: Store, text: str, passing: list[str]) -> None:
    fleet.base_models.join("Acme/Llama-3", ["some/Mirror"])
    assert names(fleet, text) == passing


def test_all_filters_must_hold(fleet: Store) -> None:
    assert names(fleet, "rank>=8", "tag=prod", "status!=evicted") == ["rust"]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("name", ["HTML", "rust", "sql", "Verse"]),
        ("name:desc", ["Verse", "sql", "rust", "HTML"]),
        ("rank", ["sql", "rust", "Verse", "HTML"]),
        ("rank:desc", ["HTML", "rust", "Verse", "sql"]),
        ("size:desc", ["rust", "Verse", "HTML", "sql"]),
        ("gain", ["rust", "HTML", "sql", "Verse"]),
        ("gain:desc", ["HTML", "rust", "sql", "Verse"]),
        ("error", ["rust", "HTML", "sql", "Verse"]),
        ("code:desc", ["rust", "HTML", "sql", "Verse"]),
        ("base", ["sql", "HTML", "rust", "Verse"]),
    ],
)
def test_an_order_puts_tasks_without_a_value_last_and_equal_ones_by_name(
    fleet: Store, sort: str, order: list[str]
) -> None:
    assert names(fleet, sort=sort) == order


def test_a_limit_takes_the_first_ones_of_the_order(fleet: Store) -> None:
    assert names(fleet, "gain>0", sort="gain:desc", limit=1) == ["HTML"]


def test_a_base_model_selects_its_tasks(fleet: Store) -> None:
    assert fleet.tasks.names(Selection(base_model="Acme/Llama-3")) == ["sql"]


def test_summaries_come_in_the_order_asked_for(fleet: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "_PAGE", 2)
    found = fleet.tasks.summaries(Selection(sort=parse_sort("rank:desc")))
    assert [(row.task.name, row.final.rank_max) for row in found] == [
        *(("HTML", 16), ("rust", 8), ("Verse", 8), ("sql", 4))
    ]


def test_a_task_that_is_removed_while_pages_are_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summaries, "_PAGE", 1)
    with new_store(tmp_path / "store") as store:
        for name in ("a", "b", "c"):
            ingest(store, name)
        rows = store.tasks.summaries()
        assert next(rows).task.name == "a"
        store.tasks.remove(["b"], last_copies=["b"])
        assert [row.task.name for row in rows] == ["c"]


@pytest.mark.slow
@given(
    st.sampled_from(["rank", "size", "code", "extras"]), st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), st.data()
)
def test_a_comparison_agrees_with_python(fleet: Store, name: str, operator: str, data: st.DataObject) -> None:
    value = data.draw(st.integers(0, 40))
    found = fleet.tasks.names(Selection(filters=[Filter(FIELDS[name], operator, float(value))]))  # type: ignore[arg-type]
    of_task = {row.task.name: _value(row, name) for row in fleet.tasks.summaries()}
    assert found == [task for task, present in of_task.items() if _holds(present, operator, value)]


def _value(row: TaskSummary, name: str) -> int | None:
    match name:
        case "rank":
            return row.final.rank_max
        case "size":
            return row.final.original_bytes
        case "extras":
            return row.final.extras_bytes
    residual = row.code and row.code.residual
    return row.code and row.code.size + (residual.size if residual else 0)


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
    notes = {task.name: (task.note or "").casefold() for task in fleet.tasks.all()}
    wanted = text.strip().casefold()
    assert names(fleet, f"note~{text}") == [name for name, note in notes.items() if wanted in note]
