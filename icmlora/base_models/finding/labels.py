"""Names of base models: an adapter's label, revision and folder combined into one unambiguous name.

    "org/name"                            org/name
    "org/name", revision "abc123"         org/name@abc123
    "/models/llama"                       /models/llama
    "./llama" of /loras/poems             /loras/llama: in the first folder above the adapter that has such a model

A hub name has no `@`, so the two parts can be split again. Never imports torch, never uses the network.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from icmlora.base_models.finding.lookup import inspect_base
from icmlora.errors import BaseModelNotFound

_MAIN = (None, "", "main")
_LEVELS = 4  # the adapter's folder and three above it, because trainers write to `outputs/run/checkpoint-N`


def full_label(label: str | None, revision: str | None, place: Path, task_folder: Path) -> str | None:
    """Return the name of an adapter's base model, or None if the adapter names none.

    Args:
        label: From the adapter: a hub name, or a path on the machine where it was trained.
        revision: From the adapter; null and "main" are the same. A folder has no revision.
        place: The adapter's folder.
        task_folder: The folder of its training run; a path that does not exist is resolved next to this folder.
    """
    if not label:
        return None
    if os.path.isabs(label):
        return label
    # The trainer resolved `label` in its current directory, usually some folder above its output.
    place = place.absolute()
    for folder in (place, *place.parents)[:_LEVELS]:
        try:
            return str(inspect_base(label, folder / label).path.resolve())
        except (BaseModelNotFound, OSError, ValueError):  # an unusable label (NUL, too long) is not a path here
            continue
    if _must_be_path(label):
        return os.path.normpath(task_folder.absolute().parent / label)
    return label if revision in _MAIN else f"{label}@{revision}"


def typed_label(label: str) -> str:
    """Return the name of a base model that a user typed; make a path absolute from the current directory."""
    is_path = label.startswith("~") or os.path.isabs(label) or _must_be_path(label)
    return str(Path(label).expanduser().absolute()) if is_path else label


def named_by(label: str, known: Sequence[str]) -> list[str]:
    """Return the known names that end with a relative path that a user typed.

    An adapter's configuration may have that relative path; ingestion made it absolute.
    """
    if not _must_be_path(label) or os.path.isabs(label) or label.startswith("~"):
        return []
    end = Path(os.path.normpath(label)).parts
    return [name for name in known if os.path.isabs(name) and Path(name).parts[-len(end) :] == end]


def lookalikes(labels: Iterable[str]) -> list[list[str]]:
    r"""Group labels that may mean the same model: equal last parts, ignoring case, punctuation and revision.

    `google/gemma-3-270m-it`, `gemma3-270m-it`, `/models/gemma-3-270m-it` and `C:\models\gemma-3-270m-it` are alike.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        parts = [part for part in label.partition("@")[0].replace("\\", "/").split("/") if part]
        cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]  # the hub's cache
        last = (cached or parts or [label])[-1].lower().removesuffix(".gguf")
        groups["".join(filter(str.isalnum, last))].append(label)
    return [group for group in groups.values() if len(group) > 1]


def _must_be_path(label: str) -> bool:
    """Return whether a label is neither `name` nor `owner/name` and so not a hub name."""
    return label.startswith(".") or label.endswith(("/", ".gguf")) or label.count("/") > 1
