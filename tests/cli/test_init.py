"""`icm init` makes a store where the rows and the bytes are elsewhere; the four commands work on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran
from tests.cli.fleet import write_adapter
from tests.icmlora.tiny_base import LABEL
from tests.pg_server import new_database

Icm = Callable[..., Ran]


@pytest.fixture
def url(postgres: str) -> str:
    return new_database(postgres)


def test_a_folder_is_made_once(tmp_path: Path, icm: Icm) -> None:
    for is_new in (True, False):
        made = icm("init", tmp_path / "new", "--json")
        assert made.document == {"store": str(tmp_path / "new"), "blobs": str(tmp_path / "new/blobs"), "is_new": is_new}


def test_a_store_in_a_database_has_to_be_told_where_its_bytes_are(url: str, icm: Icm) -> None:
    ran = icm("init", url)
    assert (ran.code, "--blobs" in ran.err) == (2, True)
    assert icm("ls", "--store", url).code == 10


def test_while_the_bucket_is_away_nothing_is_created(
    url: str, tmp_path: Path, icm: Icm, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = pytest.importorskip("registry.storage.blobs.objects")
    monkeypatch.setattr(objects, "_DEADLINE", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    for store in (tmp_path / "new", url):
        assert icm("init", store, "--blobs", "s3://icm/fleet").code == 18
        assert icm("ls", "--store", store).code == 10
    assert not (tmp_path / "new").exists()
    for number, store in enumerate([tmp_path / "new", url]):
        assert icm("init", store, "--blobs", tmp_path / f"blobs-{number}").code == 0


def test_a_team_uses_the_four_commands_by_the_address_alone(
    mixed_template: Path, url: str, tmp_path: Path, icm: Icm, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(mixed_template / "loras", tmp_path / "loras")
    made = icm("init", url, "--blobs", tmp_path / "blobs", "-q")
    assert made.code == 0, made.err
    monkeypatch.setenv("ICM_STORE", url)
    assert icm("base", "add", LABEL, mixed_template / "base").code == 0
    for arguments in (("ingest", tmp_path / "loras"), ("train", "--steps", "5", "--refine", "0")):
        ran = icm(*arguments, "--device", "cpu")
        assert ran.code == 0, ran.err
    name = icm("ls", "-q").out.split()[0]
    for arguments in (
        ("materialize", name, "-o", tmp_path / "adapter"),
        ("stats",),
        ("verify", "--read-data"),
        ("doctor",),
    ):
        ran = icm(*arguments)
        assert ran.code == 0, ran.err
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_password_in_an_address_is_never_printed(icm: Icm) -> None:
    for arguments in (("ls",), ("doctor",), ("stats", "--json"), ("init", "--blobs", "/nowhere/blobs")):
        ran = icm(*arguments, "--store", "postgresql://me:tell-nobody@127.0.0.1:1/fleet")
        assert ran.code != 0
        assert "tell-nobody" not in ran.out + ran.err


def test_a_database_that_is_away_is_one_error_with_a_code_of_its_own(icm: Icm) -> None:
    ran = icm("ls", "--store", "postgresql://127.0.0.1:1/fleet")
    assert ran.code == 18
    assert ran.err.count("error:") == 1


@pytest.mark.parametrize("place", ["database", "folder"])
@pytest.mark.parametrize("blobs", ["folder", "bucket"])
def test_a_lost_database_is_rebuilt_from_its_files(
    place: str, blobs: str, request: pytest.FixtureRequest, tmp_path: Path, icm: Icm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blobs == "bucket":
        server = request.getfixturevalue("s3")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
    location = f"s3://icm/{tmp_path.name}-{place}" if blobs == "bucket" else str(tmp_path / "blobs")
    first, second = (
        new_database(request.getfixturevalue("postgres")) if place == "database" else str(tmp_path / name)
        for name in ("first", "second")
    )
    write_adapter(tmp_path / "loras" / "rust")
    assert icm("init", first, "--blobs", location).code == 0
    assert icm("ingest", tmp_path / "loras", "--store", first).code == 0
    before = icm("ls", "--json", "--store", first).document
    ran = icm("init", second, "--blobs", location)
    assert (ran.code, "--recover" in ran.err) == (ExitCode.NO_STORE, True)
    ran = icm("init", second, "--blobs", location, "--recover", "--json")  # as if the first one was lost
    assert (ran.code, ran.document["recovered_count"]) == (0, 1), ran.err
    assert icm("ls", "--json", "--store", second).document == before
    assert icm("verify", "--read-data", "--store", second).code == 0
    if place == "database":
        psycopg = pytest.importorskip("psycopg")
        with psycopg.connect(second, autocommit=True) as server:
            server.execute("DELETE FROM meta")
        assert "--recover" in icm("ls", "--store", second).err
        assert icm("init", second, "--blobs", location, "--recover").code == 0
        assert icm("ls", "--json", "--store", second).document == before
        assert icm("init", second, "--blobs", location, "--recover").code == ExitCode.NO_STORE


def test_a_place_without_files_is_not_recovered(url: str, tmp_path: Path, icm: Icm) -> None:
    (tmp_path / "blobs").mkdir()
    for store in (url, str(tmp_path / "new")):
        assert icm("init", store, "--blobs", tmp_path / "blobs", "--recover").code == ExitCode.UNAVAILABLE
        assert icm("ls", "--store", store).code == ExitCode.NO_STORE
    assert icm("init", url, "--recover").code == ExitCode.USAGE
