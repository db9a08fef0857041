"""`Fleet.materialize` and `Fleet.load`: every source, what is refused, and that a folder appears whole or not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from icmlora import Adapter, DamagedStore, DataError, Fleet, OutputExists, StoreNotFound, TaskNotFound, load_adapter
from icmlora.fleet.write.sources import Source, TooLossy
from tests.icmlora.fleet.stores import blob_of, code_blobs, damage, equal, files_of

WEIGHTS = "adapter_model.safetensors"
ALL: tuple[Source, ...] = ("original", "code", "recalled")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where an adapter is written."""
    return tmp_path / "out"


def updates(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {module.name: module.b @ module.a for module in adapter.modules}


@pytest.mark.parametrize("source", ALL)
def test_an_adapter_in_memory_is_that_of_the_folder(fleet: Fleet, out: Path, source: Source) -> None:
    report = fleet.materialize("rules", out, source=source, dtype="float32")
    written, loaded = updates(load_adapter(out)), updates(fleet.load("rules", source=source))
    assert report.source == source
    assert written.keys() == loaded.keys()
    for name in loaded:
        torch.testing.assert_close(written[name], loaded[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ALL)
def test_the_digest_is_that_of_the_written_weights(fleet: Fleet, out: Path, source: Source) -> None:
    report = fleet.materialize("rules", out, source=source)
    assert report.weights == hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


def test_the_same_call_writes_the_same_bytes(fleet: Fleet, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fleet.materialize("poems", tmp_path / name, source="code")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_an_original_comes_back_byte_for_byte(fleet: Fleet, loras: Path, out: Path) -> None:
    report = fleet.materialize("poems", str(out))
    names = {"README.md", "adapter_config.json", WEIGHTS}
    assert {name: data for name, data in files_of(loras / "poems").items() if name in names} == files_of(out)
    assert (report.squared_error, report.retained_gain, report.generator) == (0.0, 1.0, None)


def test_the_sources_come_closer_to_the_original_one_after_the_other(fleet: Fleet) -> None:
    original = updates(fleet.load("rules"))

    def error(source: Source) -> float:
        found = updates(fleet.load("rules", source=source))
        return sum(float((found[name] - original[name]).square().sum()) for name in original)

    assert 0 < error("code") < error("recalled")


def test_the_reported_error_is_that_of_the_adapter(fleet: Fleet, out: Path) -> None:
    report = fleet.materialize("poems", out, source="code", dtype="float32")
    original, written = updates(fleet.load("poems")), updates(load_adapter(out))
    lost = torch.cat([(written[name] - original[name]).flatten() for name in original])
    whole = torch.cat([value.flatten() for value in original.values()])
    assert report.relative_error == pytest.approx(float(torch.linalg.norm(lost) / torch.linalg.norm(whole)), rel=1e-3)
    assert report.squared_error == pytest.approx(report.relative_error**2)


def test_auto_takes_the_best_source_that_is_left(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.materialize("rules", tmp_path / "before").source == "original"
    fleet.evict(["rules"], max_error=0.7)
    assert fleet.materialize("rules", tmp_path / "rules").source == "code"


def test_a_decoded_adapter_has_the_number_format_that_was_asked_for(fleet: Fleet, tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("bfloat16", "float16", "float32"):
        fleet.materialize("rules", tmp_path / dtype, source="code", dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / WEIGHTS).stat().st_size
    assert sizes["bfloat16"] == pytest.approx(sizes["float16"], abs=64)
    assert sizes["float32"] > 1.5 * sizes["float16"]


def test_a_seed_samples_an_adapter(fleet: Fleet) -> None:
    one, same, other = (fleet.load("poems", seed=seed) for seed in (1, 1, 2))
    assert equal(one, same)
    assert not equal(one, other)


def test_nothing_is_claimed_of_a_sampled_adapter(fleet: Fleet, out: Path) -> None:
    report = fleet.materialize("poems", out, seed=1)
    assert (report.source, report.squared_error, report.retained_gain) == ("network", None, None)


@pytest.mark.parametrize("source", ["original", "code"])
def test_a_seed_for_what_is_not_sampled_is_refused(fleet: Fleet, out: Path, source: Source) -> None:
    with pytest.raises(DataError, match="--seed needs --source network or auto"):
        fleet.materialize("rules", out, source=source, seed=1)
    assert not out.exists()


def test_an_unknown_source_is_refused(fleet: Fleet, out: Path) -> None:
    with pytest.raises(DataError, match="unknown source 'codes'") as error:
        fleet.materialize("rules", out, source="codes")  # type: ignore[arg-type]
    assert "code" in str(error.value.hint)


def test_an_unknown_number_format_is_refused(fleet: Fleet, out: Path) -> None:
    with pytest.raises(DataError, match="unknown number format 'int4'") as error:
        fleet.materialize("rules", out, source="code", dtype="int4")
    assert ("bfloat16" in str(error.value.hint), out.exists()) == (True, False)


# what is not there


def test_an_evicted_original_is_an_error_that_says_how_to_get_it_back(fleet: Fleet, out: Path) -> None:
    fleet.evict(["silent"], max_error=0.7)
    with pytest.raises(DataError, match="the original of task 'silent' was evicted") as error:
        fleet.materialize("silent", out, source="original")
    assert "--restore" in str(error.value.hint)
    assert not out.exists()


@pytest.mark.parametrize(
    ("source", "fact", "hint"),
    [
        ("code", "task 'poems' has no code", "run `icm train` to make one"),
        ("recalled", "there is no generator for task 'poems'", "run `icm train` to make one"),
    ],
)
def test_before_a_training_there_is_only_the_original(ingested: Fleet, source: Source, fact: str, hint: str) -> None:
    with pytest.raises(DataError, match=fact) as error:
        ingested.load("poems", source=source)
    assert error.value.hint == hint


@pytest.mark.slow
def test_a_task_that_came_after_the_training_needs_an_update(fleet: Fleet, loras: Path) -> None:
    fleet.ingest([loras / "silent"], name="twin")
    with pytest.raises(DataError, match="task 'twin' has no code") as error:
        fleet.load("twin", source="code")
    assert error.value.hint == "run `icm train --update` to make one"


@pytest.mark.parametrize(
    ("name", "hint"), [("poem", "did you mean 'poems'?"), ("zzz", "run `icm ls` to list the tasks")]
)
def test_an_unknown_task_gets_a_hint(fleet: Fleet, out: Path, name: str, hint: str) -> None:
    for work in (lambda: fleet.load(name), lambda: fleet.materialize(name, out)):
        with pytest.raises(TaskNotFound) as error:
            work()
        assert error.value.hint == hint
    assert not out.exists()


def test_a_missing_store_is_not_created(tmp_path: Path, out: Path) -> None:
    with pytest.raises(StoreNotFound) as error:
        Fleet(tmp_path / "nowhere").materialize("poems", out)
    assert error.value.path == str(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("source", ["code", "recalled"])
def test_an_adapter_above_the_limit_is_refused(fleet: Fleet, out: Path, source: Source) -> None:
    with pytest.raises(TooLossy, match=r"but the limit is 0\.032"):
        fleet.materialize("poems", out, source=source, max_error=0.032)
    assert not out.exists()


def test_a_limit_that_is_met_changes_nothing(fleet: Fleet, tmp_path: Path) -> None:
    fleet.materialize("poems", tmp_path / "free", source="code")
    fleet.materialize("poems", tmp_path / "limited", source="code", max_error=0.7)
    assert files_of(tmp_path / "free") == files_of(tmp_path / "limited")


def test_damaged_bytes_are_noticed_before_anything_is_written(fleet: Fleet, out: Path) -> None:
    damage(blob_of(fleet, code_blobs(fleet)["poems"]))
    with pytest.raises(DamagedStore):
        fleet.materialize("poems", out, source="code")
    assert not out.exists()
    assert fleet.materialize("poems", out).source == "original"


# where it is written


def test_a_folder_that_is_not_empty_is_refused_and_stays(fleet: Fleet, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists) as error:
        fleet.materialize("poems", out)
    assert error.value.path == str(out)
    assert files_of(out) == {"notes.txt": b"mine"}


def test_an_output_that_exists_is_refused_before_the_store_is_opened(tmp_path: Path, out: Path) -> None:
    out.write_text("a file")
    with pytest.raises(OutputExists, match="is not a folder"):
        Fleet(tmp_path / "nowhere").materialize("poems", out, force=True)


def test_force_replaces_an_adapter_by_another(fleet: Fleet, out: Path, tmp_path: Path) -> None:
    fleet.materialize("poems", out)
    report = fleet.materialize("rules", out, source="code", force=True)
    fleet.materialize("rules", tmp_path / "alone", source="code")
    assert report.task == "rules"
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()


def test_an_empty_folder_and_missing_parents_are_fine(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fleet.materialize("silent", tmp_path / "empty")
    fleet.materialize("silent", tmp_path / "new parent" / "größe" / "out")
    assert files_of(tmp_path / "empty") == files_of(tmp_path / "new parent" / "größe" / "out")


def test_reading_changes_no_byte_of_the_store(fleet: Fleet, tmp_path: Path) -> None:
    before = files_of(fleet.path)
    for source in ("original", "code", "recalled"):
        fleet.materialize("poems", tmp_path / source, source=source)  # type: ignore[arg-type]
        fleet.load("poems", source=source)  # type: ignore[arg-type]
    assert files_of(fleet.path) == before


@pytest.mark.one_case
@pytest.mark.parametrize("source", ALL)
def test_the_files_in_memory_are_those_of_the_folder(fleet: Fleet, out: Path, source: Source) -> None:
    fleet.materialize("rules", out, source=source)
    assert fleet.read_files("rules", source=source) == files_of(out)


@pytest.mark.slow
def test_many_adapters_are_those_that_are_loaded_one_by_one(fleet: Fleet) -> None:
    names = 2 * [row.name for row in fleet.tasks()]
    many = list(fleet.load_many(names, source="code"))
    assert [name for name, _ in many] == names
    for name, adapter in many:
        alone = fleet.load(name, source="code")
        for one, other in zip(adapter.modules, alone.modules, strict=True):
            assert torch.equal(one.a, other.a)
            assert torch.equal(one.b, other.b)


def test_an_unknown_name_among_many_is_an_error(fleet: Fleet) -> None:
    with pytest.raises(TaskNotFound):
        list(fleet.load_many(["poems", "unknown"]))
