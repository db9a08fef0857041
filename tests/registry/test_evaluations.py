"""Measurements: the latest replaces, and only what the task still has is recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from registry.errors import TaskNotFound
from registry.records import AdapterRecord, CodeLimits, CodeRecord, NewEvaluation, NewResidual, latest_evaluation
from registry.store import Store
from tests.registry.examples import BASE, code, code_of, evaluation, generator, ingest


@pytest.fixture(autouse=True)
def two_tasks(store: Store) -> None:
    """Every test here begins with two tasks."""
    ingest(store, "rust")
    ingest(store, "html")


def test_measurements_come_back_as_they_were_recorded(store: Store) -> None:
    store.evaluations.add([evaluation("rust")])
    (found,) = store.evaluations.all("rust")
    assert (found.value, found.count, found.utf8_bytes, found.retained_gain) == (2.0, 100, 400, 0.97)
    assert (found.rung, found.metric, found.settings) == ("original", "nats per token", {"max_tokens": 256})


def test_the_latest_of_the_same_thing_wins(store: Store) -> None:
    store.evaluations.add([evaluation("rust", nats=2.0), evaluation("rust", nats=1.9)])
    store.evaluations.add([evaluation("rust", nats=1.8)])
    assert [found.value for found in store.evaluations.all()] == [1.8]


def in_precision(dtype: str, nats: float, gain: float | None = 0.97) -> NewEvaluation:
    return replace(evaluation("rust", nats=nats), settings={"dtype": dtype}, retained_gain=gain)


def test_what_was_measured_on_a_base_model_in_few_bits_stands_beside_the_rest(store: Store) -> None:
    store.evaluations.add([in_precision("float32", 2.0), in_precision("nf4", 2.2), in_precision("int8", 2.1)])
    store.evaluations.add([in_precision("bfloat16", 1.9), in_precision("nf4", 2.3)])
    found = store.evaluations.all("rust")
    assert {one.precision: one.value for one in found} == {"int8": 2.1, "bfloat16": 1.9, "nf4": 2.3}


def test_a_gain_in_another_precision_counts_where_the_newest_figure_has_none(store: Store) -> None:
    made = store.generators.add(generator(store, ["rust"]))
    rows = [in_precision("float32", 2.0, 0.95), in_precision("nf4", 2.2, None)]
    store.evaluations.add([replace(one, rung="code", generator_id=made.id) for one in rows])
    found = latest_evaluation(store.evaluations.all("rust"), store.tasks.get("rust"), "code", made)
    assert found is not None
    listed = next(row for row in store.tasks.summaries() if row.task.name == "rust")
    assert (found.retained_gain, found.precision) == (listed.gain, listed.gain_precision) == (0.95, "float32")


def test_rungs_of_different_generators_stand_side_by_side(store: Store) -> None:
    one = store.generators.add(generator(store))
    two = store.generators.add(generator(store, data=b"newer"))
    store.evaluations.add([evaluation("rust", generator_id=made.id) for made in (one, two)])
    assert [found.generator_id for found in store.evaluations.all("rust")] == [one.id, two.id]


def test_all_are_listed_by_task(store: Store) -> None:
    store.evaluations.add([evaluation("rust"), evaluation("html")])
    assert [found.task for found in store.evaluations.all()] == ["html", "rust"]


def test_an_unknown_task_is_refused(store: Store) -> None:
    with pytest.raises(TaskNotFound):
        store.evaluations.add([evaluation("gone")])


@dataclass(frozen=True)
class Measured:
    """What was measured, as it was read then."""

    final: AdapterRecord
    code: CodeRecord


@pytest.fixture
def measured(store: Store) -> Measured:
    """A task that has a code with a residual."""
    ingest(store, "zig")
    store.generators.add(generator(store, ["zig"]))
    residual = NewResidual(store.blobs.put(b"residual"), 0.001)
    code = store.codes.replace_residual(code_of(store, "zig"), residual, CodeLimits())
    assert code is not None
    return Measured(store.tasks.final("zig"), code)


def recorded(store: Store, seen: Measured) -> list[str]:
    """Offer a measurement of every source, and return those that were taken."""
    number = seen.code.generator_id
    alone = [replace(evaluation("zig"), rung=rung) for rung in ("base", "original")]
    made = [replace(evaluation("zig", generator_id=number), rung=rung) for rung in ("residual", "code", "generate")]
    count = store.evaluations.add([*alone, *made], of=seen.final, code=seen.code)
    taken = sorted(row.rung for row in store.evaluations.all("zig"))
    assert len(taken) == count
    return taken


ALL = ["base", "code", "generate", "original", "residual"]


def test_of_what_is_as_it_was_all_are_recorded(store: Store, measured: Measured) -> None:
    assert recorded(store, measured) == ALL


def test_of_a_code_that_was_replaced_meanwhile_none_is_recorded(store: Store, measured: Measured) -> None:
    store.codes.replace(measured.code.generator_id, code(store, "zig", data=b"finer"))
    assert recorded(store, measured) == ["base", "generate", "original"]


def test_of_a_residual_that_was_replaced_meanwhile_none_is_recorded(store: Store, measured: Measured) -> None:
    store.codes.replace_residual(code_of(store, "zig"), None, CodeLimits())
    assert recorded(store, measured) == ["base", "generate", "original"]


@pytest.mark.kept_in("sqlite", reason="PostgreSQL gives no number twice")
def test_of_an_adapter_that_was_replaced_meanwhile_none_is_recorded(store: Store, measured: Measured) -> None:
    ingest(store, "zig", weights=b"other weights", on_conflict="replace")
    assert store.tasks.final("zig").id == measured.final.id  # numbers of rows are given again
    assert recorded(store, measured) == ["base"]


def test_of_a_generator_that_is_not_current_any_more_all_are_recorded(store: Store, measured: Measured) -> None:
    store.generators.add(generator(store, ["zig"], data=b"newer"))
    assert recorded(store, measured) == ALL


def test_of_a_generator_that_was_forgotten_meanwhile_none_is_recorded(store: Store, measured: Measured) -> None:
    first = store.generators.current(BASE)
    assert first is not None
    store.generators.add(generator(store, ["zig"], data=b"newer"))
    store.generators.forget(first)
    assert recorded(store, measured) == ["base", "original"]
