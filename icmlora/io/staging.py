"""Write files and folders atomically: the old content stays until the new content is complete.

    NAME.icm-XXXXXXXX  next to the target, locked  --fill--> --fsync--> --exchange--> NAME  --fsync--> remove the old

An error at any step, including the last sync, leaves the old content. A folder is exchanged as a whole. If that is
impossible (it contains folders, or is a mount point), its files are exchanged one by one: all of them are written and
synced before the first is renamed, and the file that makes the others valid is absent until the end.

The process that builds an entry holds a lock on it. Entries of killed processes are therefore unlocked, and the next
run for the same target removes them.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from icmlora.errors import OutputExists
from registry import files as fs

_SUFFIX = re.compile(r"\.icm-[0-9a-f]{8}")
_NOT_AS_A_WHOLE = {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP}


def _name_next_to(target: Path) -> Path:
    return target.with_name(f"{target.name}.icm-{secrets.token_hex(4)}")


def _locked_next_to(target: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """Create a locked entry `NAME.icm-XXXXXXXX` in the target's folder; `create` makes and opens it."""
    # Another run may see the entry before it is locked and remove it as abandoned. It does so under the lock, so check
    # with the lock held that the entry still exists, and retry otherwise.
    while True:
        entry = _name_next_to(target)
        try:
            descriptor = create(entry)
        except FileNotFoundError:
            if not target.parent.is_dir():
                raise
            continue
        try:
            fs.lock(descriptor, "alone", wait=True)
            if _is_at(entry, descriptor):
                return entry, descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _new_file(entry: Path) -> int:
    return fs.create(entry, 0o666)


def _new_folder(entry: Path) -> int:
    entry.mkdir()
    try:
        return os.open(entry, os.O_DIRECTORY)
    except OSError:
        with suppress(OSError):
            entry.rmdir()
        raise


def remove_abandoned(target: Path, *, flags: int, remove: Callable[[Path], object]) -> None:
    """Remove entries that dead processes left for the same target."""
    # Skip entries that cannot be opened with `flags`: they are not ours.
    for entry in target.parent.iterdir():
        suffix = entry.name.removeprefix(target.name)
        if suffix != entry.name and _SUFFIX.fullmatch(suffix):
            _remove_abandoned(entry, flags, remove)


def remove_all_abandoned(folder: Path) -> None:
    """Remove folders that dead processes left unfinished in `folder`."""
    for entry in folder.iterdir():
        if _SUFFIX.fullmatch(entry.name[-len(".icm-00000000") :]):
            _remove_abandoned(entry, os.O_DIRECTORY, _remove_folder)


def _remove_abandoned(entry: Path, flags: int, remove: Callable[[Path], object]) -> None:
    try:
        descriptor = fs.open_file(entry, os.O_RDONLY | flags)
    except OSError:
        return
    try:
        # The builder of an entry holds its lock, which dies with the process. A pid file could go stale.
        if fs.lock(descriptor, "alone"):
            remove(entry)
    except OSError:
        return
    finally:
        os.close(descriptor)


