"""What the task of a folder is called: by the folder's own name, unless that says nothing of the task.

loras/rust/                                        rust
runs/rust/adapter/   runs/rust/final_adapter/      rust: such names say what lies there, not what it is for
models--acme--rust/snapshots/0a1b.../              rust, as the Hugging Face cache keeps a repository
"""

from __future__ import annotations

import re
from pathlib import Path

GENERIC_WORDS = frozenset(
    {"adapter", "adapters", "lora", "peft", "model", "weights", "out", "output", "outputs"}
    | {"best", "checkpoint", "default", "final", "last", "latest"}
)
"""A folder whose name has no other words than these is called by the folder above it."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"models--(?:.+--)?(?P<name>.+)")


def telling_folder(folder: Path) -> Path:
    """Return the folder itself, or the nearest above it whose name says something; the folder if there is none."""
    return next((place for place in (folder, *folder.parents) if place.name and not _is_generic(place.name)), folder)


def name_of(folder: Path) -> str:
    """Return the name of a telling folder; of a snapshot in the Hugging Face cache, the repository's."""
    if _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots":
        repository = _REPOSITORY.fullmatch(folder.parent.parent.name)
        if repository is not None:
            return repository["name"]
    return folder.name


def cached_repository(path: Path) -> Path | None:
    """Return the folder of a repository in the Hugging Face cache whose snapshot holds a path, or None."""
    for place in path.parents:
        if place.name == "snapshots" and _REPOSITORY.fullmatch(place.parent.name):
            return place.parent
    return None


def _is_generic(name: str) -> bool:
    return all(word in GENERIC_WORDS for word in re.split("[-_]", name.lower()))
