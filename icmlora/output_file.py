"""Write one large file so that it appears as a whole or not at all, and stays after a crash.

The file grows as `NAME.icm-XXXXXXXX` beside the target, is made durable, and renamed. What a killed run left behind is
recognised by its lock, which died with the process, and removed by the next run for the same target.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from icmlora.errors import OutputExists
from icmlora.files import fsync_folder
from icmlora.leftovers import locked_beside, remove_leftovers


@contextmanager
def writing_file(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing; it is at `path` after the block, and not at all if the block raises.

    Args:
        path: The file; missing parents are made. A link is followed.
        force: Replace a file that exists.

    Raises:
        OutputExists: It exists and `force` is not given, or is no file.
        OSError: The file system refused; nothing was left at `path` that was not there.
    """
    target = Path(os.path.realpath(path))
    check_absent(path, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target, flags=os.O_NONBLOCK, remove=lambda entry: entry.unlink(missing_ok=True))
    temporary, descriptor = locked_beside(target, flags=os.O_WRONLY, create=partial(Path.touch, exist_ok=False))
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            check_absent(path, force=force)  # once more: writing took a while
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(target.parent)


def check_absent(path: Path, *, force: bool = False) -> None:
    """Check that a file can be written, before the work of making its content.

    Raises:
        OutputExists: As `writing_file`.
    """
    if path.exists() and not path.is_file():
        raise OutputExists("is not a file", path=path)
    if path.exists() and not force:
        raise OutputExists("exists already", path=path, hint="choose another name, or replace it with --force")
