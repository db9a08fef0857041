r"""The keys of `rank_pattern` and `alpha_pattern`: which modules each of them means, as PEFT would say.

    re.match(rf"(.*\.)?({key})$", name)        name: of letters, digits, "_", "-" and "."

The keys are hostile input, so Python's `re` never sees them: a few dozen characters can keep it busy for years. Most
keys are plain names and are compared character by character. The others are compiled to an automaton that reads each
character of a name once. It knows what people write there: literals, ".", classes, `\d` `\w` `\.`, groups, "|", "*",
"+", "?", "{m,n}", "^", "$". Whatever else a key holds (references, look-around, flags) is refused.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)+")
_LITERAL_DOT = "\\"  # stands for an escaped dot inside `characters`; no module name holds a backslash

_LONGEST_KEY = 512
_DEEPEST = 32  # parentheses inside each other
_LARGEST_PROGRAM = 1024  # instructions, after counted repetitions are written out
_MOST_VISITS = 500_000  # of instructions by one automaton; real keys take some thousands, then all is remembered

_WORD = frozenset(string.ascii_letters + string.digits + "_")
_DIGITS = frozenset(string.digits)
_ANY = _WORD | {".", "-"}  # every character that a name can have
_CLASSES = {"d": _DIGITS, "D": _ANY - _DIGITS, "w": _WORD, "W": _ANY - _WORD, "s": frozenset(""), "S": _ANY}
_COUNTS = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")
_GROUP = re.compile(r"\((?:\?:|\?P<[A-Za-z_][A-Za-z0-9_]*>)?(?!\?)")


class PatternRefused(Exception):
    """A key that is not a pattern icm reads, or that takes too long."""


class NamePattern(Protocol):
    """A key that was read."""

    def matches(self, module: str) -> bool:
        """Return whether PEFT would apply the key to this module."""


def parse_pattern(key: str) -> NamePattern:
    """Read a key; raises `PatternRefused`."""
    return ModulePattern.parse(key) or NameAutomaton(key)


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
class _Take:
    """Read one of these characters."""

    characters: frozenset[str]


@dataclass(frozen=True)
class _Fork:
    """Go on at several places, as distances from here."""

    distances: tuple[int, ...]


@dataclass(frozen=True)
class _At:
    """Go on at one end of the name only."""

    end: bool


_Program = list[_Take | _Fork | _At]


class NameAutomaton:
    """A key that is a regular expression, as Thompson's automaton whose sets of states are remembered."""

    def __init__(self, key: str) -> None:
        if len(key) > _LONGEST_KEY:
            raise PatternRefused(f"it has {len(key):,} characters")
        before: _Program = [_Fork((1, 5)), _Fork((1, 3)), _Take(_ANY), _Fork((-2,)), _Take(frozenset("."))]  # (.*\.)?
        self._program: _Program = [*before, *_Parser(key).program(), _At(end=True)]
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._visits = 0

    def matches(self, module: str) -> bool:
        """Return whether PEFT would apply the key to this module."""
        states = self._followed({0}, begin=True)
        for character in module:
            if not _ANY.issuperset(character):
                return False
            states = self._after(states, character)
        return len(self._program) in self._followed(states, begin=not module, end=True)

    def _after(self, states: frozenset[int], character: str) -> frozenset[int]:
        """Return the states after one more character."""
        key = states, character
        if key not in self._known:
            program = self._program
            taken = {at + 1 for at in states if isinstance(step := program[at], _Take) and character in step.characters}
            self._known[key] = self._followed(taken)
        return self._known[key]

    def _followed(self, states: Iterable[int], *, begin: bool = False, end: bool = False) -> frozenset[int]:
        """Add the states that are reached without reading a character; those that wait for the end stay as they are."""
        waiting, found = list(states), set[int]()
        while waiting:
            at = waiting.pop()
            if at in found:
                continue
            found.add(at)
            step = self._program[at] if at < len(self._program) else None
            if isinstance(step, _Fork):
                waiting += (at + distance for distance in step.distances)
            elif isinstance(step, _At) and (end if step.end else begin):
                waiting.append(at + 1)
        self._visits += len(found)
        if self._visits > _MOST_VISITS:
            raise PatternRefused("it takes too long")
        return frozenset(found)


