"""Derive task names and training steps from folder names.

loras/rust/                                        the task "rust"
runs/rust/adapter/   runs/rust/final_adapter/      rust: such names describe the content, not the purpose
runs/rust/unet/                                    rust-unet: a part of rust
runs/rust/adapter_seed123/                         rust-adapter_seed123: one of several training runs of rust
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
"""The first existing file is used; its format is detected from its bytes."""
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
"""Suffixes of images in a folder of examples."""
STATE_NAME = "trainer_state.json"

# A folder whose name has only these words is named after its parent folder.
GENERIC_WORDS = frozenset(
    {"adapter", "adapters", "lora", "peft", "model", "weights", "out", "output", "outputs"}
    | {"best", "checkpoint", "default", "final", "last", "latest"}
)
# Such a folder holds a part of a run, or one of several runs, so its task name includes the parent folder.
_PARTS = re.compile(
    r"unet|transformer|vae|text_encoder(_\d)?|prior|controlnet|pissa_(init|backup|converted)"
    rf"|({'|'.join(sorted(GENERIC_WORDS))})[-_](.+[-_])?(seed|stage|fold|run|phase|round|trial|rank)[-_]?\d+",
    re.IGNORECASE,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"models--(?:(?P<owner>.+)--)?(?P<name>.+)")
_SHORT_HASH = 8
_MAX_LEVELS = 16
_MAX_INPUT_LENGTH = 4096
# Drop leading combining marks, which belong to no letter.
_NO_START = re.compile(r"^[\W_]+")


def naming_folder(folder: Path) -> Path:
    """Return the nearest folder with a specific name, starting at `folder`; `folder` if there is none."""
    return next((place for place in (folder, *folder.parents) if place.name and not is_generic(place.name)), folder)


def run_folder(folder: Path, levels: int = 2) -> tuple[Path, int | None]:
    """Return the run folder and step of an adapter's folder, from the last `levels` path parts."""
    # `run/checkpoint-80` belongs to `run`. PEFT saves an adapter not named "default" one level deeper, so
    # `run/checkpoint-80/NAME` belongs to `run/NAME`, where the same trainer saves the final adapter.
    parts = folder.parts
    for index in range(len(parts) - 1, max(0, len(parts) - 1 - levels), -1):
        step = step_of(parts[index])
        if step is not None:
            return Path(*parts[:index], *parts[index + 1 :]), step
    return folder, None


def names_above(folder: Path) -> list[str]:
    """Return the names of a folder and its parents, without generic names of parents."""
    # A snapshot in the Hugging Face cache counts as its repository and the repository's owner.
    repository = _snapshot_of(folder)
    if repository is not None and (match := _REPOSITORY.fullmatch(repository.name)) is not None:
        name = match["name"]
        if _main_commit(repository) not in (None, folder.name):
            name = f"{name}-{folder.name[:7]}"
        return [name, *filter(None, [match["owner"]]), folder.name[:7], *_informative(repository.parent)]
    return [folder.name, *_above(folder)]


def name_chain(folder: Path, part: str | None = None) -> list[str]:
    """Return candidate names of a task, best first: its own, then longer names prefixed with its parents'.

    Args:
        folder: The folder that the task is named after.
        part: Distinguishes the task from other tasks that are named after this folder.
    """
    first, *above = names_above(folder)
    if above and _PARTS.fullmatch(first):
        first = f"{above.pop(0)}-{first}"
    return chain_of(first if part is None else f"{first}-{part}", above, folder)


def chain_of(first: str, above: list[str], folder: Path) -> list[str]:
    """Return a name, then longer names prefixed with parent names; the last is unique to this folder."""
    names, joined = [plain_name(first)], first
    for parent in above[:_MAX_LEVELS]:
        joined = f"{parent}-{joined}"
        names.append(plain_name(joined))
    names.append(plain_name(f"{names[0]}-{_hash(str(folder))}"))
    return list(dict.fromkeys(names))


