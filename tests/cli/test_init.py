"""`icm init` makes a store where the rows and the bytes are elsewhere; the four commands work on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import LABEL
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
