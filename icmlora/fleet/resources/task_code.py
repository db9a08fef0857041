"""Replace the code of a task. Never imports torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from registry.manifests import Code, Task


def with_code(task: Task, code: Code) -> Task:
    """Return a task with another code, without the measurements of its earlier one."""
    kept = tuple(
        one
        for one in task.measured
        if one.generator is None or (one.source == "network" and one.generator == code.generator)
    )
    return replace(task, code=code, measured=kept)


def is_same_code(code: Code | None, other: Code | None) -> bool:
    """Return whether two codes have the same files."""
    if code is None or other is None:
        return code is other
    return (code.blob, code.generator) == (other.blob, other.generator)


def replaced_bytes(before: Iterable[Code | None], after: Iterable[Code | None], used: Collection[str] = ()) -> int:
    """Return the bytes of codes and networks that are not needed after replacing codes: what `icm prune` frees.

    `used` are further digests that stay needed.
    """
    files = {file: file.size for code in before if code is not None for file in (code.blob, code.generator)}
    needed = {file for code in after if code is not None for file in (code.blob, code.generator)}
    return sum(size for file, size in files.items() if file not in needed and file not in used)
