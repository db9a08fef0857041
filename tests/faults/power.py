"""Possible disk contents after a power loss: the system calls of a command, replayed up to a point.

    strace ──▶ calls ──▶ each change of a file or a folder, and later syncs ──▶ a folder, as a crash left it

Synced data survives. Of unsynced data, anything may survive: of the writes to a file all, none, a prefix or any subset,
the last one torn; of the names in a folder a prefix, chosen for each folder. Real file systems lose less, but POSIX
allows this.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TRACED = (
    "openat,open,creat,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat"
)
_LINE = re.compile(r"^(\d+) +(.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+)(?:<([^>]*)>)?")
_UNFINISHED, _RESUMED = " <unfinished ...>", re.compile(r"^<\.\.\. \w+ resumed>")
_PIECE = 512  # bytes that a disk writes at once


@dataclass(frozen=True)
class Call:
    """One completed call: its name, its arguments in strace's form, its return value, and its file."""

    name: str
    arguments: tuple[str, ...]
    returned: int
    file: str


@dataclass
class _File:
    """A file or a folder as it was at first, and each change of it."""

    data: bytes | None = b""  # None for a folder
    writes: list[tuple[int, int, bytes | None]] = field(default_factory=list)  # when, where, what; None: cut there
    names: list[tuple[int, str, _File | None]] = field(default_factory=list)  # when, name, its new target
    syncs: list[int] = field(default_factory=list)


class Disk:
    """All changes of a folder by a command.

    Args:
        root: The folder.
        before: A copy of it from before the command.
        calls: The calls of the command.
    """

    def __init__(self, root: Path, before: Path, calls: Sequence[Call]) -> None:
        self._root, self._files = str(root), {str(root): _read(before)}
        self._fill(str(root), self._files[str(root)])
        self.length = len(calls)
        self.told: list[tuple[int, str]] = []
        """The printed lines, with their times."""
        for when, call in enumerate(calls):
            self._apply(when, call)

    def crash(self, when: int, draw: random.Random, target: Path) -> None:
        """Write possible contents after a power loss before the `when`-th call."""
        shutil.rmtree(target, ignore_errors=True)
        _write(self._files[self._root], when, draw, target)

    def _fill(self, path: str, folder: _File) -> None:
        for _, name, file in list(folder.names):
            assert file is not None
            self._files[f"{path}/{name}"] = file
            if file.data is None:
                self._fill(f"{path}/{name}", file)

    def _apply(self, when: int, call: Call) -> None:
        if call.returned < 0:
            return
        paths = [path for path in map(_path_of, call.arguments) if path.startswith(f"{self._root}/")]
        file = self._files.get(_shown(call.arguments[0]).removesuffix(" (deleted)")) if call.arguments else None
        match call.name:
            case "write" if call.arguments[0].startswith("1<"):
                self.told += [(when, line) for line in _bytes_of(call.arguments[1]).decode().split("\n") if line]
            case "write" | "pwrite64" if file is not None and file.data is not None:
                data = _bytes_of(call.arguments[1])[: call.returned]
                at = int(call.arguments[3]) if call.name == "pwrite64" else _length(file)
                file.writes.append((when, at, data))
            case "ftruncate" if file is not None:
                file.writes.append((when, int(call.arguments[1]), None))
            case "fsync" | "fdatasync" if file is not None:
                file.syncs.append(when)
            case "openat" | "open" | "creat" if (path := _shown(call.file)).startswith(f"{self._root}/"):
                if "O_CREAT" in " ".join(call.arguments) and path not in self._files:
                    self._name(when, path, _File())
                elif "O_TRUNC" in " ".join(call.arguments):
                    self._files[path].writes.append((when, 0, None))
            case "mkdir" | "mkdirat" if paths:
                self._name(when, paths[0], _File(None))
            case "rename" | "renameat" | "renameat2" if len(paths) == 2:
                moved = self._files[paths[0]]
                self._name(when, paths[1], moved)
                self._name(when, paths[0], None)
            case "unlink" | "unlinkat" if paths:
                self._name(when, paths[0], None)

    def _name(self, when: int, path: str, file: _File | None) -> None:
        folder, _, name = path.rpartition("/")
        self._files[folder].names.append((when, name, file))
        if file is None:
            self._files.pop(path, None)
        else:
            self._files[path] = file


