"""Copies of the base model's tensors in an adapter: a few bytes in the store, and bit for bit when they are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmlora import BaseModelNotFound, Bundle, Fleet
from icmlora.errors import BaseModelMismatch
from registry.manifests import Extra
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.kept_tasks import WEIGHTS
from tests.icmlora.fleet.stores import but_card, copy_of, is_sound
from tests.icmlora.tiny_base import LABEL, write_tiny_base

COPY = "base_model.model.model.embed_tokens.base_layer.weight"
TIED = "base_model.model.lm_head.weight"


def write_copies(folder: Path, base: Path, *, seed: int = 3, change: float = 0, name: str = COPY) -> Path:
    """Write an adapter with copies of the base model's embedding, as PEFT's `save_embedding_layers` does."""
    write_lora(folder, seed=seed)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    changed = embedding.clone()
    changed[0, 0] += change
    save_file(load_file(folder / WEIGHTS) | {name: changed}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters and a trained store; not to be changed."""
    folder = tmp_path_factory.mktemp("copies")
    shutil.copytree(mixed_template / "store", folder / "store")
    shutil.copytree(mixed_template / "base", folder / "base")
    write_copies(folder / "in" / "copies", folder / "base")
    write_copies(folder / "in" / "tied", folder / "base", seed=4, name=TIED)
    write_copies(folder / "in" / "changed", folder / "base", seed=5, change=0.5)
    fleet = Fleet(folder / "store")
    fleet.add_base_model(LABEL, folder / "base")
    fleet.ingest([folder / "in"])
    fleet.train(device="cpu", steps=5, refine=0, evaluate=False)
    return folder


@pytest.fixture
def base(template: Path, tmp_path: Path) -> Path:
    """A copy of the base model, to be changed."""
    return Path(shutil.copytree(template / "base", tmp_path / "base"))


@pytest.fixture
def fleet(template: Path, base: Path, tmp_path: Path) -> Fleet:
    """A copy of the trained fleet, with its own base model."""
    fleet = copy_of(template / "store", tmp_path / "store")
    fleet.add_base_model(LABEL, base)
    return fleet


