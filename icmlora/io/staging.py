"""Write a file or a folder so that it appears as a whole or not at all, and is still there after a crash.

    NAME.icm-XXXXXXXX  next to the target, locked  --fill--> --fsync--> --rename--> NAME

The process that builds an entry holds a lock on it. What a killed process left behind is therefore unlocked, and the
next run for the same target removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from icmlora.errors import OutputExists
from registry.files import fsync_dir, write_durably, write_file

_SUFFIX = re.compile(r"\.icm-[0-9a-f]{8}")


def locked_next_to(target: Path, *, flags: int, create: Callable[[Path], object]) -> tuple[Path, int]:
    """Make a new, locked entry `NAME.icm-XXXXXXXX` in the target's folder."""
    # Other runs see the entry before it is locked, and may take it for abandoned and remove it. They remove it under
    # the lock; so this checks, once it holds the lock, that the entry is still there, and else makes another one.
    while True:
        entry = target.with_name(f"{target.name}.icm-{secrets.token_hex(4)}")
        create(entry)
        try:
            descriptor = os.open(entry, flags)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(entry, descriptor):
            return entry, descriptor
        os.close(descriptor)


def remove_abandoned(target: Path, *, flags: int, remove: Callable[[Path], object]) -> None:
    """Remove what dead processes left behind for the same target."""
    # An entry that cannot be opened with `flags` is not ours and is left alone.
    for entry in target.parent.iterdir():
        suffix = entry.name.removeprefix(target.name)
        if suffix != entry.name and _SUFFIX.fullmatch(suffix):
            _remove_abandoned(entry, flags, remove)


def remove_all_abandoned(folder: Path) -> None:
    """Remove what dead processes left behind of folders that they were writing into `folder`."""
    for entry in folder.iterdir():
        if _SUFFIX.fullmatch(entry.name[-len(".icm-00000000") :]):
            _remove_abandoned(entry, os.O_DIRECTORY, _remove_folder)


def _remove_abandoned(entry: Path, flags: int, remove: Callable[[Path], object]) -> None:
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | flags)
    except OSError:
        return
    try:
        # Whoever builds the entry holds its lock, which dies with the process: no pid file can go stale.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        remove(entry)
    finally:
        os.close(descriptor)


def _is_at(entry: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(entry.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def writing_file(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing; it is at `path` after the block, and not at all if the block raises."""
    target = Path(os.path.realpath(path))
    check_absent(path, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target, flags=os.O_NONBLOCK, remove=lambda entry: entry.unlink(missing_ok=True))
    temporary, descriptor = locked_next_to(target, flags=os.O_WRONLY, create=partial(Path.touch, exist_ok=False))
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            # Content before name: after a crash the name must not lead to blocks that were never written.
            stream.flush()
            os.fsync(stream.fileno())
            check_absent(path, force=force)  # once more: writing took a while
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    # A rename survives a crash only once the folder that holds the name is synced.
    fsync_dir(target.parent)


def check_absent(path: Path, *, force: bool = False) -> None:
    """Check that a file can be written, before the work of making its content."""
    if path.exists() and not path.is_file():
        raise OutputExists("is not a file", path=path)
    if path.exists() and not force:
        raise OutputExists("already exists", path=path, hint="choose another name, or replace it with --force")


def write_files(folder: Path, files: Mapping[str, bytes], *, force: bool = False) -> None:
    """Write files into a folder that others share, each as a whole; the last one gives the others their meaning."""
    for name in files:
        check_absent(folder / name, force=force)
    for name, data in files.items():
        with writing_file(folder / name, force=force) as stream:
            stream.write(data)


def check_free(directory: Path, *, force: bool = False) -> None:
    """Check that a folder can be written, before the work of making its content."""
    if directory.exists() and not directory.is_dir():
        raise OutputExists("is not a folder", path=directory)
    if not force and directory.is_dir() and any(directory.iterdir()):
        hint = "choose another folder, or replace the adapter in it with --force"
        raise OutputExists("the folder is not empty", path=directory, hint=hint)
    target = Path(os.path.realpath(directory))
    place = next(parent for parent in target.parents if parent.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def write_folder(directory: Path, files: Mapping[str, bytes], *, force: bool = False) -> None:
    """Write files as the content of a folder, which may exist if it is empty."""
    # The last file is the one without which the folder means nothing. Under `force` files are replaced in this order
    # and others stay; if that is cut short, the last one is missing until the same is done again.
    check_free(directory, force=force)
    if force and directory.is_dir() and any(directory.iterdir()):
        _replace(_cleared(directory), files)
        return
    with building_folder(directory) as folder:
        for name, data in files.items():
            write_file(folder / name, data)


@contextmanager
def building_folder(directory: Path) -> Iterator[Path]:
    """Make a folder that takes the place of an absent or empty one after the block, unless the block raises."""
    # A link is followed. Files are to be synced in the block.
    target = _cleared(directory)
    folder, lock = locked_next_to(target, flags=os.O_DIRECTORY, create=Path.mkdir)
    try:
        yield folder
        fsync_dir(folder)
        try:
            # rename replaces an empty folder atomically, and fails on one that holds something.
            folder.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputExists("someone else filled the folder in the meantime", path=directory) from None
            raise
    finally:
        os.close(lock)
        _remove_folder(folder)
    fsync_dir(target.parent)


def _cleared(directory: Path) -> Path:
    """Return where a folder really is, or will be, once its parents are there and leftovers of killed runs are gone."""
    target = Path(os.path.realpath(directory))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target, flags=os.O_DIRECTORY, remove=_remove_folder)
    return target


def _replace(target: Path, files: Mapping[str, bytes]) -> None:
    """Replace files one by one, the last one missing until the end: a mixture of two adapters must not load."""
    (target / list(files)[-1]).unlink(missing_ok=True)
    fsync_dir(target)
    for name, data in files.items():
        write_durably(target / name, data)


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
