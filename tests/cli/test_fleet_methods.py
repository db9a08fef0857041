"""What a program gets from `Fleet` for listing, removing, checking and counting, without the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from icmlora import Fleet
from icmlora.errors import BaseModelNotFound, DataError
from registry.errors import StoreNotFound, TaskNotFound
from tests.cli.conftest import Ran, modules_after

Icm = Callable[..., Ran]


@pytest.fixture
def fleet_of(stored: Path, tmp_path: Path) -> Fleet:
    """The fleet of a store with the tasks rust, shakespeare and sql."""
    return Fleet(tmp_path / "store")


def names(fleet: Fleet) -> list[str]:
    return [row.name for row in fleet.tasks()]


def test_tasks_are_listed_by_name(fleet_of: Fleet) -> None:
    assert names(fleet_of) == ["rust", "shakespeare", "sql"]


def test_without_a_store_listing_raises(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        Fleet(tmp_path / "nothing").tasks()


def test_tasks_of_an_unknown_base_model_are_an_error(fleet_of: Fleet) -> None:
    with pytest.raises(DataError, match="nobody/nothing"):
        fleet_of.tasks("nobody/nothing")


def test_show_returns_the_task(fleet_of: Fleet) -> None:
    details = fleet_of.show("RUST")
    assert ([one.step for one in details.task.adapters], details.task.name) == ([80, 100, None], "rust")
    assert (details.task.code, details.generator, details.nearest) == (None, None, ())
    assert fleet_of.versions("rust") == [details.task]


@pytest.mark.slow
def test_a_planned_removal_changes_nothing(fleet_of: Fleet) -> None:
    (removal,) = fleet_of.plan_removal(["rust", "rust"])
    assert (removal.name, removal.adapters, removal.is_last_copy) == ("rust", 3, False)
    assert "rust" in names(fleet_of)


def test_remove_returns_the_names_of_the_removed_tasks(fleet_of: Fleet) -> None:
    assert fleet_of.remove(["sql"]).tasks == ["sql"]
    assert names(fleet_of) == ["rust", "shakespeare"]


def test_remove_with_an_unknown_name_removes_nothing(fleet_of: Fleet) -> None:
    with pytest.raises(TaskNotFound):
        fleet_of.remove(["rust", "nobody"])
    assert len(names(fleet_of)) == 3


def test_prune_frees_what_remove_left(fleet_of: Fleet) -> None:
    fleet_of.remove(["sql"])
    planned = fleet_of.prune(grace=0, dry_run=True)
    assert planned.manifests > 0
    assert fleet_of.prune(grace=0).freed_bytes == planned.freed_bytes
    assert fleet_of.prune(grace=0).freed_bytes == 0


def test_verify_yields_a_damaged_blob_and_repair_moves_it(fleet_of: Fleet) -> None:
    blob = fleet_of.path / "blobs"
    weights = str(fleet_of.show("rust").task.final.weights)
    (path,) = blob.rglob(weights)
    path.chmod(0o644)
    path.write_bytes(b"other bytes")
    (finding,) = fleet_of.verify()
    assert (finding.kind, finding.tasks) == ("length", ("rust",))
    ((moved, done),) = fleet_of.repair()
    assert (moved.digest, "quarantine" in done, path.exists()) == (weights, True, False)


def test_verify_of_a_good_store_yields_nothing(fleet_of: Fleet) -> None:
    assert list(fleet_of.verify(read_data=True)) == []


def test_a_base_model_without_a_copy_says_why(fleet_of: Fleet) -> None:
    (base,) = fleet_of.base_models()
    assert (base.path, base.tasks) == (None, 3)
    assert base.problem


def test_an_unknown_base_model_cannot_be_forgotten(fleet_of: Fleet) -> None:
    with pytest.raises(BaseModelNotFound):
        fleet_of.forget_base_model("nobody/nothing")


def test_stats_add_up_to_the_files(fleet_of: Fleet) -> None:
    found = fleet_of.stats()
    files = [path for path in fleet_of.path.rglob("*") if path.is_file()]
    assert found.usage.total == sum(path.stat().st_size for path in files)
    assert (found.tasks, found.compact_share) == (3, None)


def test_task_map_with_too_few_tasks_says_why_the_others_are_left_out(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs 3 tasks .* but there are 2; .*: silent"):
        Fleet(mixed).task_map(plot=tmp_path / "map.svg")
    assert not (tmp_path / "map.svg").exists()


def test_doctor_finds_no_problem_in_a_good_store(fleet_of: Fleet) -> None:
    assert [check for check in fleet_of.doctor() if check.name in ("store", "schema") and check.problem] == []


def test_the_cache_folder_is_asked_for_only_when_it_is_needed(stored: Path, tmp_path: Path) -> None:
    def refuse() -> Path:
        raise AssertionError("nobody needs it")

    assert len(Fleet(tmp_path / "store", cache=refuse).tasks()) == 3


def test_importing_the_library_and_listing_tasks_imports_no_torch(stored: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from icmlora.fleet.context import Context; "
        "from icmlora.fleet.tasks.listing import list_tasks; "
        f"print(len(list_tasks(Context(Path({str(tmp_path / 'store')!r})))))"
    )
    assert not {"torch", "numpy", "transformers", "typer", "rich"} & modules_after(code)
