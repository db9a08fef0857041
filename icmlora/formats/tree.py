"""Names of the files in an adapter's folder.

What the task of a folder is called: by the folder's own name, unless that says nothing of the task.

loras/rust/                                        rust
runs/rust/adapter/   runs/rust/final_adapter/      rust: such names say what lies there, not what it is for
models--acme--rust/snapshots/0a1b.../              rust, as the Hugging Face cache keeps a repository

What a Hugging Face Trainer leaves beside adapters: folders of checkpoints and a note of the best one.

Walk a tree from outside: no link out of it is followed, no special file is opened, no depth overflows a stack.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.io.files import read_regular
from registry.names import printable

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
SAMPLES_NAME = "samples.jsonl"
EVAL_NAME = "eval.jsonl"


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


STATE_NAME = "trainer_state.json"

# transformers' own pattern, with a bound on the digits.
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})", re.ASCII)
_BEST = re.compile(rb'"best_model_checkpoint"\s*:\s*("(?:[^"\\]|\\.)*")')
_MAX_STATE_BYTES = 64 * 1024 * 1024


def step_of(folder_name: str) -> int | None:
    """Return the step of a checkpoint's folder name, or None for any other folder."""
    match = _CHECKPOINT.fullmatch(folder_name)
    return int(match[1]) if match else None


def best_step(state: Path) -> int | None:
    """Return the step of the best checkpoint that `trainer_state.json` notes, or None.

    The note is a path on the machine that trained, so only its last part counts. The file is searched, not parsed:
    trainers write NaN into it, which is no JSON.
    """
    try:
        match = _BEST.search(read_regular(state, max_bytes=_MAX_STATE_BYTES))
        noted = json.loads(match[1]) if match else ""
    except (AdapterRefused, ValueError):
        return None
    return step_of(noted.replace("\\", "/").rstrip("/").rpartition("/")[2])


MAX_ENTRIES = 1_000_000

Refuse = Callable[[AdapterRefused], None]

# Output of `icmlora.output_folder` that is being built, or was when its process died.
_UNFINISHED = re.compile(r".+\.icm-[0-9a-f]{8}")


@dataclass(frozen=True)
class Folder:
    """One folder of the tree and the regular files in it.

    Attributes:
        path: The folder, without links.
        files: Name to real path; a link inside the tree is listed under its own name.
    """

    path: Path
    files: Mapping[str, Path]


def walk(root: Path, watched: Collection[str], refuse: Refuse) -> Iterator[Folder]:
    """Yield every folder of a tree, parents first, in order of names.

    A link to a folder inside the tree is skipped, because its target is met anyway; hidden folders are skipped too.

    Args:
        root: A real folder (no link).
        watched: File names whose links and special files are worth a refusal; others are ignored.
        refuse: Called with everything that was not followed or not readable.

    Raises:
        UnsafeInput: More than a million entries.
    """
    pending = [root]
    budget = MAX_ENTRIES
    while pending:
        path = pending.pop()
        try:
            with os.scandir(path) as scan:
                entries = []
                for entry in scan:
                    entries.append(entry)
                    budget -= 1
                    if budget < 0:
                        raise UnsafeInput(f"holds more than {MAX_ENTRIES:,} files", kind="limits", path=root)
        except OSError as error:
            refuse(AdapterRefused(f"cannot be read: {error.strerror}", kind="unreadable", path=path))
            continue
        entries.sort(key=lambda entry: entry.name)
        files, folders = _sort_entries(entries, root, watched, refuse)
        yield Folder(path, files)
        pending.extend(reversed(folders))


def _sort_entries(
    entries: list[os.DirEntry[str]], root: Path, watched: Collection[str], refuse: Refuse
) -> tuple[dict[str, Path], list[Path]]:
    files: dict[str, Path] = {}
    folders: list[Path] = []
    for entry in entries:
        if entry.is_symlink():
            target = _inside(entry, root, watched, refuse)
            if target is not None and target.is_file():
                files[entry.name] = target
        elif entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith(".") and not _UNFINISHED.fullmatch(entry.name):
                folders.append(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            files[entry.name] = Path(entry.path)
        elif entry.name in watched:
            refuse(UnsafeInput("not a regular file", kind="special-file", path=entry.path))
    return files, folders


def _inside(entry: os.DirEntry[str], root: Path, watched: Collection[str], refuse: Refuse) -> Path | None:
    """Resolve a link; None, and a refusal where it matters, if it leaves the tree, loops or leads nowhere."""
    try:
        target = Path(os.path.realpath(entry.path, strict=True))
    except OSError:
        if entry.name in watched:
            refuse(UnsafeInput("a symbolic link that leads nowhere", kind="symlink", path=entry.path))
        return None
    if target.is_relative_to(root):
        return target
    if entry.name in watched or target.is_dir():
        repository = cached_repository(Path(entry.path))
        hint = "give the folder it leads to, or one that holds both"
        if repository is not None:
            hint = f"give {printable(str(repository), 4096)}, which holds both, or a copy made with `cp -rL`"
        refuse(UnsafeInput("a symbolic link out of the folder given", kind="symlink", path=entry.path, hint=hint))
    return None