class _Parser:
    """Reads a regular expression, by recursive descent, as a program."""

    def __init__(self, key: str) -> None:
        self._key, self._at, self._depth = key, 0, 0

    def program(self) -> _Program:
        program = self._choice()
        if self._at < len(self._key):
            raise PatternRefused("a parenthesis is closed that was not opened")
        return program

    def _choice(self) -> _Program:
        branches = [self._sequence()]
        while self._found("|"):
            branches.append(self._sequence())
        program = branches.pop()
        for branch in reversed(branches):
            over: _Program = [_Fork((len(program) + 1,))]
            program = _checked([_Fork((1, len(branch) + 2)), *branch, *over, *program])
        return program

    def _sequence(self) -> _Program:
        program: _Program = []
        while self._at < len(self._key) and self._key[self._at] not in "|)":
            program += self._repeated(self._atom())
            _checked(program)
        return program

    def _atom(self) -> _Program:
        start = self._at
        if group := _GROUP.match(self._key, start):
            self._at, self._depth = group.end(), self._depth + 1
            if self._depth > _DEEPEST:
                raise PatternRefused("its parentheses are too deep")
            program = self._choice()
            self._depth -= 1
            if not self._found(")"):
                raise PatternRefused("a parenthesis is not closed")
            return program
        self._at += 1
        match self._key[start]:
            case "." | "^" | "$" as sign:
                return [_Take(_ANY) if sign == "." else _At(end=sign == "$")]
            case "[":
                return [_Take(self._class())]
            case "\\":
                return [_Take(self._escaped())]
            case "*" | "+" | "?" | "(" | "{" | "}" | "]":
                raise PatternRefused(f"{self._key[start : start + 4]!r} is not known")
            case literal:
                return [_Take(frozenset(literal))]

    def _repeated(self, program: _Program) -> _Program:
        is_group = self._key[self._at - 1] == ")"
        counts = self._counts()
        if counts is None:
            return program
        self._found("?")  # the shortest repetition first: the same names match
        if self._key[self._at : self._at + 1] in {"*", "+", "?", "{"} or (
            len(program) == 1 and isinstance(program[0], _At) and not is_group  # as in Python: `($)*`, but not `$*`
        ):
            raise PatternRefused("its repetitions are not known")
        least, most = counts
        size = len(program)
        if size * max(least, most or 0) > _LARGEST_PROGRAM:
            raise PatternRefused("it is too long")
        if most is None:
            return _checked([*program * least, _Fork((1, size + 2)), *program, _Fork((-size - 1,))])
        optional = most - least
        ends = range(optional * (size + 1), 0, -size - 1)  # every optional repetition can be the first left out
        return _checked(program * least + [step for end in ends for step in (_Fork((1, end)), *program)])

    def _counts(self) -> tuple[int, int | None] | None:
        """Read "*", "+", "?" or "{m,n}" as least and most; None where nothing is repeated."""
        for sign, least, most in (("*", 0, None), ("+", 1, None), ("?", 0, 1)):
            if self._found(sign):
                return least, most
        found = _COUNTS.match(self._key, self._at)
        if found is None:
            return None
        low, comma, high = found.groups()
        if not (low or high) or (high and int(low or 0) > int(high)):
            raise PatternRefused(f"{found.group()!r} is not known")
        self._at = found.end()
        return int(low or 0), int(high) if high else None if comma else int(low)

    def _class(self) -> frozenset[str]:
        negated = self._found("^")
        found = set[str]()
        is_first = True
        while is_first or not self._found("]"):
            low = self._member(is_first=is_first)
            is_first = False
            if self._key[self._at : self._at + 1] == "-" and self._key[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._member(is_first=False)
                if not (len(low) == len(high) == 1 and min(low) <= min(high)):
                    raise PatternRefused("a range of characters has no order")
                low = frozenset(chr(code) for code in range(ord(min(low)), ord(min(high)) + 1))
            found |= low
        return _ANY - found if negated else frozenset(found)

    def _member(self, *, is_first: bool) -> frozenset[str]:
        character = self._key[self._at : self._at + 1]
        self._at += 1
        if character == "\\":
            return self._escaped()
        is_last = self._key.startswith("]", self._at)
        # Python means to give a new meaning to "[", and to the others doubled, inside a class.
        if (
            not character
            or (character == "]" and not is_first)
            or character in "[&~|"
            or (character == "-" and not (is_first or is_last))
        ):
            raise PatternRefused("a class of characters is not known")
        return frozenset(character)

    def _escaped(self) -> frozenset[str]:
        character = self._key[self._at : self._at + 1]
        self._at += 1
        if character in _CLASSES:
            return _CLASSES[character]
        if not character or character in _WORD or not character.isascii():
            raise PatternRefused(f"'\\{character}' is not known")
        return frozenset(character)

    def _found(self, sign: str) -> bool:
        """Skip a sign if it comes next."""
        found = self._key.startswith(sign, self._at)
        self._at += found
        return found


def _checked(program: _Program) -> _Program:
    if len(program) > _LARGEST_PROGRAM:
        raise PatternRefused("it is too long")
    return program
