"""Residuals of codes: whose they are, who may change them, and when their files are deleted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import DamagedBlob, LastCopy, MissingBlob
from registry.records import CodeLimits, CodeRecord, NewCode, NewResidual
from registry.store import Store
from tests.registry.examples import code_of, evaluation, eviction, generator, ingest
from tests.registry.pairs import lose, overwrite, rewrite

DATA = b"a residual"
ASKED = CodeLimits(max_error=0.1, keep=0.97)


@pytest.fixture
def coded(store: Store) -> CodeRecord:
    """Record a task with a generator, a code, and a residual; return the code as it was before."""
    ingest(store, "rust")
    store.generators.add(generator(store, ["rust"]))
    bare = code_of(store, "rust")
    measured = replace(evaluation("rust", generator_id=bare.generator_id), rung="residual")
    store.codes.replace_residual(bare, NewResidual(store.blobs.put(DATA), 0.002), ASKED, [measured])
    return bare


def residual_rows(store: Store) -> int:
    return sum(row.rung == "residual" for row in store.evaluations.all())


def files(store: Store) -> list[bytes]:
    return [store.blobs.read(digest) for digest in store.blobs.sizes()]


def test_a_code_has_its_residual_and_the_limits_that_it_was_made_for(store: Store, coded: CodeRecord) -> None:
    code = code_of(store, "rust")
    assert code.residual is not None
    assert store.blobs.read(code.residual.blob) == DATA
    assert (code.residual.size, code.residual.squared_error, code.asked) == (len(DATA), 0.002, ASKED)
    assert (code.rung, code.best_squared_error, code.squared_error) == ("residual", 0.002, coded.squared_error)
    assert (coded.rung, coded.best_squared_error, coded.asked) == ("code", coded.squared_error, None)
    assert code.effect == coded.effect == 0.98
    assert next(store.tasks.summaries()).code == code


@pytest.mark.parametrize("limit", [0.1, 0.22, 0.3, 1 / 3])
def test_the_limit_is_kept_as_its_square_and_comes_back_as_it_was_given(
    store: Store, coded: CodeRecord, limit: float
) -> None:
    store.codes.replace_residual(coded, None, CodeLimits(max_error=limit))
    with store._db.columns() as columns:
        ((stored,),) = columns.execute("SELECT max_error FROM codes").fetchall()
    assert (stored, code_of(store, "rust").asked) == (limit * limit, CodeLimits(max_error=limit))


def test_a_squared_limit_of_an_older_store_is_read_as_its_root(store: Store, coded: CodeRecord) -> None:
    rewrite(store, "UPDATE codes SET max_error = 0.09")
    assert code_of(store, "rust").asked == replace(ASKED, max_error=0.3)


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_another_residual_takes_its_place_and_leaves_no_file(store: Store, coded: CodeRecord) -> None:
    store.codes.replace_residual(coded, NewResidual(store.blobs.put(b"more"), 0.001), replace(ASKED, is_kept=False))
    code = code_of(store, "rust")
    assert (code.best_squared_error, code.asked) == (0.001, replace(ASKED, is_kept=False))
    assert (DATA in files(store), b"more" in files(store), residual_rows(store)) == (False, True, 0)


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_a_residual_goes_where_the_code_alone_is_enough(store: Store, coded: CodeRecord) -> None:
    assert residual_rows(store) == 1
    store.codes.replace_residual(coded, None, ASKED)
    assert (code_of(store, "rust").residual, DATA in files(store), residual_rows(store)) == (None, False, 0)


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_the_residual_of_a_replaced_code_goes_with_it(store: Store, coded: CodeRecord) -> None:
    new = NewCode(store.tasks.final("rust"), store.blobs.put(b"second"), 48.0, 0.1, CodeLimits(tolerance=0.1))
    record = store.codes.replace(coded.generator_id, new)
    assert record is not None
    assert (record.residual, record.asked) == (None, CodeLimits(tolerance=0.1))
    assert (DATA in files(store), residual_rows(store)) == (False, 0)
    assert list(store.verify(read_data=True)) == []


def test_a_residual_for_a_code_that_was_replaced_meanwhile_is_left_out(store: Store, coded: CodeRecord) -> None:
    new = NewCode(store.tasks.final("rust"), store.blobs.put(b"second"), 48.0, 0.1)
    store.codes.replace(coded.generator_id, new)
    assert store.codes.replace_residual(coded, NewResidual(store.blobs.put(DATA), 0.002), ASKED) is None
    assert code_of(store, "rust").residual is None


def test_a_residual_whose_bytes_are_not_stored_is_refused(store: Store, coded: CodeRecord) -> None:
    with pytest.raises(MissingBlob):
        store.codes.replace_residual(coded, NewResidual("0" * 64, 0.002), ASKED)
    assert code_of(store, "rust").best_squared_error == 0.002


def test_the_only_copy_keeps_its_residual(store: Store, coded: CodeRecord) -> None:
    store.originals.evict(eviction(store, "rust"))
    with pytest.raises(LastCopy, match="'rust'"):
        store.codes.replace_residual(coded, None, ASKED)
    store.prune(grace=0)
    assert DATA in files(store)


def test_an_eviction_records_the_error_of_the_rung_that_was_measured(store: Store, coded: CodeRecord) -> None:
    store.originals.evict(eviction(store, "rust", squared_error=0.003))
    assert (code_of(store, "rust").best_squared_error, code_of(store, "rust").squared_error) == (
        0.003,
        coded.squared_error,
    )


def test_a_residual_that_came_or_went_while_it_was_measured_keeps_the_original(store: Store, coded: CodeRecord) -> None:
    with pytest.raises(LastCopy, match="changed"):
        store.originals.evict(eviction(store, "rust", code=coded))
    order = eviction(store, "rust")
    store.codes.replace_residual(coded, None, ASKED)
    store.blobs.put(DATA)
    with pytest.raises(LastCopy, match="changed"):
        store.originals.evict(order)
    assert not store.tasks.final("rust").is_evicted


def test_a_damaged_residual_keeps_the_original(store: Store, coded: CodeRecord) -> None:
    order = eviction(store, "rust")
    assert order.code.residual is not None
    overwrite(store, order.code.residual.blob, bytes.upper)
    with pytest.raises(DamagedBlob):
        store.originals.evict(order)
    assert not store.tasks.final("rust").is_evicted


@pytest.mark.parametrize("names", [[], ["rust"]])
def test_verify_knows_whose_a_missing_residual_is(store: Store, coded: CodeRecord, names: list[str]) -> None:
    order = eviction(store, "rust")
    assert order.code.residual is not None
    lose(store, order.code.residual.blob)
    (finding,) = store.verify(names=names)
    assert (finding.kind, finding.tasks) == ("missing", ("rust",))


def test_residuals_are_on_the_bill_by_name(store: Store, coded: CodeRecord) -> None:
    usage = store.usage()
    assert (usage.residuals, usage.codes) == (len(DATA), coded.size)
    store.generators.add(generator(store, ["rust"], data=b"newer"))
    assert store.usage().residuals == 0
    assert store.usage().old_generators >= len(DATA)


def test_forgetting_a_task_frees_its_residual(store: Store, coded: CodeRecord) -> None:
    store.tasks.remove(["rust"], last_copies=["rust"])
    store.prune(grace=0)
    assert DATA not in files(store)