@pytest.fixture
def given(template: Path) -> Path:
    """The adapters as they were ingested, not to be changed."""
    return template / "in"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where an adapter is written."""
    return tmp_path / "out"


def extra_of(fleet: Fleet, task: str) -> Extra:
    (extra,) = fleet.show(task).task.final.extras
    return extra


def copied(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / WEIGHTS)[name]


def replace_base(base: Path) -> None:
    """Put another model of the same shape in its place."""
    shutil.rmtree(base)
    write_tiny_base(base, seed=9)


@pytest.mark.parametrize(("task", "name"), [("copies", COPY), ("tied", TIED)])
def test_an_equal_tensor_takes_a_few_bytes_and_comes_back_bit_for_bit(
    fleet: Fleet, given: Path, out: Path, task: str, name: str
) -> None:
    extra = extra_of(fleet, task)
    assert extra.packed_size < 300 < extra.size == copied(given / task, name).nbytes
    fleet.materialize(task, out, source="code")
    assert torch.equal(copied(out, name), copied(given / task, name))


def test_the_bill_counts_the_few_bytes(fleet: Fleet) -> None:
    (of_base,) = fleet.stats().fleets
    rows = {task.row.name: task.row for task in of_base.tasks}
    assert rows["copies"].extras_bytes == extra_of(fleet, "copies").packed_size


def test_a_tensor_that_training_changed_is_stored_whole(fleet: Fleet, given: Path, base: Path, out: Path) -> None:
    extra = extra_of(fleet, "changed")
    assert extra.packed_size > extra.size // 2
    shutil.rmtree(base)
    fleet.materialize("changed", out, source="code")
    assert torch.equal(copied(out, COPY), copied(given / "changed", COPY))


def test_without_the_base_model_everything_is_stored_whole(given: Path, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "store")
    fleet.ingest([given / "copies"])
    extra = extra_of(fleet, "copies")
    assert extra.packed_size > extra.size // 2


def test_a_damaged_base_model_does_not_stop_an_ingest(given: Path, base: Path, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "store")
    fleet.add_base_model(LABEL, base)
    (base / "model.safetensors").write_bytes(b"cut short")
    extracted = fleet.ingest([given / "copies"]).vectors
    extra = extra_of(fleet, "copies")
    assert extra.packed_size > extra.size // 2
    assert extracted is not None
    assert [(left_out.base_model, list(left_out.tasks)) for left_out in extracted.skipped] == [(LABEL, ["copies"])]


def test_the_original_needs_no_base_model(fleet: Fleet, given: Path, base: Path, out: Path) -> None:
    shutil.rmtree(base)
    fleet.materialize("copies", out, source="original")
    assert (out / WEIGHTS).read_bytes() == (given / "copies" / WEIGHTS).read_bytes()


def test_a_missing_base_model_is_named_with_the_way_out(fleet: Fleet, base: Path, out: Path) -> None:
    shutil.rmtree(base)
    with pytest.raises(BaseModelNotFound, match=f"the adapter needs tensors from its base model.*{LABEL}") as caught:
        fleet.materialize("copies", out, source="code")
    assert f"icm base add {LABEL}" in str(caught.value.hint)
    assert not out.exists()


def test_another_base_model_under_the_name_is_found_by_the_digest(fleet: Fleet, base: Path, out: Path) -> None:
    replace_base(base)
    with pytest.raises(BaseModelMismatch, match="tensor model") as caught:
        fleet.materialize("copies", out, source="code")
    assert LABEL in caught.value.message
    assert "icm base add" in str(caught.value.hint)
    assert not out.exists()


@pytest.mark.one_case
@pytest.mark.parametrize("spoil", [shutil.rmtree, replace_base])
def test_an_original_whose_tensors_cannot_be_given_back_is_not_evicted(fleet: Fleet, base: Path, spoil: object) -> None:
    assert callable(spoil)
    spoil(base)
    report = fleet.evict(["changed", "copies"], max_error=100)
    done = {task.task: task for task in report.done}
    assert {name: task.status for name, task in done.items()} == {"changed": "evicted", "copies": "kept"}
    assert "base model" in str(done["copies"].reason)
    assert report.is_partial
    assert not fleet.show("copies").task.final.is_evicted


def test_after_eviction_the_tensors_still_come_back(fleet: Fleet, given: Path, out: Path) -> None:
    (done,) = fleet.evict(["copies"], max_error=100).done
    assert done.status == "evicted"
    fleet.prune(grace=0)
    assert fleet.materialize("copies", out).source == "code"
    assert torch.equal(copied(out, COPY), copied(given / "copies", COPY))


def test_verify_names_the_adapters_whose_base_model_has_changed(fleet: Fleet, base: Path) -> None:
    assert [finding for finding in fleet.verify(read_data=True) if finding.kind == "remark"] == []
    replace_base(base)
    remarks = [finding for finding in fleet.verify(read_data=True) if finding.kind == "remark"]
    assert [remark.tasks for remark in remarks] == [("copies",), ("tied",)]
    assert all("model.embed_tokens.weight" in remark.message for remark in remarks)
    shutil.rmtree(base)
    assert is_sound(fleet)
    assert [finding for finding in fleet.verify(read_data=True) if finding.kind == "remark"] == []


def test_a_restored_original_keeps_its_few_bytes(fleet: Fleet, given: Path, base: Path) -> None:
    before = extra_of(fleet, "copies")
    fleet.evict(["copies"], max_error=100)
    shutil.rmtree(base)
    assert fleet.ingest([given / "copies"], restore=True).restored == 1
    assert extra_of(fleet, "copies") == before


def test_an_imported_task_finds_the_tensors_in_the_base_model(
    fleet: Fleet, given: Path, base: Path, tmp_path: Path
) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm")
    fleet.materialize("copies", tmp_path / "here", source="code")
    other = Fleet(tmp_path / "other")
    other.import_bundle(tmp_path / "fleet.icm")
    other.add_base_model(LABEL, base)
    other.materialize("copies", tmp_path / "there")
    assert but_card(tmp_path / "there") == but_card(tmp_path / "here")


def test_a_bundle_says_how_to_give_it_the_base_model(fleet: Fleet, tmp_path: Path, out: Path) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm")
    bundle = Bundle(tmp_path / "fleet.icm")
    bundle.materialize("changed", tmp_path / "changed")
    with pytest.raises(BaseModelNotFound, match=LABEL) as caught:
        bundle.materialize("copies", out)
    assert "icm import" in str(caught.value.hint)
    assert not out.exists()
