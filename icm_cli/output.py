"""Print everything: the answer on stdout; notes, warnings, errors and progress on stderr.

Modes:
    human   stdout is a terminal: aligned, long values cut in the middle to fit its width, headings in bold
    plain   stdout is a pipe: aligned, nothing cut, no colour
    json    --json: documents or JSON lines on stdout, JSON lines on stderr, no progress, no questions
    quiet   -q: only the bare answer (names, paths) and errors
"""

from __future__ import annotations

import codecs
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Generic, TextIO, TypeVar

from icm_cli.config import switched_on
from icm_cli.errors import Failure, UsageProblem
from icmlora.io.text import escape, escape_lines, shortened_inside, width

if TYPE_CHECKING:
    from icm_cli.progress import Progress

R = TypeVar("R")
_GAP = "  "
_NARROWEST = 12  # terminal cells that a shrinking column keeps


class Mode(Enum):
    """How the answer is printed."""

    HUMAN = "human"
    PLAIN = "plain"
    JSON = "json"
    QUIET = "quiet"


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    _: KW_ONLY
    right: bool = False  # whether values are aligned to the right, as numbers are
    shrink: bool = False  # whether values may be cut in the middle when the terminal is narrow
    # Whether the column may be left out there, and in which order: the highest number goes first, 0 never.
    spare: int = 0


@dataclass(frozen=True)
class Field(Column, Generic[R]):
    """A column of a table of records, and what it shows of one."""

    cell: Callable[[R], str]
    _: KW_ONLY
    is_rare: bool = False  # whether the column is left out where all its cells are empty


