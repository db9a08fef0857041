"""Stores and bundles that earlier versions wrote are opened, moved forward, and give the same adapters.

icm 0.9 has generators and codes of a format that is not read any more: originals are used as before, codes are left to
the icm that wrote them.
"""

from __future__ import annotations

import shutil
import sqlite3
import tarfile
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icm_cli.errors import ExitCode
from registry.storage.sqlite import SqliteDatabase
from tests.cli.conftest import Ran
from tests.golden.build import HERE, TASKS, WRITTEN
from tests.pg_server import new_database, restore

Icm = Callable[..., Ran]
VERSIONS = sorted(folder.name for folder in HERE.glob("icm-*"))
OLDER = "icm-0.9.0"
"""The version whose codes have an older format."""
WEIGHTS = "adapter_model.safetensors"


NEWER = [name for name in VERSIONS if name != OLDER]
SERVERS = [name for name in VERSIONS if (HERE / name / "server.sql").exists()]


@pytest.fixture(params=[*NEWER, *(f"{name} on a server" for name in SERVERS)])
def golden(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a version wrote; a copy of its store is the one that commands use."""
    version, _, on_server = str(request.param).partition(" ")
    if on_server:
        url = restored(version, request.getfixturevalue("postgres"), tmp_path)
        monkeypatch.setenv("ICM_STORE", url)
        return HERE / version
    return unpacked(version, tmp_path)


def unpacked(version: str, tmp_path: Path, archive: str = "store.tar.gz") -> Path:
    folder = HERE / version
    with tarfile.open(folder / archive) as packed:
        packed.extractall(tmp_path, filter="data")
    return folder


def restored(version: str, server: str, tmp_path: Path) -> str:
    """Restore the dump of a database and the folder of its bytes, which is at another place now."""
    import psycopg

    from registry.row_checks import check_of

    unpacked(version, tmp_path, "blobs.tar.gz")
    url, blobs = new_database(server), str(tmp_path / "blobs")
    restore(url, HERE / version / "server.sql")
    with psycopg.connect(url) as connection:
        (number,) = connection.execute("SELECT number FROM place").fetchone() or ("",)
        check = check_of("place", number, blobs)
        connection.execute("UPDATE place SET blobs = %s, crc = %s", (blobs, check))
    return url


def check(found: Path, expected: Path, *, exact: bool) -> None:
    """Compare two folders of an adapter; other processors decode a code to weights that differ by rounding."""
    for name in {path.name for path in expected.iterdir()} - ({"README.md"} if exact else {"README.md", WEIGHTS}):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    made, known = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert made.keys() == known.keys()
    for name, tensor in known.items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_store_of_an_earlier_version_is_whole_and_gives_the_same_adapters(
    icm: Icm, golden: Path, tmp_path: Path
) -> None:
    assert icm("verify", "--read-data").code == 0
    for task, source in TASKS.items():
        assert icm("materialize", task, "--source", source, "-o", tmp_path / task).code == 0
        check(tmp_path / task, golden / "adapters" / task, exact=source == "original")


def test_what_people_said_of_its_tasks_is_still_known(icm: Icm, golden: Path) -> None:
    rows = {row["name"]: row for row in icm("ls", "--json").document}
    assert rows.keys() == TASKS.keys()
    assert (rows["rules"]["tags"], rows["rules"]["note"]) == (["golden"], "kept for later versions")
    assert (rows["silent"]["pinned"], rows["poems"]["evicted_at"] is not None) == (True, True)
    assert rows["rules"]["retained_gain"] is not None


def test_it_can_be_changed_as_any_other(icm: Icm, golden: Path) -> None:
    assert icm("evict", "rules", "--max-error", "10").code == 0
    assert icm("rm", "poems", "--yes").code == 0
    assert icm("verify", "--read-data").code == 0


@pytest.mark.parametrize("stored", [False, True])
def test_its_bundle_gives_the_same_adapters(icm: Icm, golden: Path, tmp_path: Path, stored: bool) -> None:
    source: tuple[object, ...] = ("--from", golden / "fleet.icm")
    if stored:
        icm("--store", tmp_path / "other", "import", golden / "fleet.icm")
        source = ("--store", tmp_path / "other")
    assert icm("materialize", "poems", "-o", tmp_path / "poems", *source).code == 0
    check(tmp_path / "poems", golden / "adapters" / "poems", exact=False)


def test_there_is_one_of_this_version() -> None:
    """`python -m tests.golden.build` writes it when a version is released."""
    assert WRITTEN.name in VERSIONS
    assert WRITTEN.name in SERVERS


def test_a_schema_from_before_the_first_release_is_refused_with_the_way_out(icm: Icm, tmp_path: Path) -> None:
    unpacked(OLDER, tmp_path)
    with closing(sqlite3.connect(tmp_path / "store" / "registry.db")) as connection:
        connection.execute(f"PRAGMA user_version={SqliteDatabase.first_schema - 1}")
    for command in ("ls", "verify", "train"):
        ran = icm(command)
        assert ran.code == ExitCode.OTHER_VERSION
        assert "has schema 7; this icm supports schema 8 and later" in ran.err
        assert "ingest the adapters again" in ran.err


# Codes of an older format


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A copy of the store of icm 0.9 at the default place, with a pinned task and an evicted one."""
    unpacked(OLDER, tmp_path)
    return tmp_path / "store"


def content(store: Path) -> dict[str, bytes]:
    """Read every blob of a store but task vectors, which are made again."""
    found = {path.name: path.read_bytes() for path in (store / "blobs").rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not data.startswith(b"ICMT")}


def test_nothing_of_a_store_with_older_codes_is_lost_and_its_originals_are_used(icm: Icm, older: Path) -> None:
    before = content(older)
    assert {row["name"] for row in icm("ls", "--json", "-F", "status=coded").document} == set(TASKS)
    assert icm("materialize", "rules", "-o", older.parent / "rules").code == 0
    check(older.parent / "rules", HERE / OLDER / "adapters" / "rules", exact=True)
    for command in ("ls", "stats", "generators", "prune --yes", "show poems", "show rules"):
        assert icm(*command.split()).code == 0
    assert content(older) == before


@pytest.mark.parametrize(
    "command",
    [
        "materialize poems -o out",
        "materialize rules --source code -o out",
        "encode rules --refine 0",
        "encode --max-error 0.1",
        "train --update",
        "export out.icm",
        "show rules --errors",
        "generators rollback DIGEST",
        "import BUNDLE",
        "materialize poems --from BUNDLE -o out",
    ],
)
def test_what_needs_an_older_code_says_what_to_do(
    icm: Icm, older: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, (generator,) = content(older), icm("generators", "--json").document
    words = {"DIGEST": generator["generator"], "BUNDLE": str(HERE / OLDER / "fleet.icm")}
    ran = icm(*(words.get(word, word) for word in command.split()))
    assert ran.code == ExitCode.OTHER_VERSION, ran.err
    assert "an older format, which this icm does not read" in ran.err
    assert "icm 0.9" in ran.err
    assert "damaged" not in ran.err
    assert content(older) == before


def test_verify_calls_older_codes_by_their_name_and_not_damaged(icm: Icm, older: Path) -> None:
    ran = icm("verify", "--read-data", "--decode", "--json")
    assert (ran.code, ran.document["ok"]) == (0, True)
    (remark,) = [finding for finding in ran.document["findings"] if finding["kind"] == "remark"]
    assert set(remark["tasks"]) == set(TASKS)
    assert "run `icm train` to encode 2 tasks again; poems: " in remark["message"]
    assert remark["message"] in icm("doctor").err


def test_no_original_is_evicted_on_an_older_code(icm: Icm, older: Path) -> None:
    before = content(older)
    ran = icm("evict", "rules", "--max-error", "10")
    assert (ran.code, "kept rules: generator" in ran.out + ran.err) == (ExitCode.PARTLY, True)
    assert content(older) == before


def test_training_makes_new_codes_and_leaves_those_that_are_the_only_copy(icm: Icm, older: Path) -> None:
    before = content(older)
    ran = icm("train", "--device", "cpu", "--refine", "0", "--no-eval", "--steps", "2")
    assert (ran.code, "their originals are evicted: poems" in ran.err) == (ExitCode.PARTLY, True)
    first, second = icm("generators", "--json").document
    assert (first["tasks"], first["last_copies"]) == (sorted(TASKS), ["poems"])
    assert (second["tasks"], second["is_current"], second["older_format"]) == (["rules", "silent"], True, False)
    assert icm("materialize", "silent", "--source", "code", "-o", older.parent / "silent").code == 0
    for command in ("materialize poems -o out", "duplicates poems"):
        assert "which this icm does not read" in icm(*command.split()).err
    # Once more, and with a task that was evicted since: that one's code is read, so it must have one.
    assert icm("train", "--device", "cpu", "--refine", "0", "--no-eval", "--steps", "2").code == ExitCode.PARTLY
    assert icm("evict", "rules", "--max-error", "10").code == 0
    refused = icm("train", "--device", "cpu")
    assert "without a code: 'rules'" in refused.err
    assert icm("train", "--update", "--device", "cpu").code == 0
    assert icm("generators", "forget", first["generator"], "--yes").code != 0
    assert icm("prune", "--yes").code == 0
    kept = {name: data for name, data in before.items() if data.startswith((b"ICMC", b"ICMG", b"ICMR"))}
    assert kept.items() <= content(older).items()
    assert icm("verify", "--read-data").code == 0


def test_there_is_nothing_to_train_on_where_every_task_has_an_older_code_only(icm: Icm, older: Path) -> None:
    assert icm("rm", "rules", "silent", "--yes").code == 0
    ran = icm("train", "--device", "cpu")
    assert (ran.code, "which this icm does not read" in ran.err) == (ExitCode.OTHER_VERSION, True)


def test_the_icm_that_wrote_older_codes_finds_its_database_as_it_was(icm: Icm, older: Path) -> None:
    with closing(sqlite3.connect(older / "registry.db")) as connection:
        before = list(connection.iterdump())
    icm("ls")
    with closing(sqlite3.connect(older / "registry.db.schema-8")) as connection:
        assert (list(connection.iterdump()), connection.execute("PRAGMA user_version").fetchone()) == (before, (8,))


def test_a_database_that_is_put_back_in_an_older_schema_is_kept_as_it_was_too(icm: Icm, older: Path) -> None:
    data = (older / "registry.db").read_bytes()
    (older / "registry.db.kept").write_bytes(zlib.compress(data))
    (older / "registry.db").write_bytes(bytes(100))
    assert icm("verify", "--restore-database", "--yes").code == 0
    assert (older / "registry.db.schema-8").read_bytes() == data
    assert icm("verify", "--read-data").code == 0


def test_what_the_earlier_icm_wrote_takes_the_place_of_an_older_code(icm: Icm, older: Path, tmp_path: Path) -> None:
    shutil.copytree(HERE / OLDER / "adapters" / "poems", tmp_path / "new" / "poems")
    assert icm("ingest", tmp_path / "new", "--name-from", "{name}", "--on-conflict", "replace").code == 0
    (poems,) = [row for row in icm("ls", "--json").document if row["name"] == "poems"]
    assert poems["evicted_at"] is None
    assert icm("verify", "--read-data").code == 0
