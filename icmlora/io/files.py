"""Careful reading of files from outside, as `registry.files` does it, with the errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput
from registry import files
from registry.errors import SourceRefused


@contextmanager
def open_regular(path: Path, *, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Open a regular file of bounded size and yield its descriptor and size; see `registry.files.open_plain`."""
    with _refusals(), files.open_plain(path, max_bytes=max_bytes) as opened:
        yield opened


def read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`."""
    with _refusals():
        return files.read_exactly(descriptor, size, offset)


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole regular file of bounded size."""
    with _refusals():
        return files.read_plain(path, max_bytes=max_bytes)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except SourceRefused as error:
        kind = AdapterRefused if error.reason == "unreadable" else UnsafeInput
        raise kind(error.message, kind=error.reason, path=error.path, hint=error.hint) from None
