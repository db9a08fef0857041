"""One base model with several labels: joined with tasks and generators, separated again, and no code is ever lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import BaseModelConflict, LastCopy
from registry.names import UNKNOWN_BASE
from registry.records import Eviction, GeneratorRecord
from registry.store import Store
from tests.registry.examples import BASE, code, eviction, generator, ingest, offer, vector

MIRROR = "mirror/base-model"


def bases(store: Store) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return name -> number of tasks and labels."""
    return {row.name: (row.tasks, row.names[1:]) for row in store.base_models.all()}


def trained(store: Store, base_model: str, *tasks: str) -> GeneratorRecord:
    """Record tasks of a base model and a generator with a code for each."""
    for task in tasks:
        ingest(store, task, base_model=base_model)
    made = generator(store, tasks, data=f"generator of {base_model}".encode())
    return store.generators.add(replace(made, base_model=base_model))


def eviction_of(store: Store, task: str, made: GeneratorRecord) -> Eviction:
    """Return what lets go of the original of a task that has a code under a generator."""
    found = store.codes.get(task, made.id)
    assert found is not None
    rows = store.tasks.adapters(task)
    return Eviction(task, [row.id for row in rows], rows[-1], found, made, 0.02)


def current(store: Store, base_model: str) -> GeneratorRecord:
    found = store.generators.current(base_model)
    assert found is not None
    return found


