"""Adapters that changed their base model, with their initial weights, through the life of a fleet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from icmlora import AdapterRefused, Bundle, Fleet, load_adapter
from icmlora.adapter.metrics import squared_error
from icmlora.formats.peft.initial import convert
from registry.manifests import StoredAdapter
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import copy_of, files_of, has_blob, is_sound

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_pissa(folder: Path, *, seed: int = 21, initial: str | None = "pissa_init", method: str = "pissa") -> Path:
    """Write an adapter that changed its base, and the weights it began with into a folder inside or next to it."""
    write_lora(folder, seed=seed, init_lora_weights=method)
    if initial is not None:
        write_lora(folder / initial, seed=seed + 1, init_lora_weights=True)
    return folder


def plain_of(folder: Path, initial: Path, into: Path) -> Path:
    """Write the ordinary LoRA that an adapter with its initial weights is."""
    into.mkdir()
    files = convert(*((folder / name).read_bytes() for name in (CONFIG, WEIGHTS)), (initial / WEIGHTS).read_bytes())
    for name, data in zip((CONFIG, WEIGHTS), files, strict=True):
        (into / name).write_bytes(data)
    return into


@pytest.fixture
def new(tmp_path: Path) -> Fleet:
    """A fleet without a store yet."""
    return Fleet(tmp_path / "new", cache=tmp_path / "cache")


def final(fleet: Fleet, name: str) -> StoredAdapter:
    return fleet.show(name).task.final


@pytest.fixture(scope="module")
def template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a PiSSA adapter and a trained store of it and the mixed fleet; not to be changed."""
    folder = tmp_path_factory.mktemp("pissa")
    shutil.copytree(mixed_template / "store", folder / "store")
    fleet = Fleet(folder / "store")
    fleet.ingest([write_pissa(folder / "sonnets")])
    fleet.train(device="cpu", steps=12, refine=0, evaluate=False)
    return folder


@pytest.fixture
def fleet(template: Path, tmp_path: Path) -> Fleet:
    """A copy of the trained fleet."""
    return copy_of(template / "store", tmp_path / "store")


def test_initial_weights_inside_the_folder_are_no_task_and_allow_a_code(new: Fleet, tmp_path: Path) -> None:
    report = new.ingest([write_pissa(tmp_path / "loras" / "poems").parent])
    assert [(task.task, task.original_only) for task in report.done] == [("poems", None)]
    assert report.done[0].initial == str(tmp_path / "loras" / "poems" / "pissa_init")
    assert final(new, "poems").rank_max == 2 * load_adapter(tmp_path / "loras/poems/pissa_init").modules[0].a.shape[0]


def test_initial_weights_next_to_the_folder_are_found(new: Fleet, tmp_path: Path) -> None:
    write_pissa(tmp_path / "run" / "adapter", initial="../olora_init", method="olora")
    assert [task.task for task in new.ingest([tmp_path / "run"]).done] == ["run"]
    assert final(new, "run").original_only is None


def test_checkpoints_have_the_initial_weights_of_their_run(new: Fleet, tmp_path: Path) -> None:
    write_pissa(tmp_path / "run" / "checkpoint-10", initial="../pissa_init")
    write_pissa(tmp_path / "run" / "checkpoint-20", seed=31, initial=None)
    new.ingest([tmp_path / "run"])
    adapters = new.show("run").task.adapters
    assert len({adapter.initial for adapter in adapters}) == 1
    assert [adapter.original_only for adapter in adapters] == [None, None]


def test_initial_weights_can_be_given(new: Fleet, tmp_path: Path) -> None:
    write_pissa(tmp_path / "poems", initial="../start")
    new.ingest([tmp_path / "poems"], initial=tmp_path / "start")
    assert final(new, "poems").original_only is None


def test_given_weights_that_fit_no_adapter_are_refused(new: Fleet, tmp_path: Path) -> None:
    write_pissa(tmp_path / "poems", initial=None)
    write_lora(tmp_path / "other", seed=1, rank=3)
    with pytest.raises(AdapterRefused, match="not the initial weights"):
        new.ingest([tmp_path / "poems"], initial=tmp_path / "other")


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["pissa", "olora", "corda", "loftq"])
def test_without_initial_weights_only_the_original_is_kept(new: Fleet, tmp_path: Path, method: str) -> None:
    new.ingest([write_pissa(tmp_path / "poems", initial=None, method=method)])
    assert method in (final(new, "poems").original_only or "")


def test_loftq_stays_an_original_because_its_base_model_is_a_quantised_one(new: Fleet, tmp_path: Path) -> None:
    new.ingest([write_pissa(tmp_path / "poems", initial="loftq_init", method="loftq")], name_from="{name}")
    assert "quantised" in (final(new, "poems").original_only or "")


