"""`icm generators`, and its subcommands."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icm_cli.output import Output
from registry.records import NewGenerator
from registry.store import Store
from tests.cli.conftest import Ran, let_the_tuned_win
from tests.cli.tiny_fleet import STEPS, icm_quietly, train_store, write_lora

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


def test_it_lists_versions_and_what_depends_on_each(icm: Icm, updated: Path) -> None:
    icm("evict", "extra", "--max-error", "0.95")
    first, second = versions(icm)
    assert (first["version"], first["epochs"], first["is_current"], len(first["tasks"])) == (1, 1, False, 3)
    assert (second["version"], second["epochs"], second["is_current"], len(second["tasks"])) == (2, 2, True, 4)
    assert (first["last_copies"], second["last_copies"]) == ([], ["extra"])
    assert second["size"] > first["size"]


def test_the_table_has_a_row_per_generator(icm: Icm, updated: Path) -> None:
    heading, *rows = icm("generators").out.splitlines()
    assert "NETWORKS" in heading
    assert [row.split()[0] for row in rows] == [row["generator"][:12] for row in versions(icm)]


def test_quietly_it_prints_digests(icm: Icm, updated: Path) -> None:
    assert icm("generators", "-q").out.split() == [row["generator"] for row in versions(icm)]


def test_a_store_without_a_generator_lists_none(icm: Icm, mixed: Path) -> None:
    assert versions(icm) == []
    assert "icm train" in icm("generators").err


def test_rolling_back_makes_the_earlier_one_current_and_names_what_has_no_code(icm: Icm, updated: Path) -> None:
    first = versions(icm)[0]["generator"]
    ran = icm("generators", "rollback", first[:8], "--json")
    assert (ran.document["generator"], ran.document["without_code"]) == (first, ["extra"])
    assert [row["is_current"] for row in versions(icm)] == [True, False]
    assert icm("materialize", "extra", "--source", "code", "-o", updated / "out").code == ExitCode.FAILED


@pytest.mark.slow
def test_an_update_after_rolling_back_gives_the_task_a_code_again(icm: Icm, updated: Path) -> None:
    icm("generators", "rollback", versions(icm)[0]["generator"])
    assert icm("train", "--update", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS).code == 0
    assert all(row["code_size"] for row in icm("ls", "--json").document)


def test_rolling_back_is_refused_where_it_would_lose_a_last_copy(icm: Icm, updated: Path) -> None:
    icm("evict", "extra", "--max-error", "0.95")
    ran = icm("generators", "rollback", versions(icm)[0]["generator"], "--json")
    assert (ran.error["kind"], "'extra'" in ran.error["message"]) == ("last_copy", True)
    assert [row["is_current"] for row in versions(icm)] == [False, True]


def test_the_global_options_are_understood_before_the_subcommand_too(icm: Icm, updated: Path) -> None:
    assert icm("generators", "--json", "rollback", versions(icm)[0]["generator"]).document["version"] == 1


def test_forgetting_frees_the_file_of_an_earlier_generator_at_the_next_prune(icm: Icm, updated: Path) -> None:
    first = versions(icm)[0]["generator"]
    assert icm("generators", "forget", first, "--yes", "--json").document["codes"] == 3
    icm("prune", "--older-than", "0", "--yes")
    with Store.open(updated) as store:
        assert not Path(store.blobs.place(first)).exists()
        assert list(store.verify(read_data=True)) == []
    assert all(row["code_size"] for row in icm("ls", "--json").document)


@pytest.mark.parametrize("options", [("--dry-run",), (), ("--yes",)])
def test_the_one_in_use_is_not_forgotten_and_nobody_is_asked(icm: Icm, updated: Path, options: tuple[str, ...]) -> None:
    before = versions(icm)
    ran = icm("generators", "forget", before[1]["generator"], *options, "--json")
    assert (ran.error["kind"], "is in use" in ran.error["message"]) == ("generator_conflict", True)
    assert versions(icm) == before


def test_another_generator_that_got_the_number_while_the_user_was_asked_is_not_forgotten(
    icm: Icm, updated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = versions(icm)
    icm("generators", "rollback", first["generator"])

    def confirm(*_: object, **__: object) -> bool:
        with Store.open(updated) as store:
            old, confirmed = store.generators.all()
            store.generators.forget(confirmed)
            blob = store.blobs.put(b"trained meanwhile")
            store.generators.add(NewGenerator(confirmed.base_model, blob, {}, {}))
            store.generators.make_current(old.id)
        return True

    monkeypatch.setattr(Output, "confirm", confirm)
    ran = icm("generators", "forget", second["generator"], "--json")
    assert ran.error["kind"] == "generator_not_found"
    assert "was removed by another process" in ran.error["message"]
    with Store.open(updated) as store:
        assert [store.blobs.read(made.blob) for made in store.generators.all()][1:] == [b"trained meanwhile"]


@pytest.mark.parametrize("answer", [("--dry-run",), ("--json",)])
def test_nothing_is_forgotten_unless_somebody_says_yes(icm: Icm, updated: Path, answer: tuple[str, ...]) -> None:
    icm("generators", "forget", versions(icm)[0]["generator"], *answer)
    assert len(versions(icm)) == 2


def test_the_generator_in_use_is_not_forgotten(icm: Icm, updated: Path) -> None:
    ran = icm("generators", "forget", versions(icm)[1]["generator"], "--yes", "--json")
    assert (ran.error["kind"], "rollback" in ran.error["hint"]) == ("generator_conflict", True)


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
