"""Write a store and a bundle with this icm, for every later one to open: `python -m tests.golden.build /srv/fleet`.

    tests/golden/icm-0.9.0/store.tar.gz     a store with an original, a pinned one with a residual, and an evicted one
    tests/golden/icm-0.9.0/fleet.icm        a bundle of the same tasks
    tests/golden/icm-0.9.0/adapters/        what its tasks materialize to

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

HERE = Path(__file__).parent
WRITTEN = HERE / f"icm-{version('icm-lora')}"
TASKS = {"poems": "code", "rules": "original", "silent": "residual"}
"""The tasks, each with the source that its adapter is kept from."""


def build(folder: Path, work: Path) -> None:
    """Write store, bundle and adapters into a folder that is not there yet."""
    store = build_ingested(work, vectors=True)
    train_store(store)
    icm_quietly(store, "encode", "silent", "--residual", "--max-error", "0.1")
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
    with tarfile.open(folder / "store.tar.gz", "w:gz") as archive:
        archive.add(store, "store", filter=_plain)


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
