"""Tell from folder names what a task is called, and which training step an adapter is from.

loras/rust/                                        the task "rust"
runs/rust/adapter/   runs/rust/final_adapter/      rust: such names say what the folder holds, not what it is for
runs/rust/unet/                                    rust-unet: a part of rust
runs/rust/adapter_seed123/                         rust-adapter_seed123: one of several trainings of rust
models--acme--rust/snapshots/0a1b.../              rust: a repository in the Hugging Face cache
runs/rust/checkpoint-80/   runs/rust/epoch_2/      steps 80 and 2 of rust
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from itertools import islice
from pathlib import Path

from icmlora.errors import AdapterRefused
from icmlora.io.files import read_regular
from registry.names import MAX_NAME, MAX_NAME_BYTES, is_name_character, task_name_problem

SAMPLES_NAMES = ("samples.jsonl", "samples.json", "samples.parquet")
EVAL_NAMES = ("eval.jsonl", "eval.json", "eval.parquet")
"""Of several files the first counts; what is in one is told from its bytes."""
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
"""Endings of images in a folder of examples."""
STATE_NAME = "trainer_state.json"

# A folder whose name has no other words than these is named after the folder above it.
GENERIC_WORDS = frozenset(
    {"adapter", "adapters", "lora", "peft", "model", "weights", "out", "output", "outputs"}
    | {"best", "checkpoint", "default", "final", "last", "latest"}
)
# Such a folder holds a part of a run, or one of several runs, so its task is always named after the folder above too.
_PARTS = re.compile(
    r"unet|transformer|vae|text_encoder(_\d)?|prior|controlnet|pissa_(init|backup|converted)"
    rf"|({'|'.join(sorted(GENERIC_WORDS))})[-_](.+[-_])?(seed|stage|fold|run|phase|round|trial|rank)[-_]?\d+",
    re.IGNORECASE,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"models--(?:(?P<owner>.+)--)?(?P<name>.+)")
_SHORT_HASH = 8
_MAX_LEVELS = 16
_LONGEST = 4096
# Combining marks at the start belong to no letter.
_NO_START = re.compile(r"^[\W_]+")


def naming_folder(folder: Path) -> Path:
    """Return the folder itself, or the nearest above it whose name says something; the folder if there is none."""
    return next((place for place in (folder, *folder.parents) if place.name and not is_generic(place.name)), folder)


def run_folder(folder: Path, levels: int = 2) -> tuple[Path, int | None]:
    """Return the folder of the run that an adapter's folder belongs to, and its step, from its last few names."""
    # `run/checkpoint-80` belongs to `run`. PEFT saves an adapter that is not called "default" one level deeper: so
    # `run/checkpoint-80/NAME` belongs to `run/NAME`, where the same trainer puts the final adapter.
    parts = folder.parts
    for index in range(len(parts) - 1, max(0, len(parts) - 1 - levels), -1):
        step = step_of(parts[index])
        if step is not None:
            return Path(*parts[:index], *parts[index + 1 :]), step
    return folder, None


def names_above(folder: Path) -> list[str]:
    """Return the names of a telling folder and of those above it, without names that say nothing."""
    # A snapshot in the Hugging Face cache counts as its repository and the owner of that.
    repository = _snapshot_of(folder)
    if repository is not None and (match := _REPOSITORY.fullmatch(repository.name)) is not None:
        name = match["name"]
        if _main_commit(repository) not in (None, folder.name):
            name = f"{name}-{folder.name[:7]}"
        return [name, *filter(None, [match["owner"]]), folder.name[:7], *_telling(repository.parent)]
    return [folder.name, *_above(folder)]


def name_chain(folder: Path, part: str | None = None) -> list[str]:
    """Return the names that a task can have, the best first: its own, then longer ones that start with its parents'.

    Args:
        folder: The folder that the task is named after.
        part: What tells the task from another one that is named after this folder.
    """
    first, *above = names_above(folder)
    if above and _PARTS.fullmatch(first):
        first = f"{above.pop(0)}-{first}"
    return chain_of(first if part is None else f"{first}-{part}", above, folder)


