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
from typing import Any

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)+")
_LITERAL_DOT = "\\"  # stands for an escaped dot inside `characters`; no module name holds a backslash

_LONGEST_KEY = 512
_DEEPEST = 32  # groups, choices and repetitions inside each other

_WORD = frozenset(string.ascii_letters + string.digits + "_")
_DIGITS = frozenset(string.digits)
_ANY = _WORD | {".", "-"}  # every character that a name can have
_NONE = frozenset[str]()
_Tree = Iterable[tuple[Any, Any]]
"""What Python's parser makes of a sequence: signs, each with what it says."""
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


class NameExpression:
    """A key that is a regular expression.

    Raises:
        PatternRefused: Python does not read it, or it has more than characters, choices, repetitions and ends.
    """

    def __init__(self, key: str, steps: Steps) -> None:
        if len(key) > _LONGEST_KEY:
            raise PatternRefused(f"it has {len(key):,} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a meaning that is about to change is not one to rely on
                self._tree = _parser.parse(key)
        except (re.error, Warning, OverflowError, RecursionError) as error:
            raise PatternRefused("Python cannot parse it") from error
        if self._tree.state.flags != re.UNICODE:
            raise PatternRefused("it has flags")
        self._steps = steps
        self._known: dict[str, bool] = {}
        self._ends(self._tree, set(), "")  # goes through all of it, and refuses what is not known

    def matches(self, module: str) -> bool:
        """Return whether PEFT would apply the key to this module."""
        if module not in self._known:
            starts = {0, *(at + 1 for at, character in enumerate(module) if character == ".")}
            is_name = _ANY.issuperset(module)
            self._known[module] = is_name and len(module) in self._ends(self._tree, starts, module)
        return self._known[module]

    def _ends(self, tree: _Tree, places: set[int], name: str, depth: int = 0) -> set[int]:
        """Return where in a name a sequence can end that begins at one of these places."""
        if depth > _DEEPEST:
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
        if [str(sign) for sign, _ in inner] == ["ANY"] and most > len(name):  # as most are: ".*"
            return set(range(min(places) + least, len(name) + 1))
        for _ in range(least):
            before, places = places, self._ends(inner, places, name, depth)
            if places == before:  # more repetitions change nothing
                break
        found, new = set(places), places
        for _ in range(most - least):
            new = self._ends(inner, new, name, depth) - found
            if not new:
                break
            found |= new
        return found


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
            raise PatternRefused(f"{sign.lower()} is not supported")


NamePattern = ModulePattern | NameExpression


def parse_pattern(key: str, steps: Steps) -> NamePattern:
    """Read a key; raises `PatternRefused`."""
    return ModulePattern.parse(key) or NameExpression(key, steps)
