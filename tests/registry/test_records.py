"""Records: what is recorded is read again, field by field, whatever it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from itertools import count
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.records import (
    CodeLimits,
    Description,
    EvaluationRecord,
    NewAdapter,
    NewCode,
    NewEvaluation,
    NewGenerator,
    NewResidual,
    NewVector,
    Rung,
    TaskIngest,
    View,
    description_of,
)
from registry.storage.blobs.content import digest_of
from registry.store import Store
from tests.registry.examples import code_of, evaluation, eviction, generator, ingest, new_store

NUMBERS = count()
PARTS = st.floats(0, 1e6, allow_nan=False)
SIZES = st.integers(1, 1 << 40)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
JSON = st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers(-99, 99) | PARTS | TEXTS, max_size=4)
LAYOUTS = st.lists(st.tuples(TEXTS, *[st.integers(1, 1 << 20)] * 3), max_size=4)
ASKED = st.none() | st.builds(
    CodeLimits,
    *[st.none() | st.floats(1e-6, 1e6)] * 3,
    is_kept=st.booleans(),
    refined=st.integers(0, 500),
    max_size=st.none() | SIZES,
    keep=st.none() | st.floats(0, 1),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that every example adds to; each takes a name of its own."""
    with new_store(tmp_path_factory.mktemp("records") / "store") as opened:
        yield opened


def values(record: object, kind: type, *but: str) -> dict[str, Any]:
    """Return what a record says in the fields of what was offered."""
    return {field.name: getattr(record, field.name) for field in fields(kind) if field.name not in but}


@pytest.mark.slow
@given(
    layout=LAYOUTS,
    modules=st.lists(TEXTS, max_size=4),
    sizes=st.tuples(SIZES, SIZES),
    words=st.tuples(TEXTS, TEXTS, TEXTS),
    step=st.none() | st.integers(0, 1 << 40),
)
def test_an_adapter_is_read_as_it_was_offered(
    shared: Store,
    layout: list[tuple[str, int, int, int]],
    modules: list[str],
    sizes: tuple[int, int],
    words: tuple[str, str, str],
    step: int | None,
) -> None:
    blob, name = shared.blobs.put(b"bytes"), f"adapter-{next(NUMBERS)}"
    made = NewAdapter(
        weights=blob,
        config=blob,
        card=blob,
        step=step,
        is_final=True,
        dtype=words[0],
        rank_max=sizes[0],
        parameters=sizes[1],
        target_modules=tuple(modules),
        layout=tuple(layout),
        source=words[1],
        format=words[2],
    )
    shared.tasks.ingest([TaskIngest(name, "base", [made])])
    found = shared.tasks.final(name)
    assert values(found, NewAdapter) == asdict(made)
    assert (found.original_bytes, found.weights_bytes, found.stored_bytes) == (15, 5, 15)


@given(view=st.sampled_from(get_args(View)), support_set=st.integers(0, 1 << 30), extractor=JSON, dim=SIZES)
def test_a_vector_is_read_as_it_was_offered(
    shared: Store, view: View, support_set: int, extractor: dict[str, object], dim: int
) -> None:
    name = f"vector-{next(NUMBERS)}"
    ingest(shared, name)
    made = NewVector(name, view, support_set, extractor, shared.blobs.put(b"vector"), dim)
    shared.vectors.add([made])
    assert [values(row, NewVector) for row in shared.vectors.all(name)] == [asdict(made)]


@given(
    bits=PARTS,
    squared_error=st.none() | PARTS,
    asked=ASKED,
    effect=st.none() | st.floats(-1000, 1),
    config=JSON,
    metrics=JSON,
)
def test_a_generator_and_its_code_are_read_as_they_were_offered(
    shared: Store,
    bits: float,
    squared_error: float | None,
    asked: CodeLimits | None,
    effect: float | None,
    config: dict[str, object],
    metrics: dict[str, object],
) -> None:
    name = f"code-{next(NUMBERS)}"
    ingest(shared, name, base_model=name)
    made = NewCode(shared.tasks.final(name), shared.blobs.put(b"code"), bits, squared_error, asked, effect)
    new = NewGenerator(name, shared.blobs.put(b"generator"), config, metrics, codes=[made])
    record = shared.generators.add(new)
    assert (record.base_model, record.config, record.metrics, record.size) == (name, config, metrics, 9)
    assert shared.generators.current(name) == record
    code = shared.codes.get(name, record.id)
    assert code is not None
    assert values(code, NewCode, "adapter") == values(made, NewCode, "adapter")
    assert (code.adapter_id, code.generator_id, code.size) == (made.adapter.id, record.id, 4)