def chain_of(first: str, above: list[str], folder: Path) -> list[str]:
    """Return a name, and longer ones with the names above it in front; the last one belongs to this folder alone."""
    names, joined = [plain_name(first)], first
    for parent in above[:_MAX_LEVELS]:
        joined = f"{parent}-{joined}"
        names.append(plain_name(joined))
    names.append(plain_name(f"{names[0]}-{_hash(str(folder))}"))
    return list(dict.fromkeys(names))


def plain_name(name: str) -> str:
    """Return a name as a task can have it: composed (NFC), and what is no letter, digit, `.`, `_` or `-` replaced."""
    # Characters that only steer how others are shown are left out, so that a word does not become two.
    seen = name[:_LONGEST]
    if not seen.isascii():
        seen = "".join(char for char in seen if unicodedata.category(char) != "Cf")
    composed = unicodedata.normalize("NFC", seen)
    if task_name_problem(composed) is None:
        return composed
    words = "".join(char if is_name_character(char) else " " for char in composed).split()
    plain = _NO_START.sub("", "-".join(words)).rstrip("-._")
    if len(plain) > MAX_NAME or len(plain.encode()) > MAX_NAME_BYTES:
        return f"{_cut(plain)}-{_hash(name)}"
    # Nothing may be left, and Windows reserves some names.
    return plain if task_name_problem(plain) is None else f"{plain or 'task'}-{_hash(name)}"


def _cut(name: str) -> str:
    """Return the start of a name with room for a hash after it."""
    data = name[: MAX_NAME - _SHORT_HASH - 1].encode()[: MAX_NAME_BYTES - _SHORT_HASH - 1]
    return data.decode("utf-8", "ignore")


def cached_repository(path: Path) -> Path | None:
    """Return the folder of a repository in the Hugging Face cache whose snapshot holds a path, or None."""
    for place in path.parents:
        if place.name == "snapshots" and _REPOSITORY.fullmatch(place.parent.name):
            return place.parent
    return None


def is_generic(name: str) -> bool:
    """Say whether a folder's name says what the folder holds, and not what it is for."""
    return all(word in GENERIC_WORDS for word in re.split("[-_]", name.lower()))


def _above(folder: Path) -> list[str]:
    """Return the telling names above a folder; above a snapshot's subfolders come its repository and owner."""
    names: list[str] = []
    for place in islice(folder.parents, _MAX_LEVELS):
        if _snapshot_of(place) is not None:
            return names + names_above(place)
        if place.name and not is_generic(place.name):
            names.append(place.name)
    return names


def _telling(folder: Path) -> list[str]:
    return [*([] if not folder.name or is_generic(folder.name) else [folder.name]), *_above(folder)]


def _snapshot_of(folder: Path) -> Path | None:
    """Return the repository in the Hugging Face cache whose snapshot a folder is, or None."""
    if _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots":
        repository = folder.parent.parent
        return repository if _REPOSITORY.fullmatch(repository.name) else None
    return None


def _main_commit(repository: Path) -> str | None:
    """Return the commit that `main` of a cached repository stands for, or None."""
    try:
        text = read_regular(repository / "refs" / "main", max_bytes=256).decode("ascii", "replace").strip()
    except AdapterRefused:
        return None
    return text if _COMMIT.fullmatch(text) else None


def _hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:_SHORT_HASH]


# What trainers call the folder of a step: transformers and trl, torchtune, FSDP and loops that people write.
_STEP = re.compile(r"(?:checkpoint[-_]|epoch[-_]|step[-_]|iter[-_]|global_step_?)(\d{1,12})", re.ASCII)
_BEST = re.compile(rb'"best_model_checkpoint"\s*:\s*("(?:[^"\\]|\\.)*")')
_MAX_STATE_BYTES = 64 * 1024 * 1024


def step_of(folder_name: str) -> int | None:
    """Return the step of a checkpoint's folder name, or None for any other folder."""
    match = _STEP.fullmatch(folder_name)
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
