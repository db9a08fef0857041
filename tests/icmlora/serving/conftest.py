"""A trained store of tiny adapters, one of them evicted, a bundle of it, and its base model; not to be changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from huggingface_hub import constants

from icm_cli.app import run
from tests.cli.tiny_fleet import icm_quietly
from tests.icmlora.tiny_base import LABEL
from tests.pg_proxy import MovingServer
from tests.pg_server import new_database
from tests.quick import quick_codes
from tests.s3_faults import FaultyServer
from tests.s3_server import S3Server
from tests.shared import built_once, use_config_of

__all__ = ["quick_codes"]


@pytest.fixture(autouse=True)
def deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have requests wait for a slow store, and see each change at once: on a busy machine a look may take long."""
    monkeypatch.setattr("icmlora.serving.tasks._PATIENCE", 10.0)
    monkeypatch.setattr("icmlora.serving.store._PATIENCE", 10.0)
    monkeypatch.setattr("icmlora.serving.store._COST", 0.0)


@dataclass(frozen=True)
class Served:
    """What a server is started with."""

    store: Path
    bundle: Path
    base: Path
    label: str = LABEL


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return name -> content of the files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="session")
def served_template(trained_template: Path, mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    def build(folder: Path) -> None:
        use_config_of(trained_template)
        shutil.copytree(trained_template, folder / "store")
        icm_quietly(folder / "store", "evict", "poems", "--max-error", "10")
        icm_quietly(folder / "store", "export", folder / "fleet.icm")

    folder = built_once(tmp_path_factory, "served", build)
    return Served(folder / "store", folder / "fleet.icm", mixed_template / "base")


@dataclass(frozen=True)
class Team:
    """The served store once more, in a database and a bucket.

    Attributes:
        url: Its address.
        database: What stands between clients and the database server.
        bucket: What stands between clients and the bucket.
    """

    url: str
    database: MovingServer
    bucket: FaultyServer


@pytest.fixture(scope="session")
def team_template(served_template: Served, postgres: str, s3: S3Server) -> str:
    """The address of a store that tests only read."""
    url = new_database(postgres)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        assert run(["init", url, "--blobs", f"s3://icm/{uuid4().hex}"]) == 0
        assert run(["-q", "copy", str(served_template.store), url]) == 0
    return url


@pytest.fixture
def team(
    team_template: str,
    served_template: Served,
    postgres: str,
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Team]:
    """The store by way of servers that may be away."""
    from registry.storage.blobs import objects

    use_config_of(served_template.store.parent)
    monkeypatch.setattr(objects, "_DEADLINE", 1.5)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))  # an empty cache
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with TemporaryDirectory() as folder:
        database, bucket = MovingServer(postgres, Path(folder)), FaultyServer(s3.endpoint)
        with database.running(), bucket.running():
            monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
            yield Team(database.address(team_template), database, bucket)


@pytest.fixture
def served(served_template: Served, tmp_path: Path) -> Served:
    """The same with a store of its own."""
    store = tmp_path / "served-store"
    shutil.copytree(served_template.store, store)
    use_config_of(served_template.store.parent)
    return Served(store, served_template.bundle, served_template.base)