def _is_at(entry: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(entry.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def writing_file(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing; it appears at `path` after the block, unless the block raises."""
    check_absent(path, force=force)
    with _staged_file(Path(os.path.realpath(path))) as staged:
        temporary, descriptor, target = staged
        with open(descriptor, "wb", closefd=False) as stream:
            yield stream
            # Sync content before the rename: after a crash, the name must not lead to unwritten blocks.
            stream.flush()
        fs.fsync(descriptor)
        check_absent(path, force=force)  # again: writing took a while
        _publish([(temporary, target)])


@contextmanager
def _staged_file(target: Path) -> Iterator[tuple[Path, int, Path]]:
    """Yield a new file next to the target, its open descriptor, and the target; remove the file afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target, flags=os.O_NONBLOCK, remove=_discard)
    temporary, descriptor = _locked_next_to(target, _new_file)
    try:
        yield temporary, descriptor, target
    finally:
        _discard(temporary)
        os.close(descriptor)


def check_absent(path: Path, *, force: bool = False) -> None:
    """Check that a file can be written, before its content is computed; raises `OutputExists`."""
    if path.exists() and not path.is_file():
        raise OutputExists("is not a file", path=path)
    if path.exists() and not force:
        raise OutputExists("already exists", path=path, hint="choose another name, or replace it with --force")


def write_files(folder: Path, files: Mapping[str, bytes], *, force: bool = False) -> None:
    """Write files into a shared folder, all or none; the last file makes the others valid."""
    for name in files:
        check_absent(folder / name, force=force)
    real = Path(os.path.realpath(folder))
    with ExitStack() as stack:
        staged: list[tuple[Path, Path]] = []
        for name, data in files.items():
            temporary, descriptor, target = stack.enter_context(_staged_file(real / name))
            fs.write(descriptor, data)
            fs.fsync(descriptor)
            staged.append((temporary, target))
        for name in files:
            check_absent(folder / name, force=force)
        _publish(staged)


def check_free(directory: Path, *, force: bool = False) -> None:
    """Check that a folder can be written, before its content is computed.

    Raises:
        OutputExists: It is a file, or not empty and `force` is not set.
        PermissionError: The folder is not writable.
    """
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
    """Write files as the content of a folder; the last file makes it valid.

    The folder may exist if it is empty. With `force` it may hold files: files of the same names are replaced, others
    stay.
    """
    check_free(directory, force=force)
    target = Path(os.path.realpath(directory))
    is_filled = force and target.is_dir() and any(target.iterdir())
    if not is_filled:
        with building_folder(directory) as folder:
            _fill(folder, files)
    elif os.path.ismount(target) or any(entry.is_dir() and not entry.is_symlink() for entry in target.iterdir()):
        write_files(target, files, force=True)
    else:
        try:
            _replace_folder(target, files)
        except OSError as error:
            if error.errno not in _NOT_AS_A_WHOLE:
                raise
            write_files(target, files, force=True)


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        fs.write_file(folder / name, data)


@contextmanager
def building_folder(directory: Path) -> Iterator[Path]:
    """Build a folder that appears at an absent or empty `directory` after the block, unless the block raises."""
    # Follows a link. The block must sync its files.
    with _staged_folder(directory) as (folder, target):
        yield folder
        fs.fsync_dir(folder)
        with _synced(target.parent) as undo:
            try:
                # rename replaces an empty folder atomically, and fails if it is not empty.
                fs.replace(folder, target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise OutputExists("another process wrote to the folder", path=directory) from None
                raise
            undo.append(lambda: fs.replace(target, folder))


@contextmanager
def _staged_folder(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a new folder next to a target, and the target; remove the folder afterwards."""
    target = Path(os.path.realpath(directory))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target, flags=os.O_DIRECTORY, remove=_remove_folder)
    folder, lock = _locked_next_to(target, _new_folder)
    try:
        yield folder, target
    finally:
        os.close(lock)
        _remove_folder(folder)


def _replace_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Replace a folder of files with a new folder; files of other names are linked into it."""
    with _staged_folder(target) as (folder, _):
        _fill(folder, files)
        for entry in target.iterdir():
            if entry.name not in files:
                os.link(entry, folder / entry.name, follow_symlinks=False)
        _take_over(target.stat(), folder)
        fs.fsync_dir(folder)
        with _synced(target.parent) as undo:
            _exchange(folder, target)
            undo.append(lambda: _exchange(folder, target))
        # Files that another process added to the old folder since it was listed.
        for entry in folder.iterdir():
            if entry.name not in files and not os.path.lexists(target / entry.name):
                fs.replace(entry, target / entry.name)


def _exchange(temporary: Path, target: Path) -> None:
    fs.exchange(temporary, target, _name_next_to(target))


def _take_over(old: os.stat_result, folder: Path) -> None:
    """Copy the owner and mode of the replaced folder."""
    with suppress(PermissionError):
        os.chown(folder, old.st_uid, old.st_gid)
    folder.chmod(stat.S_IMODE(old.st_mode))


def _publish(staged: Sequence[tuple[Path, Path]]) -> None:
    """Exchange staged files with their targets in one folder; the last file appears after all others.

    A mixture of two adapters must not load, so the last target is absent until the others are in place.
    """
    *others, (last, target) = staged
    with _synced(target.parent) as undo:
        aside = _name_next_to(target)
        if others and os.path.lexists(target):
            fs.replace(target, aside)
            undo.append(lambda: fs.replace(aside, target))
        for temporary, place in [*others, (last, target)]:
            if os.path.lexists(place):
                _exchange(temporary, place)
                undo.append(partial(_exchange, temporary, place))
            else:
                fs.replace(temporary, place)
                undo.append(partial(fs.replace, place, temporary))
            fs.failpoint("output-renamed")
    _discard(aside)


@contextmanager
def _synced(folder: Path) -> Iterator[list[Callable[[], object]]]:
    """Sync a folder's entries after the block; if the sync or the block fails, run the appended undo steps."""
    # Opened before the block: if no descriptor is free, nothing may have changed.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    undo: list[Callable[[], object]] = []
    try:
        yield undo
        fs.fsync(descriptor)
    except BaseException:
        for step in reversed(undo):
            with suppress(OSError):  # run the other steps regardless
                step()
        raise
    finally:
        os.close(descriptor)


def _discard(entry: Path) -> None:
    with suppress(OSError):
        fs.unlink(entry)


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
