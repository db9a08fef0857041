"""Where an adapter came from, stored in as few bytes as a trainer's habits allow.

A trainer puts a task's adapter into one folder and its checkpoints into `checkpoint-N` below it. So a task stores the
folder once, and an adapter stores its source only if it is another one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_CHECKPOINT = re.compile(r"/checkpoint-[0-9]+$")


def source_label(path: Path) -> str:
    """Return a path as text that every database takes: bytes that are not UTF-8 are written out in hexadecimal."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def task_folder(source: str) -> str:
    """Return the folder of a task whose final adapter came from `source`, which may be a checkpoint itself."""
    return _CHECKPOINT.sub("", source)


def usual_source(folder: str, step: int | None, *, is_final: bool) -> str:
    """Return where a trainer would have put an adapter of a task."""
    return folder if is_final or step is None else f"{folder}/checkpoint-{step}"


def unusual_source(source: str, folder: str, step: int | None, *, is_final: bool) -> str | None:
    """Return a source if it has to be stored, because it is not the usual one."""
    return None if source == usual_source(folder, step, is_final=is_final) else source