def test_a_plain_adapter_ignores_a_folder_of_that_name(new: Fleet, tmp_path: Path) -> None:
    write_lora(tmp_path / "runs" / "poems", seed=3)
    write_lora(tmp_path / "runs" / "pissa_init", seed=4)
    assert len(new.ingest([tmp_path / "runs"]).done) == 2


def test_initial_weights_of_another_shape_are_a_task_of_their_own(new: Fleet, tmp_path: Path) -> None:
    write_pissa(tmp_path / "poems", initial=None)
    write_lora(tmp_path / "poems" / "pissa_init", seed=4, rank=3)
    assert len(new.ingest([tmp_path / "poems"]).done) == 2
    assert final(new, "poems").original_only is not None


def test_initial_weights_that_are_found_later_allow_a_code(new: Fleet, tmp_path: Path) -> None:
    new.ingest([write_pissa(tmp_path / "poems", initial="../start")])
    report = new.ingest([tmp_path / "poems"], initial=tmp_path / "start")
    assert [task.status for task in report.done] == ["updated"]
    assert final(new, "poems").original_only is None
    assert is_sound(new)
    assert [task.status for task in new.ingest([tmp_path / "poems"]).done] == ["known"]


def test_the_original_comes_back_byte_for_byte(fleet: Fleet, template: Path, tmp_path: Path) -> None:
    fleet.materialize("sonnets", tmp_path / "out", source="original")
    wanted = {name: data for name, data in files_of(template / "sonnets").items() if "pissa_init" not in name}
    assert {name: data for name, data in files_of(tmp_path / "out").items() if name != "README.md"} == wanted


def test_in_memory_it_is_what_it_does_to_the_unchanged_base_model(fleet: Fleet, template: Path, tmp_path: Path) -> None:
    plain = load_adapter(plain_of(template / "sonnets", template / "sonnets" / "pissa_init", tmp_path / "plain"))
    found = fleet.load("sonnets", source="original")
    for one, other in zip(found.modules, plain.modules, strict=True):
        torch.testing.assert_close(one.b @ one.a, other.b @ other.a)


def test_its_code_comes_back_as_an_ordinary_lora(fleet: Fleet, template: Path, tmp_path: Path) -> None:
    plain = plain_of(template / "sonnets", template / "sonnets" / "pissa_init", tmp_path / "plain")
    report = fleet.materialize("sonnets", tmp_path / "out", source="code")
    assert (tmp_path / "out" / CONFIG).read_bytes() == (plain / CONFIG).read_bytes()
    assert json.loads((tmp_path / "out" / CONFIG).read_bytes())["init_lora_weights"] is True
    error = squared_error(load_adapter(plain), load_adapter(tmp_path / "out"))
    assert report.squared_error == pytest.approx(error, abs=1e-2)


@pytest.mark.slow
def test_initial_weights_are_evicted_with_the_original_and_come_back_with_it(fleet: Fleet, template: Path) -> None:
    row = final(fleet, "sonnets")
    assert row.initial is not None
    done = fleet.evict(["sonnets"], max_error=1e9)
    assert (has_blob(fleet, row.weights), has_blob(fleet, row.initial)) == (False, False)
    assert done.done[0].freed == row.weights.size + row.initial.size
    fleet.ingest([template / "sonnets"])
    assert (has_blob(fleet, row.weights), has_blob(fleet, row.initial)) == (False, False)
    assert is_sound(fleet)
    fleet.ingest([template / "sonnets"], restore=True)
    assert (has_blob(fleet, row.weights), has_blob(fleet, row.initial)) == (True, True)
    assert is_sound(fleet)


@pytest.mark.slow
def test_an_original_that_comes_back_without_its_initial_weights_is_an_original_only(
    fleet: Fleet, template: Path, tmp_path: Path
) -> None:
    fleet.evict(["sonnets"], max_error=1e9)
    shutil.copytree(template / "sonnets", tmp_path / "sonnets", ignore=shutil.ignore_patterns("pissa_init"))
    fleet.ingest([tmp_path / "sonnets"], restore=True)
    assert final(fleet, "sonnets").original_only is not None
    assert is_sound(fleet)
    fleet.materialize("sonnets", tmp_path / "out", source="original")


@pytest.mark.slow
def test_a_bundle_holds_the_form_of_the_converted_adapter(fleet: Fleet, template: Path, tmp_path: Path) -> None:
    plain = plain_of(template / "sonnets", template / "sonnets" / "pissa_init", tmp_path / "plain")
    fleet.export_bundle(tmp_path / "fleet.icm", ["sonnets"])
    Bundle(tmp_path / "fleet.icm").materialize("sonnets", tmp_path / "from-bundle")
    assert (tmp_path / "from-bundle" / CONFIG).read_bytes() == (plain / CONFIG).read_bytes()
    other = Fleet(tmp_path / "other")
    other.import_bundle(tmp_path / "fleet.icm")
    other.materialize("sonnets", tmp_path / "from-store")
    assert (tmp_path / "from-store" / CONFIG).read_bytes() == (plain / CONFIG).read_bytes()
