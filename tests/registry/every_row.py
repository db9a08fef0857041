"""A store with rows in every table, and everything that it says of them."""

from __future__ import annotations

from dataclasses import replace

from registry.evicted import EvictedAdapter
from registry.records import NewAdapter, TaskIngest
from registry.store import Store
from tests.registry.examples import BASE, EXTRACTOR, adapter, evaluation, eviction, generator, ingest, vector

ALONE = "other/base-model"


def fill(store: Store) -> None:
    """Record something of every kind: two base models, odd sources, an evicted task, a run that is not done."""
    store.set_base_alias(BASE, "/models/base")
    store.set_base_facts(BASE, fingerprint="f00d", shape={"hidden_size": 64})
    ingest(store, "rust", steps=[80, 90], samples=b"samples", eval_data=b"texts", card=b"card")
    ingest(store, "HTML")
    store.ingest_task(trainer_run(store))
    one = vector(store, "rust")
    newer = {**EXTRACTOR, "version": 2}
    store.add_vectors([one, vector(store, "rust", 1), replace(one, view="adapted"), replace(one, extractor=newer)])
    first = store.add_generator(generator(store, ["rust"]))
    second = store.add_generator(generator(store, ["rust", "html"], data=b"newer", parent_id=first.id))
    store.add_evaluations(
        [evaluation("rust"), evaluation("html", generator_id=first.id), evaluation("html", generator_id=second.id)]
    )
    text = store.task("rust").eval_data
    assert text is not None
    store.add_evaluations([replace(evaluation("rust", nats=1.5), data=text, rung="base", retained_gain=None)])
    store.set_pinned(["rust"], True)
    store.evict(eviction(store, "html"))
    store.start_train_run(ALONE, {"steps": 2})
    run = store.start_train_run(BASE, {"steps": 3})
    store.save_checkpoint(run.id, step=2, weights=b"state", optimizer=b"moments")


def trainer_run(store: Store) -> TaskIngest:
    """Return a task as a trainer leaves it, whose final adapter is its last checkpoint; one row came from elsewhere."""

    def at(step: int | None, source: str, *, is_final: bool = False) -> NewAdapter:
        made = adapter(store, f"run at {step}".encode(), step=step, is_final=is_final)
        return replace(made, source=source, dtype="F32", target_modules=("q_proj",))

    rows = [at(5, "runs/sql/checkpoint-5"), at(7, "elsewhere"), at(9, "runs/sql/checkpoint-9", is_final=True)]
    return TaskIngest("sql", ALONE, rows)


def everything(store: Store) -> dict[str, object]:
    """Return all that a store says of its rows."""
    names = [task.name for task in store.tasks()]
    generators = store.generators()
    evicted: list[EvictedAdapter] = store.evicted_adapters()
    return {
        "bases": store.base_models(),
        "tasks": list(store.tasks()),
        "summaries": list(store.summaries()),
        "adapters": [store.adapters(name) for name in names],
        "vectors": [store.vectors(name) for name in names],
        "generators": generators,
        "codes": [store.codes(made.id) for made in generators],
        "evaluations": store.evaluations(),
        "evicted": evicted,
        "runs": [store.running_train_run(base) for base in (BASE, ALONE)],
    }
