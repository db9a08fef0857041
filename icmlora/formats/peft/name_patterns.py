r"""Match the keys of `rank_pattern` and `alpha_pattern` against module names, as PEFT does.

    re.match(rf"(.*\.)?({key})$", name)        name: of letters, digits, "_", "-" and "."

The keys are untrusted: a few dozen characters can keep Python's backtracking matcher busy for years. Most keys are
plain names and are compared character by character. The others are parsed by Python's own parser, and matched by
tracking all reachable positions in a name at once. References, look-around and flags are refused.
"""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from re import _parser  # type: ignore[attr-defined]  # the parser of `re.compile`
from typing import Any

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)+")
_LITERAL_DOT = "\\"  # represents an escaped dot in `characters`; no module name contains a backslash

_MAX_KEY_LENGTH = 512
_MAX_DEPTH = 32  # groups, choices and repetitions inside each other

_WORD = frozenset(string.ascii_letters + string.digits + "_")
_DIGITS = frozenset(string.digits)
_ANY = _WORD | {".", "-"}  # all characters allowed in a name
_NONE = frozenset[str]()
_Tree = Iterable[tuple[Any, Any]]
"""A sequence from Python's parser: opcodes with their arguments."""
_CATEGORIES = {
    **{"CATEGORY_DIGIT": _DIGITS, "CATEGORY_WORD": _WORD, "CATEGORY_SPACE": _NONE},
    **{"CATEGORY_NOT_DIGIT": _ANY - _DIGITS, "CATEGORY_NOT_WORD": _ANY - _WORD, "CATEGORY_NOT_SPACE": _ANY},
}


class PatternRefused(Exception):
    """The key is not a supported pattern, or takes too long to match."""


@dataclass
class Steps:
    """Remaining steps for matching all keys of one file against all names."""

    left: int = 10_000_000  # a few seconds; real keys take one or two hundred per name


@dataclass(frozen=True)
class ModulePattern:
    """A key that is a plain name, with an optional leading `^`; a dot matches any character unless escaped."""

    characters: str  # a name or its end
    anchored: bool  # whether the whole name must match, not just its end

    @classmethod
    def parse(cls, key: str) -> ModulePattern | None:
        """Parse a key; return None if it is not a plain name."""
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


class NameExpression:
    """A key that is a regular expression.

    Raises:
        PatternRefused: Python cannot parse it, or it has parts other than characters, groups, choices, repetitions and
            anchors.
    """

    def __init__(self, key: str, steps: Steps) -> None:
        if len(key) > _MAX_KEY_LENGTH:
            raise PatternRefused(f"it has {len(key):,} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # do not rely on a meaning that is about to change
                self._tree = _parser.parse(key)
        except (re.error, Warning, OverflowError, RecursionError) as error:
            raise PatternRefused("Python cannot parse it") from error
        if self._tree.state.flags != re.UNICODE:
            raise PatternRefused("it has flags")
        self._steps = steps
        self._known: dict[str, bool] = {}
        self._ends(self._tree, set(), "")  # visits the whole tree, and refuses unsupported parts

    def matches(self, module: str) -> bool:
        """Return whether PEFT would apply the key to this module."""
        if module not in self._known:
            starts = {0, *(at + 1 for at, character in enumerate(module) if character == ".")}
            is_name = _ANY.issuperset(module)
            self._known[module] = is_name and len(module) in self._ends(self._tree, starts, module)
        return self._known[module]

    def _ends(self, tree: _Tree, places: set[int], name: str, depth: int = 0) -> set[int]:
        """Return the positions in a name where a sequence can end if it starts at one of `places`."""
        if depth > _MAX_DEPTH:
            raise PatternRefused("its groups are nested too deeply")
        self._count(places)
        for sign, value in tree:
            self._count(places)
            match str(sign), value:
                case "SUBPATTERN", (_, 0, 0, inner):
                    places = self._ends(inner, places, name, depth + 1)
                case "BRANCH", (_, branches):
                    places = set().union(*(self._ends(branch, places, name, depth + 1) for branch in branches))
                case "MAX_REPEAT" | "MIN_REPEAT", (least, most, inner):
                    places = self._repeated(inner, least, most, places, name, depth + 1)
                case "AT", _ if str(value) in ("AT_BEGINNING", "AT_END"):
                    places = places & {len(name) if str(value) == "AT_END" else 0}
                case _:
                    characters = _characters(str(sign), value)
                    places = {at + 1 for at in places if name[at : at + 1] in characters}
        return places

    def _count(self, places: set[int]) -> None:
        self._steps.left -= 1 + len(places)
        if self._steps.left < 0:
            raise PatternRefused("it takes too long")

    def _repeated(self, inner: _Tree, least: int, most: int, places: set[int], name: str, depth: int) -> set[int]:
        if not places:
            return self._ends(inner, places, name, depth)
        if [str(sign) for sign, _ in inner] == ["ANY"] and most > len(name):  # the usual case: ".*"
            return set(range(min(places) + least, len(name) + 1))
        for _ in range(least):
            before, places = places, self._ends(inner, places, name, depth)
            if places == before:  # further repetitions have no effect
                break
        found, new = set(places), places
        for _ in range(most - least):
            new = self._ends(inner, new, name, depth) - found
            if not new:
                break
            found |= new
        return found


def _characters(sign: str, value: Any) -> frozenset[str]:
    """Return the name characters that an opcode of the parser matches."""
    match sign:
        case "LITERAL":
            return frozenset(chr(value))
        case "NOT_LITERAL":
            return _ANY - {chr(value)}
        case "ANY":
            return _ANY
        case "RANGE":
            return frozenset(one for one in _ANY if value[0] <= ord(one) <= value[1])
        case "CATEGORY":
            return _CATEGORIES[str(value)]
        case "IN":
            negated = str(value[0][0]) == "NEGATE"
            found = _NONE.union(*(_characters(str(one), of) for one, of in value[negated:]))
            return _ANY - found if negated else found
        case _:
            raise PatternRefused(f"{sign.lower()} is not supported")


NamePattern = ModulePattern | NameExpression


def parse_pattern(key: str, steps: Steps) -> NamePattern:
    """Parse a key; raises `PatternRefused`."""
    return ModulePattern.parse(key) or NameExpression(key, steps)
