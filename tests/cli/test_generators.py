"""`icm generators`, and its subcommands."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from registry.store import Store
from tests.cli.coded import damage
from tests.cli.conftest import Ran, let_the_tuned_win
from tests.cli.tiny_fleet import icm_quietly, train_store, write_lora

Icm = Callable[..., Ran]


@pytest.fixture(scope="module")
def updated_template(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("updated")
    store = Path(shutil.copytree(trained_template, folder / "store"))
    icm_quietly(store, "ingest", write_lora(folder / "extra", seed=9), "--no-vectors")
    with pytest.MonkeyPatch.context() as patch:
        let_the_tuned_win(patch)
        train_store(store, "--update")
    return store


@pytest.fixture
def updated(updated_template: Path, tmp_path: Path, tuned_wins: None) -> Path:
    """A trained store with one more task under a second generator that continues the first."""
    return Path(shutil.copytree(updated_template, tmp_path / "store"))


def versions(icm: Icm) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = icm("generators", "--json").document
    return rows


def test_it_lists_versions_and_the_tasks_that_need_each(icm: Icm, updated: Path) -> None:
    first, second = versions(icm)
    assert (first["version"], first["epochs"], first["is_current"], first["tasks"]) == (1, 1, False, [])
    assert (second["version"], second["epochs"], second["is_current"], len(second["tasks"])) == (2, 2, True, 4)
    assert second["size"] > first["size"]


def test_an_earlier_version_of_a_task_needs_its_generator_too(icm: Icm, updated: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "rules", seed=77), "--on-conflict", "version", "--no-vectors")
    assert versions(icm)[1]["tasks"] == ["extra", "poems", "rules@1", "silent"]


def test_the_table_has_a_row_per_generator(icm: Icm, updated: Path) -> None:
    heading, *rows = icm("generators").out.splitlines()
    assert "NETWORKS" in heading
    assert [row.split()[0] for row in rows] == [row["generator"][:12] for row in versions(icm)]


def test_quietly_it_prints_digests(icm: Icm, updated: Path) -> None:
    assert icm("generators", "-q").out.split() == [row["generator"] for row in versions(icm)]


def test_a_store_without_a_generator_lists_none(icm: Icm, mixed: Path) -> None:
    assert versions(icm) == []
    assert "icm train" in icm("generators").err


def test_a_rollback_makes_new_codes_with_the_earlier_one(icm: Icm, updated: Path, tmp_path: Path) -> None:
    icm("evict", "extra", "--max-error", "0.95")
    icm("materialize", "extra", "-o", tmp_path / "before")
    first, second = (row["generator"] for row in versions(icm))
    ran = icm("generators", "rollback", first[:8], "--json")
    assert (ran.document["generator"], ran.document["version"]) == (first, 3)
    assert ran.document["others"] == ["extra", "poems", "rules", "silent"]
    assert [(row["generator"], row["is_current"]) for row in versions(icm)] == [
        (first, False),
        (second, False),
        (first, True),
    ]
    icm("prune", "--older-than", "0", "--yes")
    assert [row["generator"] for row in versions(icm)] == [second, first]
    assert icm("materialize", "extra", "-o", tmp_path / "after").code == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]
    assert icm("verify", "--read-data").code == 0


def test_a_rollback_to_the_one_in_use_changes_nothing(icm: Icm, updated: Path) -> None:
    before = versions(icm)
    assert icm("generators", "rollback", before[1]["generator"]).code == 0
    assert versions(icm) == before


def test_a_damaged_one_does_not_come_into_use(icm: Icm, updated: Path) -> None:
    before = versions(icm)
    damage(updated, before[0]["generator"])
    ran = icm("generators", "rollback", before[0]["generator"], "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.DAMAGED, "damaged_blob")
    assert [row["is_current"] for row in versions(icm)] == [False, True]


@pytest.mark.slow
def test_encode_moves_the_tasks_to_the_generator_in_use(icm: Icm, updated: Path) -> None:
    icm("generators", "rollback", versions(icm)[0]["generator"])
    assert icm("encode", "--max-error", "0.5", "--device", "cpu").code == 0
    assert [len(row["tasks"]) for row in versions(icm)] == [4, 0, 4]
    ran = icm("prune", "--older-than", "0", "--yes", "--json")
    assert (ran.document["generators"], len(versions(icm))) == (2, 1)


def test_the_global_options_are_understood_before_the_subcommand_too(icm: Icm, updated: Path) -> None:
    assert icm("generators", "--json", "rollback", versions(icm)[0]["generator"]).document["version"] == 3


def test_one_that_nothing_needs_is_named_and_pruned(icm: Icm, updated: Path) -> None:
    first, second = (row["generator"] for row in versions(icm))
    assert f"no task needs generator {first[:12]}; `icm prune` deletes it" in icm("generators").err
    icm("prune", "--older-than", "0", "--yes")
    assert [row["generator"] for row in versions(icm)] == [second]
    with Store.open(updated) as store:
        assert not store.blobs.exists(first)
        assert list(store.verify(read_data=True)) == []


@pytest.mark.parametrize(("name", "fact"), [("abcdef0123", "no generator begins"), ("ab", "too short")])
def test_a_name_that_is_none_is_an_error(icm: Icm, updated: Path, name: str, fact: str) -> None:
    ran = icm("generators", "rollback", name, "--json")
    assert (ran.code, fact in ran.error["message"]) == (ExitCode.FAILED, True)


def test_a_damaged_file_is_listed_as_damaged(icm: Icm, updated: Path) -> None:
    first = versions(icm)[0]["generator"]
    with Store.open(updated) as store:
        path = Path(store.blobs.place(first))
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    assert versions(icm)[0]["epochs"] is None
    assert "damaged" in icm("generators").out


def test_the_bill_counts_the_longer_file_and_each_code_once(icm: Icm, updated: Path) -> None:
    bill = icm("stats", "--json").document
    first, second = versions(icm)
    assert bill["on_disk"]["generators"] == second["size"]
    assert bill["on_disk"]["old_generators"] == first["size"]
    assert bill["on_disk"]["codes"] == sum(row["code_size"] for row in icm("ls", "--json").document)
