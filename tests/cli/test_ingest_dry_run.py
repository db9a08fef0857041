"""`icm ingest --dry-run`: it says what the ingest would do, to the store that is there, and writes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran
from tests.cli.fleet import write_adapter, write_broken, write_fleet, write_texts

Icm = Callable[..., Ran]
Change = Callable[[Path], object]
Options = tuple[object, ...]


def written(store: Path) -> dict[Path, tuple[int, bytes]]:
    """Return everything that lies in a store, with the time it was written at."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in store.rglob("*") if path.is_file()}


def said(ran: Ran) -> list[dict[str, Any]]:
    """Return what a run says, without what a dry run leaves out or has of its own."""
    left_out = {"dry_run", "without_vectors"}
    return [{key: value for key, value in event.items() if key not in left_out} for event in ran.events]


def another_adapter(fleet: Path) -> None:
    write_adapter(fleet / "rust", seed=99)


def a_bad_checkpoint_and_a_new_task(fleet: Path) -> None:
    write_broken(fleet / "sql" / "checkpoint-80")
    write_adapter(fleet / "verilog", seed=98)


CHANGES: dict[str, tuple[Change, Options]] = {
    "nothing": (lambda fleet: None, ()),
    "checkpoint": (lambda fleet: write_adapter(fleet / "rust" / "checkpoint-120", seed=7), ()),
    "samples": (lambda fleet: write_texts(fleet / "rust", count=9), ()),
    "held-out": (lambda fleet: write_texts(fleet / "rust", "eval.jsonl", count=9), ()),
    "version": (another_adapter, ()),
    "conflict": (another_adapter, ("--on-conflict", "fail")),
    "conflict-strict": (another_adapter, ("--strict", "--on-conflict", "fail")),
    "conflict-skipped": (another_adapter, ("--on-conflict", "skip")),
    "base-model": (lambda fleet: write_adapter(fleet / "rust", base_model_name_or_path="acme/other"), ()),
    "case": (lambda fleet: (fleet / "rust").rename(fleet / "RUST"), ()),
    "refused": (a_bad_checkpoint_and_a_new_task, ()),
    "strict": (a_bad_checkpoint_and_a_new_task, ("--strict",)),
    "card-gone": (lambda fleet: (fleet / "rust" / "README.md").unlink(), ()),
}


@pytest.mark.one_case
@pytest.mark.parametrize(("change", "options"), CHANGES.values(), ids=CHANGES.keys())
def test_it_says_what_the_ingest_then_says(icm: Icm, stored: Path, change: Change, options: Options) -> None:
    change(stored)
    planned = icm("ingest", stored, "--dry-run", "--json", *options)
    done = icm("ingest", stored, "--json", *options)
    assert (planned.code, said(planned), planned.err) == (done.code, said(done), done.err)


@pytest.mark.one_case
@pytest.mark.parametrize(("change", "options"), CHANGES.values(), ids=CHANGES.keys())
def test_it_writes_nothing_into_the_store(
    icm: Icm, stored: Path, tmp_path: Path, change: Change, options: Options
) -> None:
    change(stored)
    before = written(tmp_path / "store")
    icm("ingest", stored, "--dry-run", *options)
    assert written(tmp_path / "store") == before


def test_without_a_store_everything_is_new_and_none_is_made(icm: Icm, fleet: Path, tmp_path: Path) -> None:
    planned = icm("ingest", fleet, "--dry-run", "--json")
    assert not (tmp_path / "store").exists()
    assert said(planned) == said(icm("ingest", fleet, "--json"))


def test_a_folder_that_could_not_become_a_store_ends_it_as_it_ends_the_ingest(
    icm: Icm, fleet: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "dog.jpg").write_bytes(b"")
    planned, done = (icm("--store", folder, "ingest", fleet, *how, "--json") for how in (["-n"], []))
    assert planned.code == done.code != 0
    assert planned.error == done.error


def test_what_is_known_is_not_called_new(icm: Icm, stored: Path) -> None:
    ran = icm("ingest", stored, "-n")
    assert (ran.code, ran.out.partition(";")[0]) == (0, "would ingest 3 tasks: 0 new adapters, 9 unchanged")


def test_a_conflict_ends_it_as_it_ends_the_ingest(icm: Icm, stored: Path) -> None:
    another_adapter(stored)
    ran = icm("ingest", stored, "-n", "--on-conflict", "fail")
    assert ran.code == ExitCode.PARTLY
    assert "task 'rust' already exists with a different adapter" in ran.out
    assert "--on-conflict" in ran.out


def test_several_batches_are_planned_as_they_are_ingested(
    icm: Icm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icmlora.fleet.ingest.files._BATCH_ADAPTERS", 4)
    fleet = write_fleet(tmp_path / "loras", names=("a", "b", "c", "d"))
    icm("ingest", fleet / "c")
    planned = icm("ingest", fleet, "-n", "--json")
    assert said(planned) == said(icm("ingest", fleet, "--json"))
    assert [event["status"] for event in planned.events[:-1]] == ["added", "added", "known", "added"]


@pytest.mark.one_case
@pytest.mark.parametrize("options", [(), ("--restore",)], ids=["left", "restored"])
def test_evicted_originals_are_counted_as_the_ingest_counts_them(
    icm: Icm, trained: Path, mixed_template: Path, options: Options
) -> None:
    assert icm("evict", "--max-error", "0.7").code == 0
    before = written(trained)
    planned = icm("ingest", mixed_template / "loras", "-n", "--json", *options)
    assert written(trained) == before
    assert said(planned) == said(icm("ingest", mixed_template / "loras", "--no-vectors", "--json", *options))


def test_a_store_on_read_only_media_can_be_asked(icm: Icm, stored: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    folders = [store, *(path for path in store.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        ran = icm("ingest", stored, "-n")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert (ran.code, "9 unchanged" in ran.out) == (0, True)
