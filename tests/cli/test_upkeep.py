"""`icm rm`, `icm prune`, `icm verify`, `icm base`."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.errors import OptionsConflict
from icmlora.fleet.params import age as seconds
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.fleet import BASE, write_adapter

Icm = Callable[..., Ran]


def blobs(store: Path) -> list[Path]:
    return sorted(path for path in (store / "blobs").rglob("*") if path.is_file())


@pytest.fixture
def damaged(stored: Path, tmp_path: Path) -> Path:
    """The blob of the weights of `rust`, with two bits flipped."""
    with Store.open(tmp_path / "store") as store:
        digest = store.task("rust").final.weights
    blob = tmp_path / "store" / "blobs" / digest[0] / digest
    flip(blob, 3)
    return blob


def flip(path: Path, mask: int = 1) -> None:
    """Flip bits of the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= mask
    path.chmod(0o644)
    path.write_bytes(data)


def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_rm_removes_tasks_and_frees_their_bytes(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = sum(path.stat().st_size for path in blobs(tmp_path / "store"))
    document = icm("rm", "rust", "sql", "--yes", "--json").document
    freed = document.pop("freed")
    assert document == {"removed": ["rust", "sql"], "would_remove": [], "last_copies": [], "placeholders": []}
    assert icm("ls", "-q").out == "shakespeare\n"
    assert freed >= before - sum(path.stat().st_size for path in blobs(tmp_path / "store")) > 0
    assert icm("prune", "--older-than", "0s", "-y", "--json").document["blobs"] == 0
    assert icm("verify", "--read-data").code == 0


def test_rm_removes_all_versions(icm: Icm, stored: Path, tmp_path: Path) -> None:
    write_adapter(stored / "rust", seed=99)
    icm("ingest", stored / "rust")
    assert len(blobs(tmp_path / "store")) > 0
    assert icm("rm", "rust@1", "-y").code == ExitCode.FAILED
    assert "rust: 2 versions, " in icm("rm", "rust", "-y").err
    icm("rm", "sql", "shakespeare", "-y")
    assert blobs(tmp_path / "store") == []


def test_rm_beside_another_process_leaves_the_bytes_to_prune(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = blobs(tmp_path / "store")
    with Store.open(tmp_path / "store"):
        ran = icm("rm", "rust", "-y", "--lock-timeout", "0")
    assert (ran.code, blobs(tmp_path / "store")) == (0, before)
    assert "the next `icm prune` frees the space" in ran.err
    assert icm("prune", "--older-than", "0s", "-y").code == 0
    assert len(blobs(tmp_path / "store")) < len(before)


def test_rm_dry_run_removes_nothing(icm: Icm, stored: Path) -> None:
    ran = icm("rm", "rust", "-n", "--json")
    assert (ran.document["removed"], ran.document["would_remove"]) == ([], ["rust"])
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


def remove(store: Path, *names: str) -> None:
    """Remove tasks and leave their bytes, as `icm rm` does if another process uses the store."""
    with Store.open(store) as opened:
        opened.remove(opened.named(names))


def test_prune_frees_the_bytes_of_removed_tasks(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = sum(path.stat().st_size for path in files(tmp_path / "store"))
    remove(tmp_path / "store", "rust")
    added = sum(path.stat().st_size for path in files(tmp_path / "store")) - before  # the removal
    ran = icm("prune", "--older-than", "0s", "-y", "--json")
    after = sum(path.stat().st_size for path in files(tmp_path / "store"))
    assert ran.document["deleted"] is True
    assert ran.document["size"] == before + added - after > 0
    assert icm("verify", "--read-data").code == 0


def test_prune_empties_the_quarantine_only_if_asked(icm: Icm, damaged: Path, tmp_path: Path) -> None:
    icm("verify", "--repair", "-y")
    icm("prune", "--older-than", "0s", "-y")
    assert len(list((tmp_path / "store" / "quarantine").iterdir())) == 1
    icm("prune", "--older-than", "0s", "--empty-quarantine", "-y")
    assert not list((tmp_path / "store" / "quarantine").iterdir())


def test_prune_keeps_young_files_and_says_so(icm: Icm, stored: Path, tmp_path: Path) -> None:
    remove(tmp_path / "store", "rust")
    before = files(tmp_path / "store")
    ran = icm("prune", "-y")
    assert "deleted nothing" in ran.out
    assert "newer than --grace" in ran.err
    assert files(tmp_path / "store") == before


def test_prune_keeps_states_that_the_database_lacks_and_says_so(icm: Icm, stored: Path, tmp_path: Path) -> None:
    old = (tmp_path / "store" / "registry.db").read_bytes()
    icm("edit", "rust", "--note", "one")
    (tmp_path / "store" / "registry.db").write_bytes(old)
    icm("prune", "--older-than", "0s", "-y")
    before = files(tmp_path / "store")
    ran = icm("prune", "--older-than", "0s", "-y")
    assert "kept files of rust: the database lacks their last changes" in ran.err
    assert files(tmp_path / "store") == before
    assert icm("prune", "-n", "--json").document["unlisted"] == ["rust"]


def test_prune_deletes_nothing_if_the_database_is_wrong(icm: Icm, stored: Path, tmp_path: Path) -> None:
    remove(tmp_path / "store", "rust")
    spoil(tmp_path / "store")
    before = files(tmp_path / "store")
    ran = icm("prune", "--older-than", "0s", "-y", "--json")
    assert (ran.error["kind"], "icm verify --repair" in ran.error["hint"]) == ("damaged_store", True)
    assert files(tmp_path / "store") == before


def spoil(store: Path) -> None:
    """Change a value in the database."""
    with closing(sqlite3.connect(store / "registry.db")) as connection, connection:
        connection.execute("UPDATE refs SET pinned = NOT pinned WHERE name = 'sql'")


def files(store: Path) -> list[Path]:
    return sorted(path for name in ("blobs", "manifests") for path in (store / name).rglob("*") if path.is_file())


def test_prune_skips_a_folder_among_the_temporary_files(icm: Icm, stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "tmp" / "notes"
    folder.mkdir()
    ran = icm("prune", "--older-than", "0s", "-y")
    assert (ran.code, folder.is_dir()) == (ExitCode.DONE, True)
    assert f"skipped {folder}: " in ran.err


def test_prune_dry_run_deletes_nothing(icm: Icm, stored: Path, tmp_path: Path) -> None:
    remove(tmp_path / "store", "rust")
    before = files(tmp_path / "store")
    assert "would delete" in icm("prune", "--older-than", "0s", "-n").out
    assert files(tmp_path / "store") == before


def test_prune_without_a_terminal_needs_yes(icm: Icm, stored: Path, tmp_path: Path) -> None:
    remove(tmp_path / "store", "rust")
    assert icm("prune", "--older-than", "0s").code == ExitCode.USAGE


@pytest.mark.parametrize(("age", "expected"), [("90", 90), ("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604800)])
def test_ages_have_units(age: str, expected: int) -> None:
    assert seconds(age) == expected


@pytest.mark.parametrize("age", ["", "h", "-1h", "1w", "1.5h", "9999999999"])
def test_an_invalid_age_is_refused(age: str) -> None:
    with pytest.raises(OptionsConflict, match="invalid age"):
        seconds(age)


def test_an_undamaged_store_is_called_intact(icm: Icm, stored: Path) -> None:
    assert icm("verify").code == icm("verify", "--read-data").code == 0
    expected = {"ok": True, "read_data": False, "findings": [], "rebuilt": None, "repaired": []}
    assert icm("verify", "--json").document == expected


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
    assert (ran.code, "icm ingest" in ran.err) == (ExitCode.FAILED, True)
    assert not damaged.exists()
    assert bad in [path.read_bytes() for path in (tmp_path / "store" / "quarantine").iterdir()]
    icm("ingest", stored)
    assert icm("verify", "--read-data").code == 0


def test_repair_corrects_a_flipped_bit(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in files(tmp_path / "store")}
    small = [path for path in before if path.stat().st_size < 4096]
    for path in small:
        flip(path)
    assert icm("verify").code == ExitCode.FAILED
    for _ in range(2):  # what else needs a manifest is seen once it can be read
        ran = icm("verify", "--repair", "-y", "--json")
    assert (ran.code, ran.document["ok"]) == (0, True)
    assert {path: path.read_bytes() for path in files(tmp_path / "store")} == before


def test_repair_dry_run_moves_nothing(icm: Icm, damaged: Path) -> None:
    assert icm("verify", "--repair", "-n").code == ExitCode.FAILED
    assert damaged.exists()


def test_repair_works_on_the_whole_store_only(icm: Icm, stored: Path) -> None:
    assert icm("verify", "rust", "--repair").code == ExitCode.USAGE


def test_repair_rebuilds_a_wrong_database(icm: Icm, stored: Path, tmp_path: Path) -> None:
    spoil(tmp_path / "store")
    ran = icm("verify")
    assert (ran.code, "row: pinned of task 'sql' differ from its manifest" in ran.out) == (ExitCode.FAILED, True)
    assert "icm verify --repair" in ran.err
    assert icm("verify", "--repair", "-n").code == ExitCode.FAILED
    ran = icm("verify", "--repair", "--yes", "--json")
    assert (ran.code, ran.document["rebuilt"]) == (0, {"tasks_count": 3, "restored": [], "removed": [], "lost": []})
    assert icm("verify", "--repair", "--yes", "--json").document["rebuilt"] is None


@pytest.mark.parametrize("how", ["missing", "cut", "garbage"])
def test_every_command_says_how_to_restore_a_lost_database(icm: Icm, stored: Path, tmp_path: Path, how: str) -> None:
    before, database = icm("ls", "--json").document, tmp_path / "store" / "registry.db"
    icm("rm", "rust", "-y")
    data = database.read_bytes()
    database.unlink()
    if how != "missing":
        database.write_bytes(data[:3000] if how == "cut" else b"garbage" * 1000)
    commands = ("ls", "show sql", "verify", "prune -n", "rm sql -y", "edit sql --pin", "generators", "doctor", "stats")
    for command in (*commands, "materialize sql -o out", "evict --max-error 1", f"ingest {stored}"):
        ran = icm(*command.split())
        assert (ran.code != 0, "icm verify --repair" in ran.err) == (True, True), (command, ran.err)
    ran = icm("verify", "--repair", "--yes")
    assert (ran.code, "rebuilt the database from the manifests: 2 tasks" in ran.out) == (0, True)
    assert icm("ls", "--json").document == [row for row in before if row["name"] != "rust"]


def test_repair_says_what_stays_removed(icm: Icm, stored: Path, tmp_path: Path) -> None:
    remove(tmp_path / "store", "rust")
    (tmp_path / "store" / "registry.db").unlink()
    assert "removed earlier, and not restored: rust" in icm("verify", "--repair", "--yes").err
    assert icm("ls", "-q").out == "shakespeare\nsql\n"


def test_repair_takes_the_newer_states_of_an_old_database(icm: Icm, stored: Path, tmp_path: Path) -> None:
    old = (tmp_path / "store" / "registry.db").read_bytes()
    for note in ("one", "two"):
        icm("edit", "rust", "--note", note)
    (tmp_path / "store" / "registry.db").write_bytes(old)
    ran = icm("verify")
    assert (ran.code, "task 'rust' has 2 states that are missing from the database" in ran.out) == (1, True)
    assert "restored: rust" in icm("verify", "--repair", "--yes").out
    assert icm("show", "rust", "--json").document["note"] == "two"


def test_a_change_that_was_not_committed_is_a_remark(icm: Icm, stored: Path, tmp_path: Path) -> None:
    old = (tmp_path / "store" / "registry.db").read_bytes()
    icm("edit", "rust", "--note", "one")
    (tmp_path / "store" / "registry.db").write_bytes(old)
    ran = icm("verify")
    assert (ran.code, "remark: the database lacks the last change of task 'rust'" in ran.err) == (0, True)
    assert icm("verify", "--repair", "--yes").code == 0
    assert icm("show", "rust", "--json").document["note"] == "one"


def test_a_copy_with_hard_links_is_refused(icm: Icm, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "store", tmp_path / "copy", copy_function=os.link)
    for store in ("store", "copy"):
        ran = icm("doctor", "--store", tmp_path / store)
        assert (ran.code, "shares its database with another store" in ran.err) == (1, True)
        assert icm("ls", "--store", tmp_path / store).code == ExitCode.NO_STORE


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