class Output:
    """Prints whatever a command has to say."""

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbosity: int = 0, progress: bool = True
    ) -> None:
        self.verbosity = verbosity
        self._hints = set[str]()  # those that were printed
        self._progress = progress and not switched_on("ICM_NO_PROGRESS")
        if as_json:
            self.mode = Mode.JSON
        elif quiet:
            self.mode = Mode.QUIET
        else:
            self.mode = Mode.HUMAN if sys.stdout.isatty() else Mode.PLAIN

    @property
    def is_json(self) -> bool:
        """Whether the answer is JSON."""
        return self.mode is Mode.JSON

    @property
    def is_quiet(self) -> bool:
        """Whether only the bare answer is wanted."""
        return self.mode is Mode.QUIET

    # The answer, on stdout.

    def document(self, value: object) -> None:
        """Print the one JSON document of a command; JSON mode only."""
        if self.is_json:
            _write(sys.stdout, _json(value, sys.stdout, indent=2))

    def event(self, kind: str, /, **fields: object) -> None:
        """Print one JSON line `{"type": kind, ...}`; JSON mode only."""
        if self.is_json:
            _write(sys.stdout, _json({"type": kind, **fields}, sys.stdout))
            sys.stdout.flush()

    def answer(self, text: str) -> None:
        """Print a line of the bare answer (a name, a path); all modes but JSON."""
        if not self.is_json:
            _write(sys.stdout, escape_lines(text))

    def line(self, text: str = "") -> None:
        """Print a line for people; human and plain mode only."""
        if self.mode in (Mode.HUMAN, Mode.PLAIN):
            _write(sys.stdout, escape_lines(text))

    def names(self, names: Iterable[str]) -> None:
        """Print the bare answer, a line each, where nothing else is wanted: with --quiet only."""
        if self.is_quiet:
            for name in names:
                self.answer(name)

    def listing(self, fields: Sequence[Field[R]], records: Sequence[R]) -> None:
        """Print a table for people, with a row for each record."""
        if self.mode in (Mode.HUMAN, Mode.PLAIN):
            shown = [field for field in fields if not field.is_rare or any(map(field.cell, records))]
            self.table(shown, [[field.cell(record) for field in shown] for record in records])

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people."""
        if self.mode not in (Mode.HUMAN, Mode.PLAIN) or not rows:
            return
        cells: Sequence[Sequence[str]] = [[escape(cell) for cell in row] for row in rows]
        limit = shutil.get_terminal_size().columns if self.mode is Mode.HUMAN else None
        columns, cells = _fitting(columns, cells, limit)
        widths = _widths(columns, cells, limit)
        _write(sys.stdout, self._bold(_row([column.title.upper() for column in columns], columns, widths)))
        for row in cells:
            _write(sys.stdout, _row(row, columns, widths))

    def record(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print name-value pairs for people, one per line."""
        if self.mode not in (Mode.HUMAN, Mode.PLAIN) or not pairs:
            return
        widest = max(width(name) for name, _ in pairs)
        for name, value in pairs:
            _write(sys.stdout, f"{self._bold(name.ljust(widest))}{_GAP}{escape(value)}".rstrip())

    # Notes, warnings, errors and progress, on stderr.

    def note(self, text: str) -> None:
        """Print a note; silent with --quiet and --json."""
        if self.mode in (Mode.HUMAN, Mode.PLAIN):
            _write(sys.stderr, escape_lines(text))

    def detail(self, text: str) -> None:
        """Print a note with --verbose only."""
        if self.verbosity > 0:
            self.note(text)

    def hint(self, text: str) -> None:
        """Print what to do next, once; silent with --quiet and --json."""
        if text not in self._hints:
            self._hints.add(text)
            self.note(f"hint: {text}")

    def warn(self, text: str, *, kind: str = "warning", **fields: object) -> None:
        """Print a warning in every mode; in JSON mode as a JSON line on stderr."""
        if self.is_json:
            _write(sys.stderr, json.dumps({"type": "warning", "kind": kind, "message": text, **fields}))
        else:
            _write(sys.stderr, f"warning: {escape_lines(text)}")

    def failure(self, failure: Failure) -> None:
        """Print why the command failed."""
        _write(sys.stderr, failure.as_json() if self.is_json else failure.as_text())

    def progress(self, label: str) -> Progress:
        """Return a progress display on stderr: a bar on a terminal, otherwise a line every few seconds."""
        from icm_cli.progress import PlainProgress, Progress, RichProgress

        if not self._progress or self.mode in (Mode.JSON, Mode.QUIET):
            return Progress()
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            return RichProgress(label)
        return PlainProgress(label)

    def confirm(self, question: str, *, yes: bool) -> bool:
        """Ask before something that cannot be undone; raises `UsageProblem` where nobody can answer."""
        if yes:
            return True
        if self.is_json or not sys.stdin.isatty():
            fact = f"{question} There is no terminal to answer on."
            raise UsageProblem(fact, hint="add --yes to skip the question")
        sys.stderr.write(f"{escape_lines(question)} [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def _bold(self, text: str) -> str:
        coloured = self.mode is Mode.HUMAN and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        return f"\x1b[1m{text}\x1b[0m" if coloured else text


def _json(value: object, stream: TextIO, indent: int | None = None) -> str:
    # Escape characters that the encoding lacks the JSON way, before `_write` would do it the Python way.
    is_utf8 = codecs.lookup(stream.encoding or "utf-8").name == "utf-8"
    return json.dumps(value, ensure_ascii=not is_utf8, indent=indent, allow_nan=False)


def _write(stream: TextIO, text: str) -> None:
    # Characters that the terminal's encoding lacks are escaped instead of raising an error.
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _fitting(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], limit: int | None
) -> tuple[Sequence[Column], Sequence[Sequence[str]]]:
    """Leave out columns until the others fit, cut as far as they may be."""
    full = _full_widths(columns, rows)
    least = [_least(column, size) if column.shrink else size for column, size in zip(columns, full, strict=True)]
    kept = list(range(len(columns)))
    while limit is not None and sum(least[index] + len(_GAP) for index in kept) - len(_GAP) > limit:
        spare = max(kept, key=lambda index: columns[index].spare)
        if not columns[spare].spare:
            break
        kept.remove(spare)
    return [columns[index] for index in kept], [[row[index] for index in kept] for row in rows]


def _full_widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max([width(column.title), *(width(row[index]) for row in rows)]) for index, column in enumerate(columns)]


def _least(column: Column, full: int) -> int:
    return min(full, max(_NARROWEST, width(column.title)))


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], limit: int | None) -> list[int]:
    widths = _full_widths(columns, rows)
    excess = 0 if limit is None else sum(widths) + len(_GAP) * (len(widths) - 1) - limit
    shrinking = [index for index, column in enumerate(columns) if column.shrink]
    while excess > 0 and shrinking:
        # A long list of modules gives way before a name does.
        widest = max(shrinking, key=widths.__getitem__)
        if widths[widest] <= _least(columns[widest], widths[widest]):
            shrinking.remove(widest)
            continue
        widths[widest] -= 1
        excess -= 1
    return widths


def _row(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = []
    for cell, column, cells_wide in zip(cells, columns, widths, strict=True):
        text = shortened_inside(cell, cells_wide)
        space = " " * (cells_wide - width(text))
        padded.append(space + text if column.right else text + space)
    return _GAP.join(padded).rstrip()
