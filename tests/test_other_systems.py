"""Nothing that only POSIX has is needed to import icm, or to write and read a store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What libraries need of it they have by then: they have other ways where it is missing.
_HIDE = """
import os, signal, sys
import portalocker, sqlalchemy.orm
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
functions = "chown fork getgid geteuid getuid killpg pread preadv pwrite register_at_fork".split()
for name in [*functions, "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"]:
    delattr(os, name)
for name in "SIGHUP SIGKILL SIGPIPE SIGXCPU SIGXFSZ".split():
    delattr(signal, name)
os.supports_dir_fd.clear()
"""
_LIBRARIES = "import peft, torch, transformers\n"
_IMPORT = """
import importlib, pkgutil
for name in ("registry", "icmlora", "icm_cli"):
    package = importlib.import_module(name)
    for found in pkgutil.walk_packages(package.__path__, f"{name}."):
        importlib.import_module(found.name)
"""
_STORE = """
from pathlib import Path
from registry.files import read_plain
from registry.storage.blobs.cache import BlobCache
from tests.registry.examples import ingest, new_store
folder = Path(sys.argv[1])
with new_store(folder / "store") as store:
    ingest(store, "poems")
with new_store(folder / "store") as store, store.job("base"):
    final = store.task("poems").final
    assert store.blobs.read(final.weights) == b"weights of poems"
    store.remove(store.named(["poems"]))
    assert store.prune(grace=-1.0).blobs
cache = BlobCache(folder / "cache")
cache.put(final.weights, b"weights of poems")
assert cache.get(final.weights) == b"weights of poems"
(folder / "file").write_bytes(b"of\\r\\nlines")
assert read_plain(folder / "file") == b"of\\r\\nlines"
"""


def run(script: str, *arguments: str) -> None:
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_every_module_is_imported() -> None:
    run(_LIBRARIES + _HIDE + _IMPORT)


def test_a_store_is_written_read_and_pruned(tmp_path: Path) -> None:
    run(_HIDE + _STORE, str(tmp_path))
