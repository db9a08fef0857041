"""`Fleet.restore`: adapters come back where placeholders are, exactly or from codes, and nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from icmlora import Cancelled, DataError, Fleet, IcmError, OutputExists, StoreNotFound, load_adapter
from icmlora.fleet.evict.restore import AdapterRestored, RestoreReport
from icmlora.formats import catalogue
from icmlora.formats.discovery.placeholder import PLACEHOLDER_NAME, placeholder_to_json, read_placeholder
from icmlora.formats.peft.peft import PEFT
from icmlora.generator.codec.codec import Codec
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import blob_of, damage, equal, files_of, stop_after
from tests.icmlora.formats.toy_format import ToyFormat

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def keep(fleet: Fleet, *tasks: str) -> None:
    """Leave placeholders while the store keeps the originals."""
    fleet.evict(tasks, placeholder=True, keep_originals=True)


def lose(fleet: Fleet, *tasks: str) -> None:
    """Leave placeholders and evict the originals."""
    fleet.evict(tasks, placeholder=True, max_error=0.7)


def by_name(report: RestoreReport) -> dict[str, AdapterRestored]:
    return {Path(adapter.path).name: adapter for adapter in [*report.done, *report.refused]}


def test_kept_originals_come_back_byte_for_byte(fleet: Fleet, own_loras: Path) -> None:
    before = files_of(own_loras)
    keep(fleet)
    report = fleet.restore([own_loras])
    assert files_of(own_loras) == before
    assert {(adapter.status, adapter.source) for adapter in report.done} == {("restored", "original")}
    assert len(report.done) == 5
    assert report.size == sum(len(before[f"{folder}/{name}"]) for folder in
                              ("poems", "poems/checkpoint-10", "poems/checkpoint-20", "rules", "silent")
                              for name in (CONFIG, WEIGHTS))  # fmt: skip


def test_without_the_original_the_code_is_decoded_in_its_form(fleet: Fleet, own_loras: Path) -> None:
    config = (own_loras / "rules" / CONFIG).read_bytes()
    decoded = fleet.load("rules", source="code")
    lose(fleet, "rules")
    (done,) = fleet.restore([own_loras]).done
    code = fleet.show("rules").task.code
    assert code is not None
    assert (done.status, done.source, done.squared_error) == ("restored", "code", code.squared_error)
    assert (own_loras / "rules" / CONFIG).read_bytes() == config
    assert equal(load_adapter(own_loras / "rules"), decoded)
    assert not (own_loras / "rules" / PLACEHOLDER_NAME).exists()


def test_what_comes_from_a_code_is_what_materialize_writes(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    lose(fleet, "rules")
    fleet.restore([own_loras])
    fleet.materialize("rules", tmp_path / "out")
    for name in (CONFIG, WEIGHTS):
        assert (own_loras / "rules" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
def test_a_measured_gain_is_reported(learned: Fleet, learned_template: Path, tmp_path: Path) -> None:
    learned.evict(["apples"], min_gain=0.5, device="cpu")
    with_gain = learned.show("apples").task
    folder = tmp_path / "apples"
    folder.mkdir()
    shutil.copy(learned_template / "loras" / "apples" / CONFIG, folder / CONFIG)
    assert with_gain.code is not None
    placed = placeholder_of(with_gain.final.weights, with_gain.final.config, "apples")
    (folder / CONFIG).unlink()
    (folder / PLACEHOLDER_NAME).write_bytes(placed)
    (done,) = learned.restore([folder]).done
    assert done.retained_gain is not None
    assert done.retained_gain >= 0.5


def placeholder_of(weights: str, config: str, task: str, **changes: Any) -> bytes:
    """Return a placeholder as somebody else may have written it."""
    files = [
        {"name": CONFIG, "part": "config", "sha256": config, "size": 1},
        {"name": WEIGHTS, "part": "weights", "sha256": weights, "size": 1},
    ]
    adapter = {"config": config, "final": True, "format": "peft", "weights": weights}
    value = {
        "about": "?", "adapter": adapter, "code": None, "files": files, "icm_placeholder": 2, "store": "/elsewhere",
        "task": task,
    }  # fmt: skip
    return json.dumps(value | changes).encode()


def test_a_dry_run_says_the_same_and_writes_nothing(fleet: Fleet, own_loras: Path) -> None:
    keep(fleet, "poems")
    lose(fleet, "rules")
    before = files_of(own_loras)
    planned = by_name(fleet.restore([own_loras], dry_run=True))
    assert files_of(own_loras) == before
    assert {adapter.status for adapter in planned.values()} == {"would_restore"}
    done = by_name(fleet.restore([own_loras]))
    for name, adapter in planned.items():
        assert (adapter.source, adapter.size, adapter.weights) == (
            done[name].source,
            done[name].size,
            done[name].weights,
        )


def test_a_task_with_another_name_by_now_is_found_by_its_digests(fleet: Fleet, own_loras: Path) -> None:
    keep(fleet, "rules")
    fleet.edit(["rules"], name="law")
    (done,) = fleet.restore([own_loras]).done
    assert (done.status, done.source) == ("restored", "original")


def test_the_original_of_another_task_with_the_same_bytes_is_better_than_a_code(fleet: Fleet, own_loras: Path) -> None:
    fleet.ingest([own_loras / "silent"], name="twin")
    before = files_of(own_loras / "silent")
    lose(fleet, "silent")
    (done,) = fleet.restore([own_loras]).done
    assert (done.source, files_of(own_loras / "silent")) == ("original", before)


def test_a_folder_may_have_moved(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    before = files_of(own_loras / "rules")
    keep(fleet, "rules")
    shutil.move(own_loras / "rules", tmp_path / "moved")
    fleet.restore([tmp_path / "moved"])
    assert files_of(tmp_path / "moved") == before


@pytest.mark.slow
def test_a_placeholder_may_be_given_itself(fleet: Fleet, own_loras: Path) -> None:
    keep(fleet, "rules", "silent")
    report = fleet.restore([own_loras / "rules" / PLACEHOLDER_NAME])
    assert list(by_name(report)) == ["rules"]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_there_is_never_overwritten(fleet: Fleet, own_loras: Path, name: str) -> None:
    keep(fleet, "rules", "silent")
    (own_loras / "rules" / name).write_bytes(b"new work")
    before = files_of(own_loras / "rules")
    report = fleet.restore([own_loras])
    refused = by_name(report)["rules"]
    assert (refused.status, refused.kind, name in str(refused.reason)) == ("refused", "output_exists", True)
    assert files_of(own_loras / "rules") == before
    assert by_name(report)["silent"].status == "restored"


def test_a_link_in_the_place_of_a_file_is_never_followed(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    keep(fleet, "rules")
    (own_loras / "rules" / WEIGHTS).symlink_to(tmp_path / "outside")
    with pytest.raises(OutputExists):
        fleet.restore([own_loras])
    assert not (tmp_path / "outside").exists()


def test_files_that_were_put_back_by_hand_only_lose_the_placeholder(fleet: Fleet, own_loras: Path, loras: Path) -> None:
    lose(fleet, "rules")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(loras / "rules" / name, own_loras / "rules" / name)
    (done,) = fleet.restore([own_loras]).done
    assert (done.status, done.size) == ("complete", 0)
    assert files_of(own_loras / "rules") == files_of(loras / "rules")


def test_weights_that_are_still_there_are_kept_and_only_the_rest_is_written(
    fleet: Fleet, own_loras: Path, loras: Path
) -> None:
    lose(fleet, "rules")
    shutil.copy(loras / "rules" / WEIGHTS, own_loras / "rules" / WEIGHTS)
    (done,) = fleet.restore([own_loras]).done
    assert (done.source, files_of(own_loras / "rules")) == ("original", files_of(loras / "rules"))


def test_one_bad_placeholder_never_stops_the_others(fleet: Fleet, own_loras: Path) -> None:
    keep(fleet)
    (own_loras / "rules" / PLACEHOLDER_NAME).write_text("{")
    report = fleet.restore([own_loras, own_loras / "nothing"])
    assert [Path(adapter.path).name for adapter in report.refused] == ["nothing", PLACEHOLDER_NAME]
    assert len(report.done) == 4


def test_a_decoder_that_fails_stops_no_other_adapter(
    fleet: Fleet, own_loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(fleet, "rules")
    keep(fleet, "silent")

    def crash(self: Codec, data: bytes) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(Codec, "decode", crash)
    done = by_name(fleet.restore([own_loras]))
    assert (done["rules"].kind, "IndexError" in str(done["rules"].reason)) == ("cannot_decode", True)
    assert done["silent"].status == "restored"
    assert (own_loras / "rules" / PLACEHOLDER_NAME).exists()


def test_if_nothing_comes_back_the_only_reason_is_raised(fleet: Fleet, own_loras: Path) -> None:
    keep(fleet, "rules")
    damage(blob_of(fleet, fleet.show("rules").task.final.weights))
    with pytest.raises(IcmError, match="damaged"):
        fleet.restore([own_loras])
    assert (own_loras / "rules" / PLACEHOLDER_NAME).exists()


def test_if_nothing_comes_back_for_several_reasons_their_number_is_raised(fleet: Fleet, own_loras: Path) -> None:
    keep(fleet, "rules", "silent")
    fleet.remove(["rules", "silent"])
    with pytest.raises(DataError, match="all 2 placeholders"):
        fleet.restore([own_loras])


def test_without_placeholders_nothing_is_done(fleet: Fleet, own_loras: Path) -> None:
    assert fleet.restore([own_loras]).done == []


@pytest.mark.parametrize("take_away", [keep, lose])
def test_an_earlier_version_is_restored_where_its_placeholder_is(
    fleet: Fleet, own_loras: Path, take_away: Callable[..., None]
) -> None:
    take_away(fleet, "rules")
    write_lora(own_loras / "new" / "rules", seed=77)
    fleet.ingest([own_loras / "new" / "rules"], name="rules", on_conflict="version")
    (done,) = fleet.restore([own_loras / "rules"]).done
    assert (done.status, done.source) == ("restored", "original" if take_away is keep else "code")


def test_a_checkpoint_whose_original_is_gone_is_not_replaced_by_the_final_adapter(
    fleet: Fleet, own_loras: Path
) -> None:
    keep(fleet, "poems")
    hidden = own_loras / "poems" / "checkpoint-10" / PLACEHOLDER_NAME
    data = hidden.read_bytes()
    hidden.unlink()  # so that the eviction does not know of it
    fleet.evict(["poems"], max_error=0.7)
    hidden.write_bytes(data)
    refused = by_name(fleet.restore([own_loras]))["checkpoint-10"]
    assert (refused.status, "a checkpoint has no code" in str(refused.reason)) == ("refused", True)


def test_the_store_that_a_placeholder_names_is_not_opened(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    keep(fleet, "rules")
    shutil.copytree(fleet.path, tmp_path / "theirs")
    found = read_placeholder(own_loras / "rules" / PLACEHOLDER_NAME)
    fleet.remove(["rules"])
    theirs = placeholder_of(found.weights, found.config, "rules", store=str(tmp_path / "theirs"))
    (own_loras / "rules" / PLACEHOLDER_NAME).write_bytes(theirs)
    with pytest.raises(DataError) as error:
        fleet.restore([own_loras])
    assert str(tmp_path / "theirs") in str(error.value.hint)
    (done,) = Fleet(tmp_path / "theirs").restore([own_loras]).done
    assert done.source == "original"


def test_without_a_store_the_one_that_is_named_is_told(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    keep(fleet, "rules")
    with pytest.raises(StoreNotFound) as error:
        Fleet(tmp_path / "none").restore([own_loras])
    assert str(fleet.path) in str(error.value.hint)


def test_a_placeholder_chooses_no_file_names(fleet: Fleet, own_loras: Path) -> None:
    final = fleet.show("rules").task.final
    odd = [{"name": "conftest.py", "part": "weights", "sha256": "0" * 64, "size": 1},
           {"name": "setup.cfg", "part": "config", "sha256": "0" * 64, "size": 1}]  # fmt: skip
    folder = own_loras / "new"
    folder.mkdir()
    (folder / PLACEHOLDER_NAME).write_bytes(placeholder_of(final.weights, final.config, "rules", files=odd))
    fleet.restore([folder])
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}


def test_a_file_that_was_not_kept_is_not_promised(fleet: Fleet, own_loras: Path) -> None:
    final = fleet.show("rules").task.final
    data = json.loads(placeholder_of(final.weights, final.config, "rules"))
    data["files"].append({"name": "tokenizer.json", "part": "companion", "sha256": "0" * 64, "size": 1})
    (own_loras / "new").mkdir()
    (own_loras / "new" / PLACEHOLDER_NAME).write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"tokenizer\.json is not in the store"):
        fleet.restore([own_loras / "new"])


# From a bundle


@pytest.mark.slow
def test_without_the_store_a_bundle_brings_the_code_back(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    lose(fleet)
    fleet.export_bundle(tmp_path / "fleet.icm")
    shutil.copytree(own_loras, tmp_path / "copies")
    fleet.restore([own_loras])
    shutil.rmtree(fleet.path)
    report = fleet.restore([tmp_path / "copies"], bundle=tmp_path / "fleet.icm")
    assert {adapter.source for adapter in report.done} == {"code"}
    for name in ("poems", "rules", "silent"):
        assert files_of(tmp_path / "copies" / name) == files_of(own_loras / name)


def test_what_a_bundle_lacks_is_refused(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm", ["rules"])
    keep(fleet)
    report = fleet.restore([own_loras], bundle=tmp_path / "fleet.icm")
    assert [Path(adapter.path).name for adapter in report.done] == ["rules"]
    assert len(report.refused) == 4


def test_a_damaged_bundle_writes_nothing(fleet: Fleet, own_loras: Path, tmp_path: Path) -> None:
    fleet.export_bundle(tmp_path / "fleet.icm")
    keep(fleet, "rules")
    before = files_of(own_loras)
    damage(tmp_path / "fleet.icm")
    with pytest.raises(IcmError, match="damaged"):
        fleet.restore([own_loras], bundle=tmp_path / "fleet.icm")
    assert files_of(own_loras) == before


# What comes with an adapter, and other forms


def test_tokenizers_come_back_with_it(fleet: Fleet, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "odes", seed=8)
    (folder / "tokenizer.json").write_text("{}")
    fleet.ingest([folder])
    before = files_of(folder)
    keep(fleet, "odes")
    fleet.restore([folder])
    assert files_of(folder) == before


@pytest.mark.slow
def test_a_pickle_comes_back_as_safetensors_and_that_is_said(fleet: Fleet, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "odes", seed=8)
    before = load_file(folder / WEIGHTS)
    torch.save(before, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    fleet.ingest([folder], read_bin=True)
    keep(fleet, "odes")
    (done,) = fleet.restore([folder]).done
    assert (done.source, done.converted_from) == ("original", "adapter_model.bin")
    after = load_file(folder / WEIGHTS)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not (folder / "adapter_model.bin").exists()


def test_an_adapter_in_a_single_file_has_a_placeholder_of_its_name(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = ToyFormat()
    monkeypatch.setattr(catalogue, "FORMATS", [PEFT, toy])
    folder = tmp_path / "toys"
    folder.mkdir()
    for seed, name in enumerate(("odes", "songs")):
        adapter = load_adapter(write_lora(tmp_path / "peft" / name, seed=seed))
        (folder / f"{name}.toy").write_bytes(toy.encode(adapter, card="", metadata={}).weights)
    fleet.ingest([folder])
    before = files_of(folder)
    keep(fleet, "odes")
    assert {path.name for path in folder.iterdir()} == {f"odes.{PLACEHOLDER_NAME}", "songs.toy"}
    again = fleet.ingest([folder])
    assert ([task.task for task in again.done], [met.task for met in again.placeholders]) == (["songs"], ["odes"])
    fleet.restore([folder])
    assert files_of(folder) == before


# And again


@pytest.mark.slow
def test_what_came_from_a_code_is_not_ingested_as_another_adapter(fleet: Fleet, own_loras: Path) -> None:
    lose(fleet)
    fleet.restore([own_loras])
    codes = {row.name: row.manifest for row in fleet.tasks()}
    for dry_run in (True, False):
        report = fleet.ingest([own_loras], dry_run=dry_run)
        assert ({task.status for task in report.done}, report.problems) == ({"decoded"}, [])
    assert {row.name: row.manifest for row in fleet.tasks()} == codes


@pytest.mark.slow
def test_what_came_from_a_code_can_give_way_again(fleet: Fleet, own_loras: Path) -> None:
    lose(fleet, "rules")
    fleet.restore([own_loras])
    back = files_of(own_loras / "rules")
    (folder,) = fleet.evict(["rules"], max_error=0.7, placeholder=True).folders
    assert folder.status == "replaced"
    fleet.restore([own_loras])
    assert files_of(own_loras / "rules") == back


@pytest.mark.slow
def test_what_came_from_a_code_and_was_changed_stays(fleet: Fleet, own_loras: Path) -> None:
    lose(fleet, "rules")
    fleet.restore([own_loras])
    damage(own_loras / "rules" / WEIGHTS)
    (folder,) = fleet.evict(["rules"], max_error=0.7, placeholder=True).folders
    assert folder.status == "left"
    assert fleet.ingest([own_loras / "rules"], on_conflict="skip").done[0].status == "skipped"


def test_a_stopped_restore_goes_on_with_the_same_call(fleet: Fleet, own_loras: Path) -> None:
    before = files_of(own_loras)
    keep(fleet)
    with pytest.raises(Cancelled) as stopped:
        Fleet(fleet.path, on_event=stop_after(2, AdapterRestored)).restore([own_loras])
    assert isinstance(stopped.value.report, RestoreReport)
    assert len(stopped.value.report.done) == 2
    assert len(fleet.restore([own_loras]).done) == 3
    assert files_of(own_loras) == before


def test_what_was_left_half_written_is_completed(fleet: Fleet, own_loras: Path) -> None:
    lose(fleet, "rules")
    placeholder = (own_loras / "rules" / PLACEHOLDER_NAME).read_bytes()
    fleet.restore([own_loras])
    back = files_of(own_loras / "rules")
    (own_loras / "rules" / CONFIG).unlink()
    (own_loras / "rules" / PLACEHOLDER_NAME).write_bytes(placeholder)
    (done,) = fleet.restore([own_loras]).done
    assert (done.status, files_of(own_loras / "rules")) == ("restored", back)


def test_a_written_placeholder_can_be_read_by_its_own_parser(fleet: Fleet, own_loras: Path) -> None:
    keep(fleet, "rules")
    path = own_loras / "rules" / PLACEHOLDER_NAME
    assert placeholder_to_json(read_placeholder(path)) == path.read_bytes()
