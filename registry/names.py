"""The rule for task names.

A name is shown, typed and compared, and may become a folder name on the user's side, so it is held to characters that
are the same everywhere. It never becomes a path inside the store.
"""

from __future__ import annotations

import re

from registry.errors import InvalidName

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
