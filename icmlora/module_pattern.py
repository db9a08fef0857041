r"""Keys of `rank_pattern` and `alpha_pattern`, matched exactly as PEFT does but without a regular expression.

PEFT runs `re.match(rf"(.*\.)?({key})$", module)`. A key that is a dotted name is a regular expression too, whose dots
stand for any one character; such keys, with an optional leading `^` and with `\.` for a literal dot, are what
trainers write. They are compared character by character, in linear time. Any other key is not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.)+")
_LITERAL_DOT = "\\"
"""Stands for an escaped dot inside `characters`; no module name holds a backslash."""


@dataclass(frozen=True)
class ModulePattern:
    """A module name or the end of one; a dot in `characters` matches any character."""

    characters: str
    anchored: bool

    @classmethod
    def parse(cls, key: str) -> ModulePattern | None:
        """Read a key, or return None if it is anything but a plain name."""
        if not _PLAIN.fullmatch(key):
            return None
        return cls(key.removeprefix("^").replace("\\.", _LITERAL_DOT), key.startswith("^"))

    def matches(self, module: str) -> bool:
        """Return whether PEFT would apply the key to this module."""
        before = len(module) - len(self.characters)
        if before < 0 or (before > 0 and (self.anchored or module[before - 1] != ".")):
            return False
        return all(
            wanted == "." or (found == "." if wanted == _LITERAL_DOT else wanted == found)
            for wanted, found in zip(self.characters, module[before:], strict=True)
        )
