"""One base model with several labels: joined with tasks and generators, separated again, and no code is ever lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from icmlora.fleet.bases.labels import join, separate
from registry.errors import BaseModelConflict
from registry.manifests import Generator, Run
from registry.names import UNKNOWN_BASE
from registry.store import Store
from tests.registry.examples import BASE, code, evict, ingest, put, vector

MIRROR = "mirror/base-model"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


def bases(store: Store) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return name -> number of tasks and labels."""
    counts = store.task_counts()
    return {base.name: (counts.get(base.name, 0), base.names[1:]) for base in store.base_models()}


def trained(store: Store, base_model: str, *tasks: str) -> Generator:
    """Publish tasks of a base model, and a generator with a code for each."""
    data = f"generator of {base_model}".encode()
    made = Generator(base_model=base_model, blob=put(store, data), config={}, metrics={})
    for task in tasks:
        ingest(store, task, base_model=base_model)
    coded = [replace(store.task(task), code=code(store, task, generator=data)) for task in tasks]
    generator = store.publish([made, *coded])[0]
    assert isinstance(generator, Generator)
    return generator


def current(store: Store, base_model: str) -> str:
    found = store.generator(base_model)
    assert found is not None
    return found.blob


def test_a_joined_label_brings_its_tasks(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html", base_model=MIRROR)
    joined = join(store, BASE, [MIRROR])
    assert (joined.name, joined.labels, joined.tasks) == (BASE, (MIRROR,), 1)
    assert bases(store) == {BASE: (2, (MIRROR,))}
    assert (store.task("html").base_model, store.task("html").label) == (BASE, MIRROR)
    assert store.rebuild().tasks == 2
    assert bases(store) == {BASE: (2, (MIRROR,))}


def test_joining_again_changes_nothing(store: Store) -> None:
    join(store, BASE, [MIRROR])
    assert join(store, MIRROR, [BASE, MIRROR]).labels == ()
    assert bases(store) == {BASE: (0, (MIRROR,))}


def test_the_only_generator_becomes_that_of_all_and_keeps_its_codes(store: Store) -> None:
    made = trained(store, MIRROR, "html")
    evict(store, "html")
    ingest(store, "rust")
    joined = join(store, BASE, [MIRROR])
    assert (joined.generators, joined.without_code) == (1, ())
    assert current(store, BASE) == made.blob
    assert store.generator(MIRROR) is None
    assert store.task("html").code_under(store.generator(BASE)) is not None
    store.prune(grace=0)
    assert not [finding for finding in store.verify(read_data=True) if finding.is_problem]


def test_two_generators_are_not_joined_unless_one_is_chosen(store: Store) -> None:
    trained(store, BASE, "rust")
    trained(store, MIRROR, "html")
    with pytest.raises(BaseModelConflict, match="both have a generator"):
        join(store, BASE, [MIRROR])
    with pytest.raises(BaseModelConflict, match="neither"):
        join(store, BASE, [MIRROR], keep="other/model")
    assert bases(store) == {BASE: (1, ()), MIRROR: (1, ())}


@pytest.mark.parametrize(("kept", "without"), [(BASE, "html"), (MIRROR, "rust")])
def test_the_chosen_generator_stays_and_evicted_tasks_of_the_other_keep_their_codes(
    store: Store, kept: str, without: str
) -> None:
    made = {BASE: trained(store, BASE, "rust"), MIRROR: trained(store, MIRROR, "html")}
    evict(store, without)
    joined = join(store, BASE, [MIRROR], keep=kept)
    assert joined.without_code == (without,)
    assert current(store, BASE) == made[kept].blob
    store.prune(grace=0)
    lost = store.task(without).code
    assert lost is not None
    assert store.blobs.read(lost.generator) == f"generator of {MIRROR if kept == BASE else BASE}".encode()
    assert not [finding for finding in store.verify(read_data=True) if finding.is_problem]


def test_a_separated_label_takes_its_tasks_without_what_was_made_of_them(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html", base_model=MIRROR)
    join(store, BASE, [MIRROR])
    made = trained(store, BASE)
    for name in ("rust", "html"):
        new = code(store, name, generator=f"generator of {BASE}".encode())
        vectors = (vector(store),)
        store.update(name, lambda task: replace(task, code=new, vectors=vectors))  # noqa: B023
    apart = separate(store, MIRROR)
    assert (apart.tasks, apart.generators, apart.codes) == (1, 0, 1)
    assert bases(store) == {BASE: (1, ()), MIRROR: (1, ())}
    assert (store.task("html").code, store.task("html").vectors) == (None, ())
    assert store.task("rust").code_under(made) is not None
    assert store.generator(MIRROR) is None


def test_joining_and_separating_gives_back_a_base_model_with_its_generator(store: Store) -> None:
    made = trained(store, MIRROR, "html")
    evict(store, "html")
    join(store, BASE, [MIRROR])
    apart = separate(store, MIRROR)
    assert (apart.tasks, apart.generators, apart.codes) == (1, 1, 0)
    assert current(store, MIRROR) == made.blob
    assert store.generator(BASE) is None


def test_a_task_without_its_original_keeps_its_code_when_its_label_is_separated(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html", base_model=MIRROR)
    join(store, BASE, [MIRROR])
    trained(store, BASE)
    new = code(store, "html", generator=f"generator of {BASE}".encode())
    store.update("html", lambda task: replace(task, code=new))
    evict(store, "html")
    assert separate(store, MIRROR).codes == 0
    assert store.task("html").code == new


def test_a_label_has_one_base_model(store: Store) -> None:
    join(store, BASE, [MIRROR])
    with pytest.raises(BaseModelConflict, match="is a label of"):
        join(store, "other/model", [MIRROR])
    with pytest.raises(BaseModelConflict, match="is not a label of any base model"):
        separate(store, BASE)


def test_labels_of_a_joined_base_model_come_along(store: Store) -> None:
    join(store, MIRROR, ["/models/copy"])
    ingest(store, "html", base_model=MIRROR, label="/models/copy")
    join(store, BASE, [MIRROR])
    assert bases(store) == {BASE: (1, ("/models/copy", MIRROR))}
    assert separate(store, "/models/copy").tasks == 1


def test_adapters_without_a_base_model_are_not_joined(store: Store) -> None:
    with pytest.raises(BaseModelConflict, match="adapters without a base model"):
        join(store, BASE, [UNKNOWN_BASE])


def test_the_run_of_a_joined_base_model_ends(store: Store) -> None:
    store.save_run(Run(base_model=BASE, config={"steps": 1}))
    store.save_run(Run(base_model=MIRROR, config={"steps": 2}, weights=put(store, b"state")))
    join(store, BASE, [MIRROR])
    assert store.run(MIRROR) is None
    running = store.run(BASE)
    assert running is not None
    assert running.config == {"steps": 1}
