"""`icm copy`: tasks go from store to store, with everything that belongs to them."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icmlora.errors import Cancelled
from icmlora.fleet.api import Fleet
from icmlora.fleet.context import Event, Progress
from registry.store import Store
from tests.cli.coded import codes, damage
from tests.cli.conftest import Ran
from tests.cli.test_materialize import content
from tests.cli.tiny_fleet import icm_quietly, train_store, write_lora
from tests.icmlora.tiny_base import LABEL
from tests.registry.every_row import BASE, everything, fill

Icm = Callable[..., Ran]
TASKS = ["poems", "rules", "silent"]
NUMBERS = {"id", "adapter_id", "generator_id", "parent_id"}
"""What each store counts by itself."""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Where a second store is to be."""
    return tmp_path / "other"


def said(store: Path) -> Any:
    """Return all that a store says of its rows, without their numbers."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {
                field.name: plain(getattr(value, field.name)) for field in fields(value) if field.name not in NUMBERS
            }
        if isinstance(value, Mapping):
            return {plain(name): plain(one) for name, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    with Store.open(store, read_only=True) as opened:
        return plain(everything(opened))


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


def test_rows_of_every_kind_go(icm: Icm, other: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", create=True) as store:
        fill(store)
        run = store.runs.running(BASE)
        assert run is not None
    assert icm("copy", tmp_path / "store", other, "--json").document["refused"] == {}
    first, second = said(tmp_path / "store"), said(other)
    assert second == {**first, "runs": [None, None]}  # what is being trained stays where it is


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
        weights = store.tasks.final("poems").weights
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
    assert ran.document["refused"]["poems"] == "the target store already has a task 'poems' with a different adapter"
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


def test_a_generator_that_has_all_codes_of_the_one_in_use_takes_its_place(
    icm: Icm, trained: Path, other: Path, tmp_path: Path, tuned_wins: None
) -> None:
    icm("copy", trained, other)
    icm_quietly(trained, "ingest", write_lora(tmp_path / "extra", seed=9), "--no-vectors")
    train_store(trained, "--update")
    icm_quietly(trained, "evict", "extra", "--max-error", "1.5")
    assert icm("copy", trained, other, "--json").document["copied"] == ["extra"]
    assert codes(other).keys() == {"extra", *TASKS}
    assert said(other) == said(trained)


def test_a_last_copy_is_refused_where_another_generator_is_in_use(icm: Icm, trained: Path, other: Path) -> None:
    icm("copy", trained, other, "silent")
    train_store(other, "--fresh", "--seed", "5")
    icm_quietly(trained, "evict", "poems", "--max-error", "0.9")
    ran = icm("copy", trained, other, "--json")
    assert ran.code == ExitCode.PARTLY
    assert "is the only copy, and the target store uses another generator" in ran.document["refused"]["poems"]
    assert ran.document["copied"] == ["rules"]
    assert codes(other).keys() == {"silent"}


def test_a_damaged_file_leaves_its_task_out(icm: Icm, trained: Path, other: Path) -> None:
    with Store.open(trained) as store:
        damage(trained, store.tasks.final("rules").weights)
    ran = icm("copy", trained, other, "--json")
    assert (ran.code, ran.document["copied"]) == (ExitCode.PARTLY, ["poems", "silent"])
    assert "is damaged" in ran.document["refused"]["rules"]
    assert is_whole(icm, other)


def test_another_model_of_the_same_name_is_noticed(icm: Icm, trained: Path, other: Path) -> None:
    icm("copy", trained, other, "poems")
    with Store.open(other) as store:
        store.base_models.set_facts(LABEL, fingerprint="another", shape={})
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
