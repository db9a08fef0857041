"""Adapters that are more than a LoRA, and adapters without a code, through the life of a fleet."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from icmlora import AdapterRefused, Bundle, DataError, Fleet, UnsafeInput, load_adapter
from icmlora.adapter.metrics import squared_error
from icmlora.io.safetensors import RawTensor, read_header
from registry.manifests import Task
from registry.store import Store
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.bundles import Opened, forge
from tests.icmlora.fleet.kept_tasks import BIAS, CONFIG, FILES, HEAD, NORM, WEIGHTS, write_headed, write_kept
from tests.icmlora.fleet.stores import blob_of, but_card, copy_of, damage, files_of, is_sound
from tests.icmlora.tiny_base import LABEL

WITHOUT_CODE = ["diverged", "loha"]


@pytest.fixture(scope="module")
def template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters and a trained store of these and the mixed fleet; not to be changed."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(mixed_template / "store", folder / "store")
    fleet = Fleet(folder / "store")
    fleet.ingest([write_kept(folder / "kept")])
    fleet.train(device="cpu", steps=12, refine=0, evaluate=False)
    return folder


@pytest.fixture
def kept(template: Path) -> Path:
    """The adapters as they were ingested, not to be changed."""
    return template / "kept"


@pytest.fixture
def fleet(template: Path, tmp_path: Path) -> Fleet:
    """A copy of the trained fleet."""
    return copy_of(template / "store", tmp_path / "store")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where an adapter is written."""
    return tmp_path / "out"


def extras_of(folder: Path) -> dict[str, RawTensor]:
    """Return the tensors of a folder that are not factors, bit for bit."""
    data = (folder / WEIGHTS).read_bytes()
    return {
        info.name: RawTensor(info.dtype, info.shape, data[info.begin : info.end])
        for info in read_header(data).tensors
        if ".lora_A.weight" not in info.name and ".lora_B.weight" not in info.name
    }


def form_of(folder: Path) -> tuple[object, ...]:
    """Return everything of the tensor file except the values."""
    header = read_header((folder / WEIGHTS).read_bytes())
    return {info.name: (info.dtype, info.shape) for info in header.tensors}, header.metadata


def task_of(fleet: Fleet, name: str) -> Task:
    return fleet.show(name).task


def test_a_code_with_extras_has_the_form_of_the_original_and_each_extra_bit_for_bit(
    fleet: Fleet, kept: Path, out: Path
) -> None:
    report = fleet.materialize("headed", out, source="code")
    assert report.source == "code"
    assert form_of(out) == form_of(kept / "headed")
    assert extras_of(out) == extras_of(kept / "headed")
    assert extras_of(out).keys() == {HEAD, BIAS, NORM}
    assert (out / CONFIG).read_bytes() == (kept / "headed" / CONFIG).read_bytes()
    assert (out / WEIGHTS).stat().st_size <= (kept / "headed" / WEIGHTS).stat().st_size
    assert {name: (out / name).read_bytes() for name in FILES} == FILES


def test_the_error_of_such_a_code_is_the_one_that_is_reported(fleet: Fleet, kept: Path, out: Path) -> None:
    report = fleet.materialize("headed", out, source="code", dtype="float32")
    error = squared_error(load_adapter(kept / "headed"), load_adapter(out))
    assert report.squared_error == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.5


def test_another_number_format_leaves_the_extras(fleet: Fleet, kept: Path, out: Path) -> None:
    fleet.materialize("headed", out, source="code", dtype="float32")
    assert extras_of(out) == extras_of(kept / "headed")
    assert {str(tensor.dtype) for name, tensor in load_file(out / WEIGHTS).items() if ".lora_A.weight" in name} == {
        "torch.float32"
    }


def test_extras_have_no_place_in_a_padded_adapter(fleet: Fleet, out: Path) -> None:
    with pytest.raises(AdapterRefused, match="cannot be written"):
        fleet.materialize("headed", out, source="code", pad_rank=8)
    assert not out.exists()


