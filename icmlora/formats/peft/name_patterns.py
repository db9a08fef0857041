r"""The keys of `rank_pattern` and `alpha_pattern`: which modules each of them means, as PEFT would say.

    re.match(rf"(.*\.)?({key})$", name)        name: of letters, digits, "_", "-" and "."

The keys are hostile input: a few dozen characters can keep Python's matcher busy for years, because it tries one way
after the other. Most keys are plain names and are compared character by character. The others are read by Python's own
parser, and matched by following all places of a name that can be reached, all at once. References, look-around and
flags are refused.
"""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from re import _parser  # type: ignore[attr-defined]  # what `re.compile` reads an expression with
from typing import Any, Protocol

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)+")
_LITERAL_DOT = "\\"  # stands for an escaped dot inside `characters`; no module name holds a backslash

_LONGEST_KEY = 512
_DEEPEST = 32  # groups, choices and repetitions inside each other

_WORD = frozenset(string.ascii_letters + string.digits + "_")
_DIGITS = frozenset(string.digits)
_ANY = _WORD | {".", "-"}  # every character that a name can have
_NONE = frozenset[str]()
_CATEGORIES = {
    **{"CATEGORY_DIGIT": _DIGITS, "CATEGORY_WORD": _WORD, "CATEGORY_SPACE": _NONE},
    **{"CATEGORY_NOT_DIGIT": _ANY - _DIGITS, "CATEGORY_NOT_WORD": _ANY - _WORD, "CATEGORY_NOT_SPACE": _ANY},
}


class PatternRefused(Exception):
    """A key that is not a pattern icm reads, or that takes too long."""


@dataclass
class Steps:
    """What is left of the steps that the keys of one file may take, all together, for all names."""

    left: int = 10_000_000  # a few seconds; real keys take a hundred or two for each name


class NamePattern(Protocol):
    """A key that was read."""

    def matches(self, module: str) -> bool:
        """Return whether PEFT would apply the key to this module."""


def parse_pattern(key: str, steps: Steps) -> NamePattern:
    """Read a key; raises `PatternRefused`."""
    return ModulePattern.parse(key) or NameExpression(key, steps)


@dataclass(frozen=True)
class ModulePattern:
    """A key that is a plain name, with an optional leading `^`; a dot matches any character unless it is escaped."""

    characters: str  # the name or the end of one
    anchored: bool  # whether the whole name has to match, not just its end

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


@dataclass(frozen=True)
class _Edge:
    """One end of the name."""

    end: bool


@dataclass(frozen=True)
class _Choice:
    """One of some sequences."""

    branches: list[list[_Part]]


@dataclass(frozen=True)
class _Repeat:
    """A sequence, several times."""

    least: int
    most: int
    parts: list[_Part]


_Part = frozenset[str] | _Edge | _Choice | _Repeat  # a set: one of these characters


class NameExpression:
    """A key that is a regular expression."""

    def __init__(self, key: str, steps: Steps) -> None:
        if len(key) > _LONGEST_KEY:
            raise PatternRefused(f"it has {len(key):,} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a meaning that is about to change is not one to rely on
                tree = _parser.parse(key)
        except (re.error, Warning, OverflowError, RecursionError) as error:
            raise PatternRefused("Python does not read it") from error
        if tree.state.flags != re.UNICODE:
            raise PatternRefused("it has flags")
        self._parts = _read(tree)
        self._steps = steps
        self._known: dict[str, bool] = {}

    def matches(self, module: str) -> bool:
        """Return whether PEFT would apply the key to this module."""
        if module not in self._known:
            starts = {0, *(at + 1 for at, character in enumerate(module) if character == ".")}
            is_name = _ANY.issuperset(module)
            self._known[module] = is_name and len(module) in self._ends(self._parts, starts, module)
        return self._known[module]

    def _ends(self, parts: list[_Part], places: set[int], name: str) -> set[int]:
        """Return where in a name a sequence can end that begins at one of these places."""
        self._count(places)
        for part in parts:
            self._count(places)
            match part:
                case _Edge():
                    places = places & {len(name) if part.end else 0}
                case _Choice():
                    places = set().union(*(self._ends(branch, places, name) for branch in part.branches))
                case _Repeat():
                    places = self._repeated(part, places, name)
                case characters:
                    places = {at + 1 for at in places if name[at : at + 1] in characters}
        return places

    def _count(self, places: set[int]) -> None:
        self._steps.left -= 1 + len(places)
        if self._steps.left < 0:
            raise PatternRefused("it takes too long")

    def _repeated(self, repeat: _Repeat, places: set[int], name: str) -> set[int]:
        if places and repeat.parts == [_ANY] and repeat.most > len(name):  # as most are: ".*"
            return set(range(min(places) + repeat.least, len(name) + 1))
        for _ in range(repeat.least):
            before, places = places, self._ends(repeat.parts, places, name)
            if places == before:  # more repetitions change nothing
                break
        found, new = set(places), places
        for _ in range(repeat.most - repeat.least):
            new = self._ends(repeat.parts, new, name) - found
            if not new:
                break
            found |= new
        return found


def _read(tree: Iterable[tuple[Any, Any]], depth: int = 0) -> list[_Part]:
    """Read what the parser made of a sequence."""
    if depth > _DEEPEST:
        raise PatternRefused("its groups are too deep")
    parts: list[_Part] = []
    for sign, value in tree:
        match str(sign), value:
            case "SUBPATTERN", (_, 0, 0, inner):
                parts += _read(inner, depth + 1)
            case "BRANCH", (_, branches):
                parts.append(_Choice([_read(branch, depth + 1) for branch in branches]))
            case "MAX_REPEAT" | "MIN_REPEAT", (least, most, inner):
                parts.append(_Repeat(least, most, _read(inner, depth + 1)))
            case "AT", _ if str(value) in ("AT_BEGINNING", "AT_END"):
                parts.append(_Edge(end=str(value) == "AT_END"))
            case _:
                parts.append(_characters(str(sign), value))
    return parts


def _characters(sign: str, value: Any) -> frozenset[str]:
    """Return the characters of names that a sign of the parser stands for."""
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
            raise PatternRefused(f"{sign.lower()} is not known")