@given(
    rung=st.sampled_from(get_args(Rung)),
    parts=st.tuples(PARTS, st.none() | st.floats(-1000, 1000), st.none() | PARTS),
    sizes=st.tuples(SIZES, SIZES),
    facts=JSON,
    text=st.binary(max_size=8),
)
def test_a_measurement_is_read_as_it_was_offered(
    shared: Store,
    rung: Rung,
    parts: tuple[float, float | None, float | None],
    sizes: tuple[int, int],
    facts: dict[str, object],
    text: bytes,
) -> None:
    name = f"measured-{next(NUMBERS)}"
    ingest(shared, name)
    nats, gain, error = parts
    made = NewEvaluation(name, rung, None, digest_of(text), nats, *sizes, gain, error, facts)
    shared.evaluations.add([made])
    found = shared.evaluations.all(name)
    assert [values(row, NewEvaluation) for row in found] == [asdict(made)]
    assert isinstance(found[0], EvaluationRecord)


def test_similar_adapters_have_one_description_whatever_kind_of_sequence_they_give(store: Store) -> None:
    ingest(store, "rust")
    found = store.tasks.final("rust")
    as_lists = replace(found, layout=list(found.layout), target_modules=list(found.target_modules))
    assert description_of(as_lists) == description_of(found)
    assert {description_of(as_lists): 1}[description_of(found)] == 1
    assert set(Description._fields) < {field.name for field in fields(NewAdapter)}


def test_the_best_source_without_the_original_is_the_residual_if_there_is_one(store: Store) -> None:
    ingest(store, "rust")
    store.generators.add(generator(store, ["rust"]))
    bare = code_of(store, "rust")
    assert (bare.rung, bare.best_squared_error, bare.digests()) == ("code", bare.squared_error, [bare.blob])
    blob = store.blobs.put(b"residual")
    both = store.codes.replace_residual(bare, NewResidual(blob, 0.001), CodeLimits())
    assert both is not None
    assert (both.rung, both.best_squared_error, both.digests()) == ("residual", 0.001, [bare.blob, blob])


def test_an_eviction_names_every_file_that_it_relies_on(store: Store) -> None:
    ingest(store, "rust")
    made = store.generators.add(generator(store, ["rust"]))
    store.codes.replace_residual(code_of(store, "rust"), NewResidual(store.blobs.put(b"residual"), 0.001), CodeLimits())
    needed = {b"generator", b"code of rust", b"residual", b'{"r": 8}'}
    assert {store.blobs.read(digest) for digest in eviction(store, "rust").digests()} == needed
    assert made.blob in eviction(store, "rust").digests()


def test_an_evicted_adapter_still_says_what_it_was(store: Store) -> None:
    ingest(store, "rust", card=b"card")
    store.generators.add(generator(store, ["rust"]))
    before = store.tasks.final("rust")
    store.originals.evict(eviction(store, "rust"))
    after = store.tasks.final("rust")
    assert after.is_evicted
    assert replace(after, evicted_at=None) == before
    assert after.stored_bytes == before.stored_bytes - before.weights_bytes


def test_times_are_utc_to_the_second(store: Store) -> None:
    ingest(store, "rust")
    store.evaluations.add([evaluation("rust")])
    times = [store.tasks.get("rust").created_at, store.evaluations.all()[0].created_at]
    times.append(store.runs.start("base", {}).updated_at)
    for time in times:
        assert len(time) == len("2025-01-31T23:59:59Z")
        assert (time[10], time[-1]) == ("T", "Z")


def test_a_record_cannot_be_changed(store: Store) -> None:
    ingest(store, "rust")
    with pytest.raises(AttributeError):
        store.tasks.get("rust").name = "html"  # type: ignore[misc]
