"""Names from outside: which may name a task, how they are shown, how module names are ordered.

A name is data. It is never joined to a path, and it reaches a message only through `printable`.

The rule for task names.

A name is shown, typed and compared, and may become a folder name on the user's side, so it is held to characters that
are the same everywhere. It never becomes a path inside the store.
"""

from __future__ import annotations

import re
import unicodedata

from registry.errors import InvalidName

MAX_NAME = 128

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_DIGITS = re.compile(r"(\d+)")
_WINDOWS_NAMES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))]
)


def task_name_problem(name: str) -> str | None:
    """Say why a name cannot be a task's, or return None if it can.

    Letters, digits, `.`, `_` and `-`, first a letter or digit, at most 128 characters, and no name that Windows
    reserves: such a name means the same on every file system, in a URL and in a shell.
    """
    if not name:
        return "the name is empty"
    if len(name) > MAX_NAME:
        return f"the name has {len(name)} characters, more than {MAX_NAME}"
    if unicodedata.normalize("NFC", name) != name:
        return "the name is not in Unicode's composed form (NFC)"
    if not _TASK_NAME.fullmatch(name):
        return "a name has letters, digits, '.', '_' and '-', and starts with a letter or a digit"
    if name.split(".")[0].lower() in _WINDOWS_NAMES:
        return "the name is reserved by Windows"
    return None


def is_module_name(name: str) -> bool:
    """Return whether a name is a dotted path of plain identifiers, as in `model.layers.0.self_attn.q_proj`."""
    return _MODULE_NAME.fullmatch(name) is not None


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that orders numbers by value: `layers.2` before `layers.10`."""
    parts = _DIGITS.split(name)
    return tuple((0, int(part), part) if index % 2 else (1, 0, part) for index, part in enumerate(parts))


def printable(text: str, limit: int = 120) -> str:
    """Escape everything that could move a cursor, reorder a line or end it, and shorten what is very long."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else _escaped(char) for char in shown)


def _escaped(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Windows opens a device, not a file, for these, whatever the extension.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def check_name(name: str) -> str:
    """Return `name` unchanged if it follows the rule.

    Raises:
        InvalidName: it does not.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{name[:200]!r} is no task name",
            hint="a name has 1 to 128 letters, digits, '.', '_' or '-', and begins with a letter or digit",
        )
    if name.split(".")[0].lower() in _DEVICES:
        raise InvalidName(f"{name!r} is a device name on Windows", hint="choose another name")
    return name
