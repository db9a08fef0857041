"""A fork of a process with an open store in PostgreSQL harms nothing, and gets an error that asks to open it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from registry.store import Store
from tests.pg_server import new_database

# The parent has a lock when it forks, and two open transactions if it is busy, and continues with them.
_SCRIPT = """
import gc, os, sys
from sqlalchemy import text
from registry.errors import StoreUnavailable, StoreLocked
from registry.store import Store
from dataclasses import replace
from tests.registry.examples import BASE, ingest

url, folder, child, is_busy = sys.argv[1:]

def fork():
    pid = os.fork()
    if pid == 0:
        exec(child, globals())
        sys.exit(0)  # with the end of each block, and of each object
    os.waitpid(pid, 0)
    gc.collect()

store = Store.open(url, create=True, blobs=folder)
ingest(store, "poems")
with store.job(BASE):
    if is_busy:
        with store._db.read() as reading, store._db.write() as writing:
            reading.execute(text("SELECT 1"))
            writing.execute(text("UPDATE refs SET note = 'from the parent'"))
            fork()
            assert reading.scalar(text("SELECT count(*) FROM refs")) == 1
    else:
        fork()
        store.update("poems", lambda task: replace(task, note="from the parent"))
    with Store.open(url, lock_timeout=0) as other:
        try:
            with other.job(BASE):
                print("it lost its locks")
        except StoreLocked:
            print("it goes on")
store.close()
"""


def forked(url: str, folder: Path, child: str, *, is_busy: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _SCRIPT, url, str(folder), child, "busy" if is_busy else ""]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    with Store.open(url) as store:
        assert next(store.rows()).note == "from the parent"
    return ran


@pytest.mark.one_case
@pytest.mark.parametrize(
    "child",
    [
        "",
        "os._exit(0)",
        "store.close()",
        "del globals()['store'], globals()['reading']; gc.collect()",
        "reading.execute(text('SELECT 1'))",
        "writing.execute(text('UPDATE refs SET note = NULL')); writing.commit()",
    ],
)
def test_whatever_the_copy_does_the_locks_and_transactions_of_the_parent_go_on(
    postgres: str, tmp_path: Path, child: str
) -> None:
    ran = forked(new_database(postgres), tmp_path / "blobs", child, is_busy=True)
    assert ran.stdout.splitlines()[-1] == "it goes on"


@pytest.mark.one_case
@pytest.mark.parametrize(
    "use", ["list(store.tasks())", "store.job(BASE).__enter__()", "store.remove(store.named(['poems']))"]
)
def test_a_copy_that_uses_the_store_is_told_to_open_it_anew(postgres: str, tmp_path: Path, use: str) -> None:
    child = f"""
try:
    {use}
except StoreUnavailable as error:
    print(error, error.hint, sep="; ", flush=True)
os._exit(0)
"""
    told = forked(new_database(postgres), tmp_path / "blobs", child).stdout
    assert "was opened before this process was forked; open the store in each process after the fork" in told


def test_a_copy_that_opens_the_store_anew_can_use_it(postgres: str, tmp_path: Path) -> None:
    child = """
with Store.open(url) as own:
    print(own.names(), flush=True)
os._exit(0)
"""
    assert "['poems']" in forked(new_database(postgres), tmp_path / "blobs", child).stdout
