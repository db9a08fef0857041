"""`icm rm`, `icm prune`, `icm verify`, `icm base`."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from icm_cli.commands.prune import seconds
from icm_cli.errors import ExitCode, UsageProblem
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.fleet import BASE

Icm = Callable[..., Ran]


def blobs(store: Path) -> list[Path]:
    return sorted(path for path in (store / "blobs").rglob("*") if path.is_file())


@pytest.fixture
def damaged(stored: Path, tmp_path: Path) -> Path:
    """The blob of the weights of `rust`, with one bit flipped."""
    with Store.open(tmp_path / "store") as store:
        digest = store.tasks.final("rust").weights
    blob = tmp_path / "store" / "blobs" / digest[0] / digest
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    return blob


def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_rm_removes_tasks_and_keeps_their_bytes(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = blobs(tmp_path / "store")
    ran = icm("rm", "rust", "sql", "--yes", "--json")
    assert ran.document == {"removed": ["rust", "sql"], "would_remove": [], "last_copies": [], "placeholders": []}
    assert icm("ls", "-q").out == "shakespeare\n"
    assert blobs(tmp_path / "store") == before


def test_rm_dry_run_removes_nothing(icm: Icm, stored: Path) -> None:
    ran = icm("rm", "rust", "-n", "--json")
    assert ran.document == {"removed": [], "would_remove": ["rust"], "last_copies": [], "placeholders": []}
    assert "rust" in icm("ls", "-q").out


def test_rm_without_a_terminal_needs_yes(icm: Icm, stored: Path) -> None:
    ran = icm("rm", "rust")
    assert ran.code == ExitCode.USAGE
    assert "--yes" in ran.err
    assert "rust" in icm("ls", "-q").out


def test_rm_with_an_unknown_name_removes_nothing(icm: Icm, stored: Path) -> None:
    assert icm("rm", "rust", "nope", "-y").code == ExitCode.FAILED
    assert "rust" in icm("ls", "-q").out


def test_rm_of_the_same_name_twice_removes_it_once(icm: Icm, stored: Path) -> None:
    assert icm("rm", "rust", "RUST", "-y", "--json").document["removed"] == ["rust"]


def test_prune_frees_the_bytes_of_removed_tasks(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = sum(path.stat().st_size for path in blobs(tmp_path / "store"))
    icm("rm", "rust", "-y")
    ran = icm("prune", "--older-than", "0s", "--empty-quarantine", "-y", "--json")
    after = sum(path.stat().st_size for path in blobs(tmp_path / "store"))
    assert ran.document["deleted"] is True
    assert ran.document["size"] == before - after > 0
    assert icm("verify", "--read-data").code == 0


def test_prune_sets_weights_aside_until_it_is_asked_to_delete_them(icm: Icm, stored: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        weights = store.tasks.final("rust").weights
    icm("rm", "rust", "-y")
    ran = icm("prune", "--older-than", "0s", "-y")
    kept = list((tmp_path / "store" / "quarantine").iterdir())
    assert weights in {hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}
    assert f"moved {len(kept)} code or weights files to quarantine" in ran.out
    assert "--empty-quarantine" in ran.err
    icm("prune", "--older-than", "0s", "--empty-quarantine", "-y")
    assert not list((tmp_path / "store" / "quarantine").iterdir())


def test_prune_keeps_young_files_and_says_so(icm: Icm, stored: Path, tmp_path: Path) -> None:
    icm("rm", "rust", "-y")
    before = blobs(tmp_path / "store")
    ran = icm("prune", "-y")
    assert "deleted nothing" in ran.out
    assert "newer than --grace" in ran.err
    assert blobs(tmp_path / "store") == before


def test_prune_skips_a_folder_among_the_temporary_files(icm: Icm, stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "tmp" / "notes"
    folder.mkdir()
    ran = icm("prune", "--older-than", "0s", "-y")
    assert (ran.code, folder.is_dir()) == (ExitCode.DONE, True)
    assert f"skipped {folder}: " in ran.err


def test_prune_dry_run_deletes_nothing(icm: Icm, stored: Path, tmp_path: Path) -> None:
    icm("rm", "rust", "-y")
    before = blobs(tmp_path / "store")
    assert "would delete" in icm("prune", "--older-than", "0s", "-n").out
    assert blobs(tmp_path / "store") == before


def test_prune_without_a_terminal_needs_yes(icm: Icm, stored: Path) -> None:
    icm("rm", "rust", "-y")
    assert icm("prune", "--older-than", "0s").code == ExitCode.USAGE


@pytest.mark.parametrize(("age", "expected"), [("90", 90), ("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604800)])
def test_ages_have_units(age: str, expected: int) -> None:
    assert seconds(age) == expected


@pytest.mark.parametrize("age", ["", "h", "-1h", "1w", "1.5h", "9999999999"])
def test_an_invalid_age_is_refused(age: str) -> None:
    with pytest.raises(UsageProblem, match="invalid age"):
        seconds(age)


def test_an_undamaged_store_is_called_intact(icm: Icm, stored: Path) -> None:
    assert icm("verify").code == icm("verify", "--read-data").code == 0
    nothing = {"findings": [], "corrected": [], "quarantined": []}
    assert icm("verify", "--json").document == {"ok": True, "read_data": False, **nothing}


def test_verify_says_that_it_did_not_read_the_contents(icm: Icm, damaged: Path) -> None:
    ran = icm("verify")
    assert ran.code == 0
    assert "contents not checked; use --read-data" in ran.out


def test_verify_finds_a_flipped_bit_when_it_reads(icm: Icm, damaged: Path) -> None:
    ran = icm("verify", "--read-data", "--json")
    assert ran.code == ExitCode.FAILED
    assert [(f["kind"], f["digest"], f["tasks"]) for f in ran.document["findings"]] == [
        ("digest", damaged.name, ["rust"])
    ]


def test_verify_of_one_task_checks_only_that_task(icm: Icm, damaged: Path) -> None:
    assert icm("verify", "sql", "--read-data").code == 0
    assert icm("verify", "rust", "--read-data").code == ExitCode.FAILED


def test_verify_finds_a_missing_blob_at_once(icm: Icm, damaged: Path) -> None:
    damaged.unlink()
    assert icm("verify", "--json").document["findings"][0]["kind"] == "missing"


def test_repair_moves_damage_aside_and_ingest_restores_it(
    icm: Icm, damaged: Path, stored: Path, tmp_path: Path
) -> None:
    bad = damaged.read_bytes()
    ran = icm("verify", "--repair", "-y")
    assert "icm ingest" in ran.err
    assert not damaged.exists()
    assert bad in [path.read_bytes() for path in (tmp_path / "store" / "quarantine").iterdir()]
    icm("ingest", stored)
    assert icm("verify", "--read-data").code == 0


def test_repair_dry_run_moves_nothing(icm: Icm, damaged: Path) -> None:
    assert icm("verify", "--repair", "-n").code == ExitCode.FAILED
    assert damaged.exists()


def test_repair_works_on_the_whole_store_only(icm: Icm, stored: Path) -> None:
    assert icm("verify", "rust", "--repair").code == ExitCode.USAGE


def test_repair_corrects_a_flipped_bit_of_a_row_and_says_which(icm: Icm, stored: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "store" / "registry.db")) as connection, connection:
        connection.execute("UPDATE tasks SET pinned = 1 WHERE name = 'rust'")
    assert "icm verify --repair" in icm("verify").err
    ran = icm("verify", "--repair", "--yes")
    assert (ran.code, "(task rust): pinned from 1 to 0" in ran.out) == (0, True)
    assert icm("verify", "--repair", "--yes", "--json").document["corrected"] == []


def test_leftovers_of_a_crash_are_not_a_problem(icm: Icm, stored: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / "tmp" / "left").write_text("over")
    ran = icm("verify", "-v")
    assert ran.code == 0
    assert "harmless leftover" in ran.err


def test_a_base_model_can_be_added_and_forgotten(icm: Icm, stored: Path, tmp_path: Path) -> None:
    folder = base_folder(tmp_path)
    assert icm("base", "add", BASE, folder).code == 0
    (row,) = icm("base", "ls", "--json").document
    assert (row["name"], row["tasks_count"], row["path"]) == (BASE, 3, str(folder))
    icm("base", "rm", BASE)
    assert icm("base", "ls", "--json").document[0]["alias"] is None


def test_a_relative_path_of_a_base_model_is_made_absolute(
    icm: Icm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    icm("base", "add", BASE, os.path.relpath(folder))
    assert icm("base", "ls", "--json").document[0]["alias"] == str(folder)


def test_a_folder_without_a_base_model_is_refused(icm: Icm, tmp_path: Path) -> None:
    ran = icm("base", "add", BASE, tmp_path)
    assert ran.code == ExitCode.FAILED
    assert not (tmp_path / "store").exists()


def test_a_base_model_that_is_not_here_is_shown_as_missing(icm: Icm, stored: Path) -> None:
    ran = icm("base", "ls")
    assert "not found" in ran.out
    assert "icm base add" in ran.err


def test_forgetting_an_unknown_base_model_is_an_error(icm: Icm, stored: Path) -> None:
    assert "icm base ls" in icm("base", "rm", "nope").err
