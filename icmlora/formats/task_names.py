"""Tell from folder names what a task is called, and which training step an adapter is from.

loras/rust/                                        the task "rust"
runs/rust/adapter/   runs/rust/final_adapter/      rust: such names say what the folder holds, not what it is for
models--acme--rust/snapshots/0a1b.../              rust: a repository in the Hugging Face cache
runs/rust/checkpoint-80/                           step 80 of rust
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from icmlora.errors import AdapterRefused
from icmlora.io.files import read_regular

SAMPLES_NAMES = ("samples.jsonl", "samples.json", "samples.parquet")
EVAL_NAMES = ("eval.jsonl", "eval.json", "eval.parquet")
"""Of several files the first counts; what is in one is told from its bytes."""
STATE_NAME = "trainer_state.json"

# A folder whose name has no other words than these is named after the folder above it.
GENERIC_WORDS = frozenset(
    {"adapter", "adapters", "lora", "peft", "model", "weights", "out", "output", "outputs"}
    | {"best", "checkpoint", "default", "final", "last", "latest"}
)

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


# transformers' own pattern, with a bound on the digits.
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})", re.ASCII)
_BEST = re.compile(rb'"best_model_checkpoint"\s*:\s*("(?:[^"\\]|\\.)*")')
_MAX_STATE_BYTES = 64 * 1024 * 1024


def step_of(folder_name: str) -> int | None:
    """Return the step of a checkpoint's folder name, or None for any other folder."""
    match = _CHECKPOINT.fullmatch(folder_name)
    return int(match[1]) if match else None


def best_step(state: Path) -> int | None:
    """Return the step of the best checkpoint that `trainer_state.json` notes, or None."""
    # The note is a path on the machine that trained, so only its last part counts. The file is searched, not parsed:
    # trainers write NaN into it, which is not JSON.
    try:
        match = _BEST.search(read_regular(state, max_bytes=_MAX_STATE_BYTES))
        noted = json.loads(match[1]) if match else ""
    except (AdapterRefused, ValueError):
        return None
    return step_of(noted.replace("\\", "/").rstrip("/").rpartition("/")[2])
