"""Fault injection into SQLite's system calls, which Python does not make and cannot patch.

    SQLite ──▶ xOpen, xDelete ──▶ xRead, xWrite, xTruncate, xSync, xFileSize of each file ──▶ the system

A layer in between, as in https://sqlite.org/vfs.html. A failing call returns the code that SQLite's own layer returns
for that system error.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from functools import cache
from typing import Any
from unittest import mock

from registry.errors import StoreFull, StoreIOError
from registry.storage.database import Database

EIO = {
    "xOpen": sqlite3.SQLITE_CANTOPEN,
    "xDelete": sqlite3.SQLITE_IOERR_DELETE,
    "xRead": sqlite3.SQLITE_IOERR_READ,
    "xWrite": sqlite3.SQLITE_IOERR_WRITE,
    "xTruncate": sqlite3.SQLITE_IOERR_TRUNCATE,
    "xSync": sqlite3.SQLITE_IOERR_FSYNC,
    "xFileSize": sqlite3.SQLITE_IOERR_FSTAT,
}
"""Calls that may fail -> the code that they return then."""
ENOSPC = {"xWrite": sqlite3.SQLITE_FULL, "xSync": sqlite3.SQLITE_IOERR_FSYNC}

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "xOpen": (c_void_p, c_void_p, c_void_p, c_int, c_void_p),
    "xDelete": (c_void_p, c_void_p, c_int),
    "xRead": (c_void_p, c_void_p, c_int, c_int64),
    "xWrite": (c_void_p, c_void_p, c_int, c_int64),
    "xTruncate": (c_void_p, c_int64),
    "xSync": (c_void_p, c_int),
    "xFileSize": (c_void_p, c_void_p),
}
_OF_FILE = (
    "xClose xRead xWrite xTruncate xSync xFileSize xLock xUnlock xCheckReservedLock xFileControl xSectorSize "
    "xDeviceCharacteristics xShmMap xShmLock xShmBarrier xShmUnmap xFetch xUnfetch"
)


class _Vfs(Structure):
    """The first fields of `sqlite3_vfs`."""

    _fields_ = (
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        ("xOpen", c_void_p),
        ("xDelete", c_void_p),
    )


class _Methods(Structure):
    """`sqlite3_io_methods`."""

    _fields_ = (("iVersion", c_int), *((name, c_void_p) for name in _OF_FILE.split()))


@contextmanager
def failing(number: int, codes: dict[str, int], times: float, *, is_torn: bool = False) -> Iterator[Callable[[], bool]]:
    """Make the n-th of some calls fail, and following ones, in all databases of this process that are opened now.

    Args:
        number: n, from 1.
        codes: Calls -> the codes that they return.
        times: The number of calls that fail.
        is_torn: Half of the bytes of a write are written nevertheless.

    Yields:
        A function that returns whether a call failed.
    """
    count = 0

    def is_failing(name: str) -> int:
        nonlocal count
        count += name in codes
        return codes[name] if name in codes and number <= count < number + times else sqlite3.SQLITE_OK

    with _layer().on(is_failing, is_torn=is_torn):
        yield lambda: count >= number


def is_reachable() -> bool:
    """Return whether Python's SQLite is a library whose functions can be found."""
    try:
        return bool(_layer())
    except (AttributeError, OSError):  # it is built into Python, or hides its names
        return False


class _Layer:
    """The intercepting layer; it stays in memory, for files that are closed later."""

    def __init__(self) -> None:
        find = ctypes.CDLL(_sqlite3.__file__).sqlite3_vfs_find
        find.restype, find.argtypes = POINTER(_Vfs), (c_char_p,)
        self._vfs = find(None).contents
        self._system = {name: getattr(self._vfs, name) for name in ("xOpen", "xDelete")}
        self._functions: list[Any] = []
        self._own = {name: self._between(name, address) for name, address in self._system.items()}
        self._methods: dict[int, _Methods] = {}
        self._code_of: Callable[[str], int] = _never
        self._is_torn = False

    @contextmanager
    def on(self, code_of: Callable[[str], int], *, is_torn: bool) -> Iterator[None]:
        self._code_of, self._is_torn = code_of, is_torn
        self._put(self._own)
        try:
            yield
        finally:
            self._put(self._system)
            self._code_of = _never

    def _put(self, functions: dict[str, Any]) -> None:
        for name, address in functions.items():
            setattr(self._vfs, name, address)

    def _between(self, name: str, address: int) -> int | None:
        """Return the address of a function that makes a system call, unless it is to fail."""
        kind = CFUNCTYPE(c_int, *_ARGUMENTS[name])
        real = kind(address)

        def call(*arguments: Any) -> int:
            code = self._code_of(name)
            if code == sqlite3.SQLITE_OK:
                code = real(*arguments)
                if name == "xOpen" and code == sqlite3.SQLITE_OK:
                    self._take(arguments[2])
            elif name == "xOpen":
                c_void_p.from_address(arguments[2]).value = None  # there is nothing to close
            elif name == "xWrite" and self._is_torn:
                file, data, size, place = arguments
                real(file, data, size // 2, place)
            return int(code)

        self._functions.append(kind(call))
        return ctypes.cast(self._functions[-1], c_void_p).value

    def _take(self, file: int) -> None:
        """Set the methods of an open file to this layer: its first field has their address."""
        field = c_void_p.from_address(file)
        address = field.value
        assert address is not None
        if address not in self._methods:
            methods = _Methods.from_buffer_copy(_Methods.from_address(address))
            for name in _ARGUMENTS.keys() - self._system.keys():
                setattr(methods, name, self._between(name, getattr(methods, name)))
            self._methods[address] = methods
        field.value = ctypes.addressof(self._methods[address])


def _never(name: str) -> int:
    return sqlite3.SQLITE_OK


@cache
def _layer() -> _Layer:
    return _Layer()


@contextmanager
def ignoring_errors() -> Iterator[None]:
    """Ignore disk errors: the control, which must be caught."""
    errors = Database._errors

    @contextmanager
    def ignoring(self: Database) -> Iterator[None]:
        with suppress(StoreIOError, StoreFull), errors(self):
            yield

    with mock.patch.object(Database, "_errors", ignoring):
        yield
