"""Write a store and a bundle with this icm, for every later one to open: `python -m tests.golden.build /srv/fleet`.

    tests/golden/icm-0.11.0/store.tar.gz    a store with an original, a pinned one with a residual, and an evicted one
    tests/golden/icm-0.11.0/server.sql      the same tasks in PostgreSQL
    tests/golden/icm-0.11.0/blobs.tar.gz    the folder of that one's bytes
    tests/golden/icm-0.11.0/fleet.icm       a bundle of the same tasks
    tests/golden/icm-0.11.0/adapters/       what the tasks materialize to

The folder of the adapters is named on the command line, and made for the moment: a store notes where they came from.
What a release wrote is never written again: each version gets a folder of its own.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from tests.cli.tiny_fleet import build_ingested, icm_quietly, train_store
from tests.icmlora.tiny_base import LABEL
from tests.pg_server import dump, new_database, pg_server

HERE = Path(__file__).parent
WRITTEN = HERE / f"icm-{version('icm-lora')}"
TASKS = {"poems": "code", "rules": "original", "silent": "residual"}
"""The tasks, each with the source that its adapter is kept from."""


def build(folder: Path, work: Path) -> None:
    """Write store, bundle and adapters into a folder that is not there yet."""
    store = build_ingested(work, vectors=True)
    train_store(store)
    icm_quietly(store, "encode", "silent", "--residual", "--max-error", "0.1")
    icm_quietly(store, "encode", "poems", "--keep", "0.8", "--refine", "2", "--device", "cpu")
    icm_quietly(store, "eval", "rules", "--device", "cpu")
    icm_quietly(store, "edit", "rules", "--tag", "golden")
    icm_quietly(store, "edit", "rules", "--note", "kept for later versions")
    icm_quietly(store, "edit", "silent", "--pin")
    icm_quietly(store, "evict", "poems", "--max-error", "10")
    icm_quietly(store, "base", "rm", LABEL)  # its folder goes now
    folder.mkdir()
    icm_quietly(store, "export", folder / "fleet.icm")
    for task, source in TASKS.items():
        icm_quietly(store, "materialize", task, "--source", source, "-o", folder / "adapters" / task)
    _pack(store, folder / "store.tar.gz", "store")
    blobs, running = work / "blobs", work / "server"
    running.mkdir()
    with pg_server(running) as server:
        url = new_database(server)
        icm_quietly(url, "init", "--blobs", blobs)
        icm_quietly(url, "copy", store, url)
        (folder / "server.sql").write_text(dump(url))
    _pack(blobs, folder / "blobs.tar.gz", "blobs")


def _pack(source: Path, archive: Path, name: str) -> None:
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(source, name, filter=_plain)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out the reserve, who has had the locks, and who made the files and when."""
    if Path(member.name).name == "reserve" or Path(member.name).parent.name == "jobs":
        return None
    if Path(member.name).name.startswith("lock"):
        member.size = 0
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    target, work = WRITTEN, Path(sys.argv[1])
    if target.exists() or work.exists():
        sys.exit(f"{target} or {work} is there already, and stays as it is")
    try:
        build(target, work)
    finally:
        shutil.rmtree(work)
