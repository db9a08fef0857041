"""The team's page: the rights that it gives are enough for every command, and what a reader may not do is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import LABEL, write_mixed_fleet
from tests.docs.pages import ROOT
from tests.icmlora.tiny_base import write_tiny_base
from tests.pg_server import dump, new_database, restore
from tests.s3_server import CannotStart, s3_server

FILES = ROOT / "docs" / "guides" / "team"
BLOBS = "s3://loras/fleet"
KEYS = {"icm_owner": "writer", "ana": "writer", "ben": "reader"}
"""Login -> whose keys of the bucket it has."""
As = Callable[..., Ran]


@dataclass(frozen=True)
class Team:
    """A database and a bucket that are set up as the page says.

    Attributes:
        server: The address of the server for the administrator.
        database: That of the team's database.
        identities: Name -> the variables with which somebody finds the bucket.
    """

    server: str
    database: str
    identities: dict[str, dict[str, str]]

    def address(self, user: str) -> str:
        """Return the address of the store for somebody."""
        return self.database.replace("postgres:@", f"{user}:@")


@pytest.fixture(scope="module")
def team(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A real PostgreSQL and a real S3 server with the files of the page, and a login for each role."""
    import psycopg

    others = json.loads((FILES / "s3.json").read_text())["identities"]
    database = new_database(postgres)
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute((FILES / "roles.sql").read_text().encode())
        admin.execute("CREATE ROLE ana LOGIN IN ROLE icm_writer; CREATE ROLE ben LOGIN IN ROLE icm_reader")
    try:
        with s3_server(tmp_path_factory.mktemp("s3"), others[1:]) as objects:
            keys = {other["name"]: other["credentials"][0] for other in others}
            names = {
                name: objects.environment
                | {"AWS_ACCESS_KEY_ID": key["accessKey"], "AWS_SECRET_ACCESS_KEY": key["secretKey"]}
                for name, key in keys.items()
            }
            _make_bucket(objects.environment)
            yield Team(postgres, database, names)
    except CannotStart as error:
        pytest.skip(str(error))


def _make_bucket(environment: dict[str, str]) -> None:
    """Write the first object, as an administrator."""
    import obstore
    from obstore.store import from_url

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        obstore.put(from_url("s3://loras", client_options={"allow_http": True}), "first", b"")


@pytest.fixture
def run_as(team: Team, icm: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> As:
    """Return a function that runs a command on the team's store as somebody."""

    def call(user: str, *arguments: object) -> Ran:
        for name, value in team.identities[KEYS[user]].items():
            monkeypatch.setenv(name, value)
        return icm("--store", team.database.replace("postgres:@", f"{user}:@"), *arguments)

    return call


def test_the_rights_of_the_page_are_enough(run_as: As, tmp_path: Path) -> None:
    loras, base = write_mixed_fleet(tmp_path / "loras"), write_tiny_base(tmp_path / "base")
    quickly = ("--refine", "0", "--no-eval", "--steps", "12", "--device", "cpu")
    steps = [
        ("icm_owner", "init", "--blobs", BLOBS),
        ("ana", "base", "add", LABEL, base),
        ("ana", "ingest", loras, "--device", "cpu"),
        ("ana", "train", *quickly),
        ("ana", "encode", "--max-error", "0.9"),
        ("ana", "eval", "--device", "cpu"),
        ("ana", "edit", "poems", "--tag", "prod"),
        ("ana", "evict", "poems", "--max-error", "10"),
        ("ana", "verify", "--read-data"),
        ("ana", "prune"),
        ("ana", "doctor"),
        ("ben", "ls"),
        ("ben", "base", "add", "my/copy", base),  # of the same files, which a writer would join
        ("ben", "base", "rm", "my/copy"),
        ("ben", "show", "rules"),
        ("ben", "stats"),
        ("ben", "verify", "--read-data"),
        ("ben", "materialize", "poems", "-o", tmp_path / "poems"),
        ("ben", "materialize", "rules", "--source", "original", "-o", tmp_path / "rules"),
        ("ben", "duplicates"),
        ("ben", "export", tmp_path / "fleet.icm"),
        ("ben", "report", "-o", tmp_path / "report.html"),
    ]
    for user, *arguments in steps:
        ran = run_as(user, *arguments)
        assert ran.code == 0, f"{user}: icm {arguments[0]}: {ran.err}"
    # A reader is refused, and nothing is half done.
    for arguments in (["rm", "rules", "--yes"], ["edit", "rules", "--tag", "x"], ["prune"], ["ingest", loras]):
        ran = run_as("ben", *arguments)
        assert ran.code in (ExitCode.FAILED, ExitCode.UNAVAILABLE), ran.err
        assert re.search("hint: (ask the database administrator|check that the credentials)", ran.err), ran.err
    assert run_as("ben", "ls", "-q").out.split() == ["poems", "rules", "silent"]
    assert run_as("ana", "rm", "silent", "--yes").code == 0


def test_a_dump_comes_back_as_the_page_says(
    team: Team, tmp_path: Path, icm: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in team.identities["writer"].items():
        monkeypatch.setenv(name, value)
    database, file = new_database(team.server), tmp_path / "fleet.sql"
    restored = new_database(team.server)
    assert icm("init", database, "--blobs", f"{BLOBS}-dumped").code == 0
    assert icm("--store", database, "ingest", write_mixed_fleet(tmp_path / "loras"), "--no-vectors").code == 0
    file.write_text(dump(database))
    restore(restored, file)
    verified = icm("--store", restored, "verify", "--read-data")
    assert verified.code == 0, verified.err
    assert icm("--store", restored, "ls", "-q").out.split() == ["poems", "rules", "silent"]


def test_the_compose_file_names_files_that_are_there() -> None:
    named = re.findall(r"- \./(\S+?):", (FILES / "compose.yaml").read_text())
    assert named
    assert all((FILES / name).is_file() for name in named)
