"""Publication of codes and generators: what other processes change during a training, and codes of interrupted runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from icmlora.fleet.resources.adapter_source import StoreAdapterSource
from icmlora.fleet.train.publish import EVICTED, REPLACED, Published, publish
from icmlora.fleet.train.run import TrainingRun
from icmlora.generator.codec.encoding import Encoded
from registry.manifests import Code, CodeLimits, File, Generator, Measurement, Task, now
from registry.store import Store
from tests.registry.examples import BASE, TEXT, adapter, new_store, put, task

ASKED = CodeLimits(tolerance=0.1)
NAMES = ("poems", "rust", "sql")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store") as opened:
        opened.publish([task(opened, name) for name in NAMES])
        yield opened


@pytest.fixture
def source(store: Store) -> StoreAdapterSource:
    """The tasks as a training read them."""
    return StoreAdapterSource.of_base(store, BASE)


def encoded(*names: str) -> dict[str, Encoded]:
    return {name: Encoded(f"code of {name}".encode(), 0.25, 0.5) for name in names}


def network(store: Store, data: bytes = b"network", **changes: Any) -> Generator:
    return Generator(base_model=BASE, blob=put(store, data), config={}, metrics={}, **changes)


def trained(store: Store, source: StoreAdapterSource, data: bytes = b"network", **options: Any) -> Published:
    return publish(store, source, network(store, data), encoded(*source.names), ASKED, **options)


def coded(store: Store, generator: str) -> list[str]:
    return [one.name for one in store.tasks() if one.code is not None and one.code.generator == generator]


def before_publishing(monkeypatch: pytest.MonkeyPatch, store: Store, *happen: Callable[[], object]) -> None:
    """Let other processes do something before the first attempts to publish."""

    def call(states: Any, **options: Any) -> Any:
        if waiting:
            waiting.pop(0)()
        return real(states, **options)

    waiting, real = list(happen), store.publish
    monkeypatch.setattr(store, "publish", call)


def note(store: Store, name: str) -> None:
    with new_store(store.address) as other:
        other.update(name, lambda one: replace(one, note="changed"))


def test_a_generator_and_its_codes_are_published_together(store: Store, source: StoreAdapterSource) -> None:
    done = trained(store, source)
    assert (store.generator(BASE), done.generator.version, done.before) == (done.generator, 1, None)
    assert list(done.codes) == list(NAMES)
    code = store.task("rust").code
    assert code is not None
    assert store.blobs.read(code.blob) == b"code of rust"
    assert (code.generator, code.squared_error, code.asked) == (done.generator.blob, 0.25, ASKED)


def test_a_new_generator_continues_the_numbers_and_frees_the_earlier_files(
    store: Store, source: StoreAdapterSource
) -> None:
    first = trained(store, source)
    done = publish(
        store, source, network(store, b"another"), {"rust": Encoded(b"new", 0.1, 0.1), **encoded("sql", "poems")}, ASKED
    )
    assert (done.generator.version, done.before) == (2, first.generator)
    assert done.replaced_bytes == len(b"network") + len(b"code of rust")
    assert [one.version for one in store.generators(BASE)] == [1, 2]


def test_tasks_that_are_not_encoded_keep_their_codes(store: Store, source: StoreAdapterSource) -> None:
    first = trained(store, source)
    done = publish(store, source, network(store, b"another"), encoded("rust"), ASKED)
    assert coded(store, first.generator.blob) == ["poems", "sql"]
    assert done.replaced_bytes == 0  # two codes need the network, and the code of `rust` has the same bytes


def test_a_task_that_was_changed_gets_its_code(
    store: Store, source: StoreAdapterSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    note(store, "sql")
    before_publishing(monkeypatch, store, lambda: note(store, "rust"), lambda: note(store, "poems"))
    done = trained(store, source)
    assert (list(done.codes), done.left_out) == (list(NAMES), {})
    assert [one.note for one in store.tasks()] == ["changed"] * 3


def test_a_renamed_task_is_found_by_its_weights(store: Store, source: StoreAdapterSource) -> None:
    rust = store.task("rust")
    store.publish([replace(rust, name="oxide", manifest=None, parent=None)], remove=[rust])
    store.publish([task(store, "twin", weights=b"weights of sql")])
    done = trained(store, source)
    assert (list(done.codes), done.left_out) == (["poems", "oxide", "sql"], {})
    assert coded(store, done.generator.blob) == ["oxide", "poems", "sql"]


def test_replaced_removed_and_evicted_tasks_are_left_out(store: Store, source: StoreAdapterSource) -> None:
    poems, rust = store.task("poems"), store.task("rust")
    store.publish([replace(poems, version=2, final=adapter(store, b"other weights"))])
    store.update("rust", lambda one: replace(one, final=replace(rust.final, evicted_at=now())))
    store.remove(store.named(["sql"]))
    done = trained(store, source)
    assert (done.codes, done.left_out) == ({}, {"poems": REPLACED, "rust": EVICTED, "sql": REPLACED})
    assert (coded(store, done.generator.blob), store.generator(BASE)) == ([], done.generator)


def test_what_another_process_publishes_is_not_touched(
    store: Store, source: StoreAdapterSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring() -> None:  # as `icm import` does
        with new_store(store.address) as other:
            blob = put(other, b"imported network")
            code = Code(blob=put(other, b"imported code"), generator=blob)
            other.publish(
                [Generator(base_model=BASE, blob=blob, config={}, metrics={}), task(other, "odes", code=code)]
            )

    before_publishing(monkeypatch, store, bring)
    done = trained(store, source)
    assert (done.generator.version, done.before and done.before.version) == (2, 1)
    odes = store.task("odes").code
    assert odes is not None
    assert store.blobs.read(odes.generator) == b"imported network"


def test_a_generator_that_continues_another_takes_all_its_codes_over(store: Store, source: StoreAdapterSource) -> None:
    first = trained(store, source).generator
    measured = Measurement(
        source="code", generator=str(first.blob), data=TEXT, value=1.0, count=1, utf8_bytes=1, settings={}
    )
    store.update("sql", lambda one: replace(one, measured=(measured,), final=replace(one.final, evicted_at=now())))
    store.publish([task(store, "odes")])
    new = StoreAdapterSource(store, BASE, [store.task("odes")], with_checkpoints=False)
    done = trained(store, new, b"longer network", decodes=frozenset({str(first.blob)}))
    assert coded(store, done.generator.blob) == ["odes", *NAMES]
    sql = store.task("sql")
    assert sql.quality is not None
    assert (sql.quality.value, sql.quality.generator) == (1.0, str(done.generator.blob))
    assert done.replaced_bytes == first.size


def test_codes_of_the_generator_in_use_make_no_new_version(store: Store, source: StoreAdapterSource) -> None:
    first = trained(store, source).generator
    store.publish([task(store, "odes")])
    new = StoreAdapterSource(store, BASE, [store.task("odes")], with_checkpoints=False)
    publish(store, new, first, encoded("odes"), ASKED)
    assert store.generators(BASE) == [first]
    assert coded(store, first.blob) == ["odes", *NAMES]


def kept(run: TrainingRun, generator: str, tasks: list[Task]) -> list[bytes | None]:
    with run.codes(generator) as codes:
        found = map(codes.get, tasks)
        return [None if code is None else code[0].data for code in found]


class TestRun:
    """Codes of a run that are not published yet."""

    def test_they_are_found_again_under_their_generator(self, store: Store) -> None:
        tasks = list(store.tasks())
        run = TrainingRun.open(store, BASE, {"seed": 1}, resume=True)
        with run.codes("network") as codes:
            for one in tasks[:2]:
                codes.add(one, encoded(one.name)[one.name], seed_is_known=one.name == "rust")
        again = TrainingRun.open(store, BASE, {"seed": 1}, resume=True)
        assert kept(again, "network", tasks) == [b"code of poems", b"code of rust", None]
        assert kept(again, "another", tasks) == [None] * 3
        with again.codes("network") as codes:
            assert codes.get(tasks[1]) == (Encoded(b"code of rust", 0.25, codes.get(tasks[1])[0].weighted_error), True)  # type: ignore[index]

    @pytest.mark.parametrize(("config", "resume"), [({"seed": 2}, True), ({"seed": 1}, False)])
    def test_another_run_takes_their_place(self, store: Store, config: dict[str, object], resume: bool) -> None:
        tasks = list(store.tasks())
        run = TrainingRun.open(store, BASE, {"seed": 1}, resume=True)
        with run.codes("network") as codes:
            codes.add(tasks[0], encoded("poems")["poems"], seed_is_known=False)
        (batch,) = store.run(BASE).files  # type: ignore[union-attr]
        other = TrainingRun.open(store, BASE, config, resume=resume)
        assert kept(other, "network", tasks) == [None] * 3
        with other.codes("network") as codes:
            codes.add(tasks[1], encoded("rust")["rust"], seed_is_known=False)
        assert not store.blobs.exists(batch)

    def test_another_adapter_of_a_task_has_no_code(self, store: Store) -> None:
        poems = store.task("poems")
        run = TrainingRun.open(store, BASE, {}, resume=True)
        with run.codes("network") as codes:
            codes.add(poems, encoded("poems")["poems"], seed_is_known=False)
        other = replace(poems, final=replace(poems.final, config=File("ab" * 32, 1)))
        assert kept(run, "network", [poems, other, replace(poems, name="twin")]) == [b"code of poems", None, None]

    def test_a_damaged_batch_is_made_again(self, store: Store) -> None:
        poems = store.task("poems")
        run = TrainingRun.open(store, BASE, {}, resume=True)
        with run.codes("network") as codes:
            codes.add(poems, encoded("poems")["poems"], seed_is_known=False)
        (batch,) = store.run(BASE).codes  # type: ignore[union-attr]
        store.blobs.delete([batch])
        assert kept(run, "network", [poems]) == [None]

    def test_the_end_of_a_run_deletes_them(self, store: Store) -> None:
        run = TrainingRun.open(store, BASE, {}, resume=True)
        with run.codes("network") as codes:
            codes.add(store.task("poems"), encoded("poems")["poems"], seed_is_known=False)
        (batch,) = store.run(BASE).files  # type: ignore[union-attr]
        store.end_run(BASE)
        assert (store.run(BASE), store.blobs.exists(batch)) == (None, False)
