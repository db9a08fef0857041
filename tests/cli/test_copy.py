"""`icm copy`: tasks go from store to store, with everything that belongs to them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.errors import Cancelled
from icmlora.fleet.api import Fleet
from icmlora.fleet.context import Event, Progress
from registry.encoding import files_of, unpacked
from registry.manifests import File, Run, State
from registry.store import Store
from tests.cli.coded import codes, current, damage
from tests.cli.conftest import Ran
from tests.cli.test_materialize import content
from tests.cli.tiny_fleet import icm_quietly, train_store, write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
TASKS = ["poems", "rules", "silent"]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Where a second store is to be."""
    return tmp_path / "other"


def said(store: Path) -> list[State]:
    """Return all versions of all tasks, generators and base models, without the places of earlier states."""
    with Store.open(store, read_only=True) as opened:
        versions = [version for name in opened.names() for version in opened.history(name)]
        states: list[State] = [*versions, *opened.generators(), *opened.base_models()]
    return [replace(state, seq=0, parent=None) for state in states]


def is_whole(icm: Icm, store: Path) -> bool:
    return bool(icm("verify", "--read-data", "--json", "--store", store).document["ok"])


def test_the_second_store_says_what_the_first_one_says(icm: Icm, trained: Path, other: Path) -> None:
    icm_quietly(trained, "eval", "poems", "--source", "code", "--device", "cpu")
    icm_quietly(trained, "evict", "rules", "--max-error", "0.9")
    icm_quietly(trained, "edit", "poems", "--tag", "prod", "--note", "keep", "--pin")
    ran = icm("copy", trained, other, "--json")
    assert (ran.code, ran.document["copied"], ran.document["refused"]) == (0, TASKS, {})
    assert said(other) == said(trained)
    assert is_whole(icm, other)


def test_every_version_goes_with_its_digests(icm: Icm, trained: Path, other: Path, tmp_path: Path) -> None:
    changed = write_lora(tmp_path / "changed" / "poems", seed=77)
    icm_quietly(trained, "ingest", changed, "--no-vectors", "--on-conflict", "version")
    icm("copy", trained, other)

    def manifests(store: Path) -> list[str | None]:
        with Store.open(store, read_only=True) as opened:
            return [version.manifest for version in opened.history("poems")]

    assert len(manifests(other)) == 2
    assert manifests(other) == manifests(trained)


def test_a_new_version_is_added_to_a_copy(icm: Icm, trained: Path, other: Path, tmp_path: Path) -> None:
    icm("copy", trained, other)
    icm_quietly(other, "edit", "poems", "--note", "mine")
    changed = write_lora(tmp_path / "changed" / "poems", seed=77)
    icm_quietly(trained, "ingest", changed, "--no-vectors", "--on-conflict", "version")
    assert icm("copy", trained, other, "--json").document["completed"] == ["poems"]
    with Store.open(other) as store, Store.open(trained) as source:
        assert [one.version for one in store.history("poems")] == [1, 2]
        assert store.task("poems").final == source.task("poems").final
        assert store.task("poems@1").final == source.task("poems@1").final
        assert store.task("poems").note == "mine"
    assert is_whole(icm, other)
    assert "poems" in icm("copy", trained, other, "--json").document["known"]


def test_a_damaged_generator_leaves_the_tasks_of_its_base_model_out(icm: Icm, trained: Path, other: Path) -> None:
    damage(trained, current(trained).blob)
    ran = icm("copy", trained, other, "--json")
    assert (ran.code, ran.document["copied"]) == (ExitCode.PARTLY, [])
    assert "is damaged" in ran.document["refused"]["rules"]


def test_a_training_run_stays_where_it_is(icm: Icm, trained: Path, other: Path) -> None:
    with Store.open(trained) as store:
        weights = File(store.blobs.put(b"half trained"), 12)
        store.save_run(Run(base_model=LABEL, config={}, weights=weights))
    icm("copy", trained, other)
    with Store.open(other) as store:
        assert (store.run(LABEL), store.blobs.exists(weights)) == (None, False)


def test_an_adapter_comes_out_of_both_alike(icm: Icm, trained: Path, other: Path, tmp_path: Path) -> None:
    icm_quietly(trained, "evict", "poems", "--max-error", "0.9")
    icm("copy", trained, other)
    for task in TASKS:
        for store, folder in ((trained, "before"), (other, "after")):
            icm_quietly(store, "materialize", task, "-o", tmp_path / folder / task)
        assert content(tmp_path / "after" / task) == content(tmp_path / "before" / task)


def test_an_evicted_original_is_not_copied_where_its_bytes_are_still_there(
    icm: Icm, trained: Path, other: Path
) -> None:
    with Store.open(trained) as store:
        weights = store.task("poems").final.weights
        data = store.blobs.read(weights)
    icm_quietly(trained, "evict", "poems", "--max-error", "0.9")
    with Store.open(trained) as store:
        assert store.blobs.put(data) == weights  # as in an object store, until it is no longer young
    icm("copy", trained, other)
    with Store.open(other) as store:
        assert not store.blobs.exists(weights)
    assert is_whole(icm, other)


def test_the_same_copy_again_changes_nothing(icm: Icm, trained: Path, other: Path) -> None:
    icm("copy", trained, other)
    before = (other / "registry.db").read_bytes()
    ran = icm("copy", trained, other, "--json")
    assert ran.document == {"copied": [], "completed": [], "known": TASKS, "refused": {}, "bytes": 0}
    assert (other / "registry.db").read_bytes() == before


