"""With a real PgBouncer: session pooling works, transaction pooling is refused."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from registry.errors import RegistryError
from registry.names import DatabaseUrl
from registry.store import Store
from tests.pg_server import new_database
from tests.registry.examples import ingest

PROGRAM = shutil.which("pgbouncer")
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed"),
    pytest.mark.kept_in("sqlite", "folder", reason="it has servers of its own"),
]


@contextmanager
def pool(url: str, mode: str) -> Iterator[str]:
    """Run a pool in front of a database, and yield the address of the database by way of it."""
    match = re.search(r"/(\w+)\?host=(.+)", url)
    assert match is not None
    assert PROGRAM is not None
    name, folder = match.groups()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"listen_addr": "127.0.0.1", "listen_port": port, "unix_socket_dir": "", "auth_type": "any"}
    lines = [f"{key} = {value}" for key, value in (settings | {"pool_mode": mode}).items()]
    with TemporaryDirectory(prefix="icm-pool-") as place:
        file = Path(place) / "pool.ini"
        file.write_text("\n".join([f"[databases]\n{name} = host={folder} user=postgres\n[pgbouncer]", *lines, ""]))
        file.chmod(0o644)
        Path(place).chmod(0o755)
        # As the user who may use the socket of the server.
        running = subprocess.Popen([PROGRAM, "-q", str(file)], user=Path(folder).owner(), stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield f"postgresql://postgres@127.0.0.1:{port}/{name}"
        finally:
            running.kill()
            running.wait()


@pytest.fixture
def url(postgres: str, tmp_path: Path) -> str:
    url = new_database(postgres)
    Store.open(url, create=True, blobs=str(tmp_path / "blobs")).close()
    return url


def test_a_pool_of_sessions_is_like_the_server(url: str) -> None:
    with pool(url, "session") as address, Store.open(address) as store:
        ingest(store, "rust")
        assert list(store.verify(read_data=True)) == []


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_pool_that_breaks_locks_is_refused(url: str, mode: str) -> None:
    with pool(url, mode) as address, pytest.raises(RegistryError):
        Store.open(address)


def test_a_pool_of_transactions_is_told(url: str) -> None:
    from registry.storage.server import examine_server

    with pool(url, "transaction") as address:
        assert examine_server(DatabaseUrl(address), "icm").is_pooled
        with pytest.raises(RegistryError, match="a new session for each transaction"):
            Store.open(address)
    assert not examine_server(DatabaseUrl(url), "icm").is_pooled