def trace(command: Sequence[str], env: dict[str, str], log: Path) -> list[Call]:
    """Run a command and return its calls."""
    strace = [
        "strace",
        "-f",
        "-y",
        "-xx",
        "-s",
        "100000000",
        "-e",
        f"trace={TRACED}",
        "-e",
        "signal=none",
        "-o",
        str(log),
    ]
    subprocess.run([*strace, *command], check=True, env=os.environ | env, stdout=subprocess.DEVNULL)
    return list(_calls(log))


def _calls(log: Path) -> Iterator[Call]:
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        match = _LINE.match(line)
        assert match is not None
        process, text = match.groups()
        if text.endswith(_UNFINISHED):
            begun[process] = text.removesuffix(_UNFINISHED)
            continue
        if _RESUMED.match(text):
            text = begun.pop(process) + _RESUMED.sub("", text)
        if found := _CALL.match(text):
            name, arguments, returned, file = found.groups()
            yield Call(name, tuple(arguments.split(", ")), int(returned), file or "")


def _bytes_of(argument: str) -> bytes:
    return bytes.fromhex(argument.strip('"').replace("\\x", ""))


def _path_of(argument: str) -> str:
    return _bytes_of(argument).decode(errors="replace") if argument.startswith('"') else ""


def _shown(argument: str) -> str:
    """Return the path that strace shows with a descriptor."""
    shown = argument.partition("<")[2].rstrip(">") if "<" in argument else argument
    return _bytes_of(shown).decode(errors="replace") if shown.startswith("\\x") else shown


def _length(file: _File) -> int:
    length = len(file.data or b"")
    for _, at, data in file.writes:
        length = at if data is None else max(length, at + len(data))
    return length


def _read(path: Path) -> _File:
    if path.is_file():
        return _File(path.read_bytes())
    names = [(-1, entry.name, _read(entry)) for entry in sorted(path.iterdir())] if path.exists() else []
    return _File(None, names=names, syncs=[0])


def _write(file: _File, when: int, draw: random.Random, target: Path) -> None:
    """Write a file, or a folder with its contents."""
    synced = max((sync for sync in file.syncs if sync < when), default=-1)
    if file.data is not None:
        target.write_bytes(_content(file, when, synced, draw))
        return
    target.mkdir()
    open_names = [change for change in file.names if synced < change[0] < when]
    kept = draw.choice((0, len(open_names), draw.randint(0, len(open_names))))
    names = {name: named for _, name, named in [c for c in file.names if c[0] <= synced] + open_names[:kept]}
    for name, named in names.items():
        if named is not None:
            _write(named, when, draw, target / name)


def _content(file: _File, when: int, synced: int, draw: random.Random) -> bytes:
    open_writes = [write for write in file.writes if synced < write[0] < when]
    kind = draw.choice(("none", "all", "some", "any"))
    if kind == "none":
        open_writes = []
    elif kind == "some":
        open_writes = open_writes[: draw.randint(0, len(open_writes))]
    elif kind == "any":
        open_writes = [write for write in open_writes if draw.random() < 0.5]
    if open_writes and kind in ("some", "any"):
        at, where, data = open_writes[-1]
        pieces = len(data or b"") // _PIECE
        if data is not None and pieces:
            open_writes[-1] = at, where, data[: _PIECE * draw.randint(0, pieces)]
    content = bytearray(file.data or b"")
    for _, where, data in [write for write in file.writes if write[0] <= synced] + open_writes:
        if data is None:
            content = content[:where] + bytes(max(0, where - len(content)))
        else:
            content += bytes(max(0, where - len(content)))
            content[where : where + len(data)] = data
    return bytes(content)


def python(*words: str) -> list[str]:
    """Return the command line of a module of Python."""
    return [sys.executable, "-m", *words]
