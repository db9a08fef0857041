"""A store with rows in every table, and everything that it says of them."""

from __future__ import annotations

from dataclasses import replace

from registry.records import CodeLimits, NewAdapter, TaskIngest
from registry.store import Store
from tests.registry.examples import BASE, EXTRACTOR, adapter, code, evaluation, eviction, generator, ingest, vector

ALONE = "other/base-model"


def fill(store: Store) -> None:
    """Record something of every kind: two base models, odd sources, an evicted task, a run that is not done."""
    store.base_models.set_path(BASE, "/models/base")
    store.base_models.set_facts(BASE, fingerprint="f00d", shape={"hidden_size": 64})
    ingest(store, "rust", steps=[80, 90], samples=b"samples", eval_data=b"texts", card=b"card")
    ingest(store, "HTML")
    store.tasks.ingest([trainer_run(store)])
    one = vector(store, "rust")
    newer = {**EXTRACTOR, "version": 2}
    store.vectors.add([one, vector(store, "rust", 1), replace(one, view="adapted"), replace(one, extractor=newer)])
    first = store.generators.add(generator(store, ["rust"]))
    second = store.generators.add(generator(store, ["rust", "html"], data=b"newer", parent_id=first.id))
    store.codes.replace(second.id, replace(code(store, "html"), asked=CodeLimits(keep=0.97)))
    store.evaluations.add(
        [evaluation("rust"), evaluation("html", generator_id=first.id), evaluation("html", generator_id=second.id)]
    )
    text = store.tasks.get("rust").eval_data
    assert text is not None
    store.evaluations.add([replace(evaluation("rust", nats=1.5), data=text, rung="base", retained_gain=None)])
    store.tasks.edit(["rust"], pinned=True)
    store.originals.evict(eviction(store, "html"))
    store.runs.start(ALONE, {"steps": 2})
    run = store.runs.start(BASE, {"steps": 3})
    store.runs.save_checkpoint(run.id, step=2, weights=b"state", optimizer=b"moments")


def trainer_run(store: Store) -> TaskIngest:
    """Return a task as a trainer leaves it, whose final adapter is its last checkpoint; one row came from elsewhere."""

    def at(step: int | None, source: str, *, is_final: bool = False) -> NewAdapter:
        made = adapter(store, f"run at {step}".encode(), step=step, is_final=is_final)
        return replace(made, source=source, dtype="F32", target_modules=("q_proj",))

    rows = [at(5, "runs/sql/checkpoint-5"), at(7, "elsewhere"), at(9, "runs/sql/checkpoint-9", is_final=True)]
    return TaskIngest("sql", ALONE, rows)


def everything(store: Store) -> dict[str, object]:
    """Return all that a store says of its rows."""
    names = [task.name for task in store.tasks.all()]
    generators = store.generators.all()
    return {
        "bases": store.base_models.all(),
        "tasks": list(store.tasks.all()),
        "summaries": list(store.tasks.summaries()),
        "adapters": [store.tasks.adapters(name) for name in names],
        "vectors": [store.vectors.all(name) for name in names],
        "generators": generators,
        "codes": [store.codes.all(made.id) for made in generators],
        "evaluations": store.evaluations.all(),
        "origins": store.tasks.origins().named(names),
        "runs": [store.runs.running(base) for base in (BASE, ALONE)],
    }