def test_a_joined_label_brings_its_tasks(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html", base_model=MIRROR)
    joined = store.base_models.join(BASE, [MIRROR])
    assert (joined.name, joined.labels, joined.tasks) == (BASE, (MIRROR,), 1)
    assert bases(store) == {BASE: (2, (MIRROR,))}
    assert store.tasks.get("html").base_model == BASE


def test_joining_again_changes_nothing(store: Store) -> None:
    store.base_models.join(BASE, [MIRROR])
    assert store.base_models.join(MIRROR, [BASE, MIRROR]).labels == ()
    assert bases(store) == {BASE: (0, (MIRROR,))}


def test_a_label_is_known_before_there_are_adapters_of_it(store: Store) -> None:
    store.base_models.join(BASE, [MIRROR])
    ingest(store, "html", base_model=MIRROR)
    assert store.tasks.get("html").base_model == BASE
    assert (store.base_models.name_of(MIRROR), store.base_models.name_of("other")) == (BASE, "other")


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_the_only_generator_becomes_that_of_all_and_keeps_its_codes(store: Store) -> None:
    made = trained(store, MIRROR, "html")
    store.originals.evict(eviction_of(store, "html", made))
    ingest(store, "rust")
    joined = store.base_models.join(BASE, [MIRROR])
    assert (joined.generators, joined.without_code) == (1, ())
    assert current(store, BASE).blob == made.blob
    assert store.codes.get("html", made.id) is not None
    assert list(store.verify(read_data=True)) == []


def test_two_generators_are_not_joined_unless_one_is_chosen(store: Store) -> None:
    trained(store, BASE, "rust")
    trained(store, MIRROR, "html")
    with pytest.raises(BaseModelConflict, match="both have a generator"):
        store.base_models.join(BASE, [MIRROR])
    with pytest.raises(BaseModelConflict, match="neither"):
        store.base_models.join(BASE, [MIRROR], keep="other/model")
    assert bases(store) == {BASE: (1, ()), MIRROR: (1, ())}


@pytest.mark.one_case
@pytest.mark.parametrize(("kept", "without"), [(BASE, "html"), (MIRROR, "rust")])
def test_the_chosen_generator_stays_and_the_other_is_an_earlier_one(store: Store, kept: str, without: str) -> None:
    made = {BASE: trained(store, BASE, "rust"), MIRROR: trained(store, MIRROR, "html")}
    joined = store.base_models.join(BASE, [MIRROR], keep=kept)
    assert joined.without_code == (without,)
    assert current(store, BASE).blob == made[kept].blob
    assert sorted(row.version for row in store.generators.all(BASE)) == [1, 2]
    lost = made[MIRROR if kept == BASE else BASE]
    assert store.codes.get(without, lost.id) is not None
    assert store.generators.make_current(lost.id) == [({"rust", "html"} - {without}).pop()]


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_a_generator_that_evicted_tasks_need_must_stay(store: Store) -> None:
    trained(store, BASE, "rust")
    made = trained(store, MIRROR, "html")
    store.originals.evict(eviction_of(store, "html", made))
    with pytest.raises(LastCopy, match="'html'"):
        store.base_models.join(BASE, [MIRROR], keep=BASE)
    assert bases(store) == {BASE: (1, ()), MIRROR: (1, ())}
    assert store.base_models.join(BASE, [MIRROR], keep=MIRROR).without_code == ("rust",)
    assert list(store.verify(read_data=True)) == []


def test_a_separated_label_takes_its_tasks_without_what_was_made_of_them(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html", base_model=MIRROR)
    store.base_models.join(BASE, [MIRROR])
    made = store.generators.add(generator(store, ["rust", "html"]))
    store.vectors.add([vector(store, "html")])
    apart = store.base_models.separate(MIRROR)
    assert (apart.tasks, apart.generators, apart.codes) == (1, 0, 1)
    assert bases(store) == {BASE: (1, ()), MIRROR: (1, ())}
    assert (store.codes.get("html", made.id), store.vectors.all("html")) == (None, [])
    assert store.codes.get("rust", made.id) is not None
    assert store.generators.current(MIRROR) is None


def test_joining_and_separating_gives_back_a_base_model_with_its_generator(store: Store) -> None:
    store.base_models.set_path(MIRROR, "/models/mirror")
    made = trained(store, MIRROR, "html")
    store.originals.evict(eviction_of(store, "html", made))
    store.base_models.join(BASE, [MIRROR])
    apart = store.base_models.separate(MIRROR)
    assert (apart.tasks, apart.generators, apart.codes) == (1, 1, 0)
    assert current(store, MIRROR).blob == made.blob
    assert next(row.path for row in store.base_models.all() if row.name == MIRROR) == "/models/mirror"


def test_an_evicted_task_cannot_leave_its_generator(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html", base_model=MIRROR)
    store.base_models.join(BASE, [MIRROR])
    store.generators.add(generator(store, ["rust", "html"]))
    store.originals.evict(eviction(store, "html"))
    with pytest.raises(LastCopy, match="'html' was evicted"):
        store.base_models.separate(MIRROR)
    assert bases(store) == {BASE: (2, (MIRROR,))}


def test_a_label_has_one_base_model(store: Store) -> None:
    store.base_models.join(BASE, [MIRROR])
    with pytest.raises(BaseModelConflict, match="is a label of"):
        store.base_models.join("other/model", [MIRROR])
    with pytest.raises(BaseModelConflict, match="is not a label of any base model"):
        store.base_models.separate(BASE)


def test_labels_of_a_joined_base_model_come_along(store: Store) -> None:
    store.base_models.join(MIRROR, ["/models/copy"])
    ingest(store, "html", base_model="/models/copy")
    store.base_models.join(BASE, [MIRROR])
    assert bases(store) == {BASE: (1, ("/models/copy", MIRROR))}
    assert store.base_models.separate("/models/copy").tasks == 1


def test_adapters_without_a_base_model_are_not_joined(store: Store) -> None:
    with pytest.raises(BaseModelConflict, match="adapters without a base model"):
        store.base_models.join(BASE, [UNKNOWN_BASE])


def test_a_task_gets_the_base_model_that_it_lacked(store: Store) -> None:
    ingest(store, "rust", base_model=UNKNOWN_BASE)
    assert "no base model" in str(store.tasks.final("rust").original_only)
    told = replace(offer(store, "rust"), base_is_told=True)
    outcome = store.tasks.ingest([told])[0]
    assert (outcome.status, outcome.new, outcome.base_model) == ("updated", 0, BASE)
    assert (store.tasks.get("rust").base_model, store.tasks.final("rust").original_only) == (BASE, None)
    # The same adapter without the option: it keeps what it has.
    again = store.tasks.ingest([offer(store, "rust", base_model=UNKNOWN_BASE)])[0]
    assert (again.status, again.base_model) == ("known", BASE)


def test_a_run_of_a_joined_base_model_is_given_up(store: Store) -> None:
    store.runs.start(BASE, {"steps": 1})
    run = store.runs.start(MIRROR, {"steps": 2})
    store.runs.save_checkpoint(run.id, step=1, weights=b"state", optimizer=b"moments")
    store.base_models.join(BASE, [MIRROR])
    running = store.runs.running(BASE)
    assert running is not None
    assert running.config == {"steps": 1}


def test_the_codes_of_a_new_generator_may_be_of_tasks_of_any_label(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html", base_model=MIRROR)
    store.base_models.join(BASE, [MIRROR])
    made = generator(store, data=b"both")
    store.generators.add(replace(made, base_model=MIRROR, codes=[code(store, "rust"), code(store, "html")]))
    assert [row.code is not None for row in store.tasks.summaries()] == [True, True]


def load_in(store: Store, name: str) -> tuple[str | None, str | None]:
    """Return where a base model is, and in how few bits it is loaded."""
    (found,) = [row for row in store.base_models.all() if row.name == name]
    return found.path, found.load_in


def test_few_bits_come_with_a_joined_label_and_go_with_its_path(store: Store) -> None:
    store.base_models.set_path(BASE, "/models/base")
    store.base_models.set_path(MIRROR, "/models/base", load_in="nf4")
    store.base_models.join(BASE, [MIRROR])
    assert load_in(store, BASE) == ("/models/base", "nf4")
    store.base_models.separate(MIRROR)
    assert load_in(store, MIRROR) == ("/models/base", "nf4")
    store.base_models.set_path(BASE, "/models/other")
    assert load_in(store, BASE) == ("/models/other", None)


def test_a_base_model_with_a_loader_is_not_loaded_in_few_bits_for_a_joined_label(store: Store) -> None:
    store.base_models.set_path(BASE, "/models/base", loader="my_models:load")
    store.base_models.set_path(MIRROR, "/models/mirror", load_in="int8")
    store.base_models.join(BASE, [MIRROR])
    assert load_in(store, BASE) == ("/models/base", None)