def test_only_the_named_tasks_go(icm: Icm, trained: Path, other: Path) -> None:
    assert icm("copy", trained, other, "POEMS", "--json").document["copied"] == ["poems"]
    assert icm("ls", "-q", "--store", other).out.split() == ["poems"]


def test_a_task_with_another_adapter_stays_and_the_others_go(
    icm: Icm, trained: Path, other: Path, tmp_path: Path
) -> None:
    icm_quietly(other, "ingest", write_lora(tmp_path / "poems", seed=77), "--no-vectors")
    before = icm("show", "poems", "--json", "--store", other).document
    ran = icm("copy", trained, other, "--json")
    assert (ran.code, ran.document["copied"]) == (ExitCode.PARTLY, ["rules", "silent"])
    assert ran.document["refused"]["poems"] == "the target store has another task named 'poems'"
    assert icm("show", "poems", "--json", "--store", other).document["adapters"] == before["adapters"]


def test_a_copy_that_was_stopped_goes_on(icm: Icm, trained: Path, other: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 2:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        Fleet(trained, on_event=stop).copy(other)
    ran = icm("copy", trained, other, "--json")
    assert (ran.document["known"], ran.document["copied"]) == (TASKS[:2], TASKS[2:])
    assert said(other) == said(trained)


def test_a_task_that_was_there_gets_what_it_lacks(icm: Icm, mixed: Path, other: Path) -> None:
    icm("copy", mixed, other)
    train_store(mixed)
    assert icm("copy", mixed, other, "--json").document["completed"] == TASKS
    assert codes(other).keys() == codes(mixed).keys()
    assert is_whole(icm, other)


def test_a_generator_that_continues_the_one_in_use_takes_its_place(
    icm: Icm, trained: Path, other: Path, tmp_path: Path, tuned_wins: None
) -> None:
    icm("copy", trained, other)
    icm_quietly(trained, "ingest", write_lora(tmp_path / "extra", seed=9), "--no-vectors")
    train_store(trained, "--update")
    icm_quietly(trained, "evict", "extra", "--max-error", "1.5")
    assert icm("copy", trained, other, "--json").document["copied"] == ["extra"]
    assert current(other).blob == current(trained).blob


def test_a_code_goes_with_its_generator_where_another_is_in_use(
    icm: Icm, trained: Path, other: Path, tmp_path: Path
) -> None:
    icm("copy", trained, other, "silent")
    train_store(other, "--fresh", "--seed", "5")
    used = current(other)
    icm_quietly(trained, "evict", "poems", "--max-error", "0.9")
    assert icm("copy", trained, other, "--json").document["copied"] == ["poems", "rules"]
    assert current(other).blob == used.blob
    assert codes(other).keys() == {"silent"}
    for store, folder in ((trained, "before"), (other, "after")):
        icm_quietly(store, "materialize", "poems", "-o", tmp_path / folder)
    assert content(tmp_path / "after") == content(tmp_path / "before")
    assert is_whole(icm, other)


def test_a_damaged_file_leaves_its_task_out(icm: Icm, trained: Path, other: Path) -> None:
    with Store.open(trained) as store:
        damage(trained, store.task("rules").final.weights)
    ran = icm("copy", trained, other, "--json")
    assert (ran.code, ran.document["copied"]) == (ExitCode.PARTLY, ["poems", "silent"])
    assert "is damaged" in ran.document["refused"]["rules"]
    assert is_whole(icm, other)


def test_another_model_of_the_same_name_is_noticed(icm: Icm, trained: Path, other: Path) -> None:
    icm("copy", trained, other, "poems")
    with Store.open(other) as store:
        store.update_base(LABEL, lambda base: replace(base, fingerprint="another"))
    ran = icm("copy", trained, other, "--json")
    assert ran.code == ExitCode.PARTLY
    assert set(ran.document["refused"].values()) == {f"the target store uses the name {LABEL!r} for another model"}


def test_a_store_is_not_copied_to_itself(icm: Icm, trained: Path) -> None:
    ran = icm("copy", trained, trained)
    assert ran.code != 0
    assert "is both source and target" in ran.err


def test_a_context_that_came_later_goes_too_and_one_that_is_there_stays(
    icm: Icm, trained: Path, other: Path, tmp_path: Path
) -> None:
    icm("copy", trained, other)
    icm_quietly(trained, "context", "poems", "--samples", lines_of(tmp_path, "geese"), "--device", "cpu")
    assert icm("copy", trained, other, "--json").document["completed"] == ["poems"]
    kept = Fleet(other).task_context("poems")
    assert kept is not None
    assert kept == Fleet(trained).task_context("poems")
    icm_quietly(trained, "context", "poems", "--samples", lines_of(tmp_path, "swans"), "--device", "cpu")
    assert "poems" in icm("copy", trained, other, "--json").document["known"]
    assert Fleet(other).task_context("poems") == kept
    assert is_whole(icm, other)


def lines_of(folder: Path, subject: str) -> Path:
    path = folder / f"{subject}.jsonl"
    path.write_text("".join(f'{{"text": "grey {subject} number {number}"}}\n' for number in range(9)))
    return path


@pytest.mark.one_case
@pytest.mark.parametrize("use", ["manifests", "codes", "generators", "originals", "vectors"])
def test_a_copy_restores_what_the_second_store_has_lost(icm: Icm, trained: Path, other: Path, use: str) -> None:
    icm("copy", trained, other)
    with Store.open(other) as opened:
        body = unpacked(opened.manifests.read(str(opened.task("poems").manifest)))
        opened.blobs.delete([str(file) for kind, file in files_of(body) if kind == use])
    assert not is_whole(icm, other)
    assert icm("copy", trained, other).code == 0
    assert is_whole(icm, other)