def plain_name(name: str) -> str:
    """Return a valid task name: NFC, with all but letters, digits, `.`, `_` and `-` replaced."""
    # Drop formatting characters, which would split a word.
    seen = name[:_MAX_INPUT_LENGTH]
    if not seen.isascii():
        seen = "".join(char for char in seen if unicodedata.category(char) != "Cf")
    composed = unicodedata.normalize("NFC", seen)
    if task_name_problem(composed) is None:
        return composed
    words = "".join(char if is_name_character(char) else " " for char in composed).split()
    plain = _NO_START.sub("", "-".join(words)).rstrip("-._")
    if len(plain) > MAX_NAME or len(plain.encode()) > MAX_NAME_BYTES:
        return f"{_cut(plain)}-{_hash(name)}"
    # The result may be empty, or a name that Windows reserves.
    return plain if task_name_problem(plain) is None else f"{plain or 'task'}-{_hash(name)}"


def _cut(name: str) -> str:
    """Return a name shortened to leave room for a hash."""
    data = name[: MAX_NAME - _SHORT_HASH - 1].encode()[: MAX_NAME_BYTES - _SHORT_HASH - 1]
    return data.decode("utf-8", "ignore")


def cached_repository(path: Path) -> Path | None:
    """Return the Hugging Face cache repository whose snapshot contains a path, or None."""
    for place in path.parents:
        if place.name == "snapshots" and _REPOSITORY.fullmatch(place.parent.name):
            return place.parent
    return None


def is_generic(name: str) -> bool:
    """Return whether a folder name describes only the content, such as `final_adapter`."""
    return all(word in GENERIC_WORDS for word in re.split("[-_]", name.lower()))


def _above(folder: Path) -> list[str]:
    """Return the specific names above a folder; a snapshot contributes its repository and owner."""
    names: list[str] = []
    for place in islice(folder.parents, _MAX_LEVELS):
        if _snapshot_of(place) is not None:
            return names + names_above(place)
        if place.name and not is_generic(place.name):
            names.append(place.name)
    return names


def _informative(folder: Path) -> list[str]:
    return [*([] if not folder.name or is_generic(folder.name) else [folder.name]), *_above(folder)]


def _snapshot_of(folder: Path) -> Path | None:
    """Return the Hugging Face cache repository of a snapshot folder, or None."""
    if _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots":
        repository = folder.parent.parent
        return repository if _REPOSITORY.fullmatch(repository.name) else None
    return None


def _main_commit(repository: Path) -> str | None:
    """Return the commit of `main` in a cached repository, or None."""
    try:
        text = read_regular(repository / "refs" / "main", max_bytes=256).decode("ascii", "replace").strip()
    except AdapterRefused:
        return None
    return text if _COMMIT.fullmatch(text) else None


def _hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:_SHORT_HASH]


# Step folders of transformers, trl, torchtune, FSDP and custom training loops.
_STEP = re.compile(r"(?:checkpoint[-_]|epoch[-_]|step[-_]|iter[-_]|global_step_?)(\d{1,12})", re.ASCII)
_BEST = re.compile(rb'"best_model_checkpoint"\s*:\s*("(?:[^"\\]|\\.)*")')
_MAX_STATE_BYTES = 64 * 1024 * 1024


def step_of(folder_name: str) -> int | None:
    """Return the step of a checkpoint's folder name, or None for any other folder."""
    match = _STEP.fullmatch(folder_name)
    return int(match[1]) if match else None


def best_step(state: Path) -> int | None:
    """Return the step of the best checkpoint in `trainer_state.json`, or None."""
    # The value is a path on the training machine, so only its last part counts. Search the file instead of parsing it:
    # trainers write NaN, which is not valid JSON.
    try:
        match = _BEST.search(read_regular(state, max_bytes=_MAX_STATE_BYTES))
        noted = json.loads(match[1]) if match else ""
    except (AdapterRefused, ValueError):
        return None
    return step_of(noted.replace("\\", "/").rstrip("/").rpartition("/")[2])