def test_a_plain_adapter_is_padded_only_if_that_is_asked_for(fleet: Fleet, loras: Path, tmp_path: Path) -> None:
    fleet.materialize("poems", tmp_path / "own", source="code")
    fleet.materialize("poems", tmp_path / "padded", source="code", pad_rank=16)
    assert form_of(tmp_path / "own") == form_of(loras / "poems")
    assert (tmp_path / "own" / CONFIG).read_bytes() == (loras / "poems" / CONFIG).read_bytes()
    fields = json.loads((tmp_path / "padded" / CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"]) == (16, 16)
    ranks = {tensor.shape[0] for name, tensor in load_file(tmp_path / "padded" / WEIGHTS).items() if "lora_A" in name}
    assert ranks == {16}


def test_a_padded_adapter_says_where_it_comes_from(fleet: Fleet, out: Path) -> None:
    report = fleet.materialize("poems", out, source="code", pad_rank=8)
    with safe_open(out / WEIGHTS, framework="pt") as file:
        assert report.generator in file.metadata().values()


@pytest.mark.parametrize("task", ["headed", "loha", "diverged"])
def test_an_original_comes_back_byte_for_byte_with_the_files_next_to_it(
    fleet: Fleet, kept: Path, out: Path, task: str
) -> None:
    report = fleet.materialize(task, out)
    given, written = files_of(kept / task), files_of(out)
    assert report.source == "original"
    assert written.keys() - given.keys() <= {"README.md"}
    assert {name: written[name] for name in given} == given


def test_equal_heads_and_files_are_stored_once(fleet: Fleet) -> None:
    headed, twin = (task_of(fleet, name).final for name in ("headed", "twin"))
    shared = {extra.blob for extra in headed.extras} & {extra.blob for extra in twin.extras}
    names = {extra.file for extra in headed.extras if extra.blob in shared}
    assert names == {None, *FILES}
    assert len(headed.extras) == 5  # files, the head, and what is narrower


def test_the_bill_counts_extras_once_and_with_the_code(fleet: Fleet) -> None:
    bill = fleet.stats()
    (of_base,) = bill.fleets
    headed, twin = (next(task for task in of_base.tasks if task.row.name == name) for name in ("headed", "twin"))
    assert headed.row.extras_bytes == task_of(fleet, "headed").final.extras_bytes > 0
    assert of_base.extras_bytes < headed.row.extras_bytes + twin.row.extras_bytes
    assert bill.usage.extras == of_base.extras_bytes
    assert headed.size == headed.codes_and_vectors_size + headed.row.extras_bytes


@pytest.mark.slow
def test_a_fleet_is_complete_if_every_task_has_a_code_that_can_have_one(fleet: Fleet) -> None:
    bill = fleet.stats()
    assert (bill.is_complete, bill.original_only) == (True, len(WITHOUT_CODE))
    originals = sum(task.row.stored_bytes for task in bill.each if not task.row.is_coded)
    usage = bill.usage
    coded = usage.generators + usage.codes + usage.vectors + usage.extras + usage.manifests + usage.database
    assert bill.compact_size == coded + originals


def test_a_list_says_why_there_is_no_code(fleet: Fleet) -> None:
    reasons = {row.name: row.original_only for row in fleet.tasks()}
    assert reasons["loha"] == "peft_type is 'LOHA', not LORA"
    assert "holds NaN at [0, 0]" in reasons["diverged"]
    assert [name for name, reason in reasons.items() if reason is not None] == WITHOUT_CODE
    assert task_of(fleet, "diverged").final.does_nothing


@pytest.mark.slow
def test_training_leaves_out_what_has_no_code_and_says_why(fleet: Fleet) -> None:
    (trained,) = fleet.train(device="cpu", steps=2, fresh=True, refine=0, evaluate=False).trained
    assert sorted(trained.left_out) == WITHOUT_CODE
    assert "LOHA" in trained.left_out["loha"]
    assert task_of(fleet, "headed").code is not None


@pytest.mark.parametrize("task", WITHOUT_CODE)
@pytest.mark.parametrize("source", ["code", "recalled"])
def test_what_has_no_code_is_written_from_its_original_only(fleet: Fleet, out: Path, task: str, source: str) -> None:
    with pytest.raises(DataError, match="only its original") as caught:
        fleet.materialize(task, out, source=source)  # type: ignore[arg-type]
    assert "--source original" in (caught.value.hint or "")
    assert not out.exists()


@pytest.mark.parametrize("task", WITHOUT_CODE)
def test_what_has_no_code_is_not_loaded_as_a_lora(fleet: Fleet, task: str) -> None:
    with pytest.raises(AdapterRefused, match="only its original"):
        fleet.load(task)


@pytest.mark.slow
def test_what_has_no_code_is_never_evicted(fleet: Fleet, kept: Path, out: Path) -> None:
    report = fleet.evict(max_error=1.0)
    assert ([task.task for task in report.done if task.status == "original_only"], report.kept, report.is_partial) == (
        WITHOUT_CODE,
        [],
        False,
    )
    assert all(task.reason for task in report.done if task.status == "original_only")
    assert fleet.evict(["loha"], max_error=1.0).is_partial
    assert {task.task for task in report.gone} >= {"headed", "twin", "poems"}
    fleet.materialize("loha", out)
    assert (out / WEIGHTS).read_bytes() == (kept / "loha" / WEIGHTS).read_bytes()
    assert is_sound(fleet)


@pytest.mark.slow
def test_a_checkpoint_without_a_code_is_never_evicted(fleet: Fleet, kept: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "run", seed=40)
    shutil.copytree(kept / "diverged", tmp_path / "run" / "checkpoint-10")
    fleet.ingest([tmp_path / "run"])
    fleet.update(device="cpu", refine=0, evaluate=False)
    (done,) = fleet.evict(["run"], max_error=1.0).done
    assert (done.status, done.adapters) == ("evicted", 1)
    checkpoint, final = fleet.show("run").task.adapters
    assert (checkpoint.is_evicted, final.is_evicted) == (False, True)
    assert is_sound(fleet)


def test_after_eviction_the_extras_are_still_bit_for_bit(fleet: Fleet, kept: Path, out: Path) -> None:
    fleet.evict(["headed", "twin"], max_error=1.0)
    assert fleet.materialize("headed", out).source == "code"
    assert extras_of(out) == extras_of(kept / "headed")
    assert {name: (out / name).read_bytes() for name in FILES} == FILES
    fleet.prune()
    assert is_sound(fleet)


@pytest.mark.slow
def test_an_evicted_original_with_extras_is_restored(fleet: Fleet, kept: Path, out: Path) -> None:
    fleet.evict(["headed"], max_error=1.0)
    before = task_of(fleet, "headed").final.extras
    report = fleet.ingest([kept / "headed"])
    assert task_of(fleet, "headed").final.is_evicted
    report = fleet.ingest([kept / "headed"], restore=True)
    assert report.restored == 1
    assert task_of(fleet, "headed").final.extras == before
    fleet.materialize("headed", out)
    assert (out / WEIGHTS).read_bytes() == (kept / "headed" / WEIGHTS).read_bytes()


def test_the_same_adapters_again_change_nothing(fleet: Fleet, kept: Path) -> None:
    with Store.open(fleet.path) as store:
        before = sorted(blob.digest for blob in store.blobs.all())
    report = fleet.ingest([kept])
    assert (report.new, report.known) == (0, 4)
    with Store.open(fleet.path) as store:
        assert sorted(blob.digest for blob in store.blobs.all()) == before


def test_the_files_next_to_a_known_adapter_are_not_read_again(fleet: Fleet, kept: Path, tmp_path: Path) -> None:
    again = shutil.copytree(kept, tmp_path / "kept")
    os.truncate(again / "headed" / "tokenizer.json", 1 << 30)  # too large to be taken, if it were new
    report = fleet.ingest([again])
    assert (report.new, report.known, report.problems) == (0, 4, [])


def test_an_extra_that_the_store_lost_comes_back_with_the_same_adapter(fleet: Fleet, kept: Path) -> None:
    lost = [blob_of(fleet, extra.blob) for extra in task_of(fleet, "headed").final.extras]
    before = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    fleet.ingest([kept])
    assert [path.read_bytes() for path in lost] == before


def test_a_dry_run_reads_extras_and_stores_nothing(kept: Path, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "new")
    report = fleet.ingest([kept], dry_run=True)
    assert sorted(task.task for task in report.done) == ["diverged", "headed", "loha", "twin"]
    assert not (tmp_path / "new").exists()


def test_removing_tasks_frees_their_extras_but_not_those_of_others(fleet: Fleet) -> None:
    headed, twin = (task_of(fleet, name).final for name in ("headed", "twin"))
    fleet.remove(["headed"])
    fleet.prune(grace=0)
    with Store.open(fleet.path) as store:
        assert all(store.blobs.exists(extra.blob) for extra in twin.extras)
        others = {extra.blob for extra in headed.extras} - {extra.blob for extra in twin.extras}
        assert others
        assert not any(store.blobs.exists(blob) for blob in others)
    assert is_sound(fleet)


def test_a_damaged_extra_is_found_and_nothing_is_written(fleet: Fleet, out: Path) -> None:
    extra = next(extra for extra in task_of(fleet, "headed").final.extras if extra.file is None)
    damage(blob_of(fleet, extra.blob))
    assert not is_sound(fleet)
    with pytest.raises(Exception, match=extra.blob[:8]):
        fleet.materialize("headed", out, source="code")
    assert not out.exists()


@pytest.fixture
def bundle(fleet: Fleet, tmp_path: Path) -> Path:
    """All codes of the fleet as one file."""
    fleet.export_bundle(tmp_path / "fleet.icm")
    return tmp_path / "fleet.icm"


def test_a_bundle_leaves_out_what_has_no_code(fleet: Fleet, tmp_path: Path) -> None:
    report = fleet.export_bundle(tmp_path / "fleet.icm")
    assert list(report.left_out) == WITHOUT_CODE
    assert {task.name for task in Bundle(tmp_path / "fleet.icm").tasks} == {
        *("headed", "poems", "rules", "silent", "twin")
    }


@pytest.mark.parametrize("task", ["headed", "poems"])
def test_a_bundle_writes_the_bytes_that_the_store_writes(fleet: Fleet, bundle: Path, tmp_path: Path, task: str) -> None:
    fleet.materialize(task, tmp_path / "store-out", source="code")
    Bundle(bundle).materialize(task, tmp_path / "bundle-out")
    assert but_card(tmp_path / "bundle-out") == but_card(tmp_path / "store-out")


@pytest.mark.slow
def test_an_imported_task_writes_the_same_bytes(fleet: Fleet, bundle: Path, tmp_path: Path) -> None:
    other = Fleet(tmp_path / "other")
    other.import_bundle(bundle)
    fleet.materialize("headed", tmp_path / "here", source="code")
    other.materialize("headed", tmp_path / "there")
    assert but_card(tmp_path / "there") == but_card(tmp_path / "here")
    assert task_of(other, "headed").final.extras_bytes == task_of(fleet, "headed").final.extras_bytes
    assert is_sound(other)


def test_a_bundle_can_be_handed_on_with_its_extras(bundle: Path, tmp_path: Path) -> None:
    other = Fleet(tmp_path / "other")
    other.import_bundle(bundle)
    other.export_bundle(tmp_path / "again.icm")
    first, again = Bundle(bundle), Bundle(tmp_path / "again.icm")
    assert [task.final.extras for task in again.tasks] == [task.final.extras for task in first.tasks]
    assert [task.final.template for task in again.tasks] == [task.final.template for task in first.tasks]


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin", "README.md", "icm-placeholder.json", "code.py"])
def test_a_bundle_brings_no_file_that_does_not_come_with_an_adapter(bundle: Path, tmp_path: Path, name: str) -> None:
    def rename(opened: Opened) -> None:
        for extra in (extra for task in opened.tasks for extra in task["final"].get("extras", ())):
            extra |= {"file": name} if extra.get("file") in FILES else {}

    forge(bundle, rename)
    with pytest.raises(UnsafeInput, match=f"'{name}' is not a file of an adapter"):
        Bundle(bundle).materialize("headed", tmp_path / "out")
    with pytest.raises(UnsafeInput, match="the format peft"):
        Fleet(tmp_path / "other").import_bundle(bundle)
    assert not {"out", "other"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_original_of_an_imported_task_can_be_ingested(bundle: Path, kept: Path, tmp_path: Path) -> None:
    other = Fleet(tmp_path / "other")
    other.import_bundle(bundle)
    report = other.ingest([kept / "headed"], restore=True)
    assert report.restored == 1
    other.materialize("headed", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (kept / "headed" / WEIGHTS).read_bytes()
    assert is_sound(other)


def test_a_companion_that_is_a_link_out_of_the_tree_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    folder = write_headed(tmp_path / "in" / "sly", files=False)
    (folder / "tokenizer.json").symlink_to(secret)
    fleet = Fleet(tmp_path / "store")
    try:
        fleet.ingest([tmp_path / "in"])
    except DataError:
        return
    assert not any(b"secret" in data for data in files_of(fleet.path).values())
    assert hashlib.sha256(b"secret").hexdigest() not in {Path(name).name for name in files_of(fleet.path)}


def test_an_adapter_without_a_base_model_is_kept_and_says_what_is_missing(tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "nameless", base_model_name_or_path=None)
    fleet = Fleet(tmp_path / "store")
    fleet.ingest([tmp_path / "in"])
    task = task_of(fleet, "nameless")
    assert task.base_model == "unknown"
    assert "--base-model" in (task.not_encodable or "")


@pytest.mark.slow
def test_base_models_without_a_task_that_can_have_a_code_do_not_stop_training(fleet: Fleet, tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "nameless", base_model_name_or_path=None)
    fleet.ingest([tmp_path / "in"])
    assert [
        trained.base_model
        for trained in fleet.train(device="cpu", steps=2, fresh=True, refine=0, evaluate=False).trained
    ] == [LABEL]
    assert [updated.base_model for updated in fleet.update(device="cpu", refine=0, evaluate=False).updated] == [LABEL]
