"""Print results on stdout; print notes, warnings, errors and progress on stderr.

Modes:
    human   stdout is a terminal: aligned columns, long values shortened to fit, bold headings
    plain   stdout is a pipe: aligned columns, full values, no colour
    json    --json: documents or JSON lines on stdout, JSON lines on stderr, no progress, no questions
    quiet   -q: only the result (names, paths) and errors
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
from typing import Generic, TextIO, TypeVar

from icm_cli.config import switched_on
from icm_cli.errors import Failure, UsageProblem
from icm_cli.progress import PlainProgress, ProgressDisplay, RichProgress
from icm_cli.table import GAP, Column as Column, laid_out
from icmlora.io.text import escape, escape_lines, width

R = TypeVar("R")


class Mode(Enum):
    """Output mode."""

    HUMAN = "human"
    PLAIN = "plain"
    JSON = "json"
    QUIET = "quiet"


@dataclass(frozen=True)
class Field(Column, Generic[R]):
    """A column of a table of records, with a function that returns the text of a cell."""

    cell: Callable[[R], str]
    _: KW_ONLY
    is_rare: bool = False  # omit the column if all its cells are empty


class Output:
    """Prints the output of a command in one of the modes."""

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbosity: int = 0, progress: bool = True
    ) -> None:
        self.verbosity = verbosity
        self._hints = set[str]()  # already printed
        self._progress = progress and not switched_on("ICM_NO_PROGRESS")
        if as_json:
            self.mode = Mode.JSON
        elif quiet:
            self.mode = Mode.QUIET
        else:
            self.mode = Mode.HUMAN if sys.stdout.isatty() else Mode.PLAIN

    @property
    def is_json(self) -> bool:
        """Whether the output is JSON."""
        return self.mode is Mode.JSON

    @property
    def is_quiet(self) -> bool:
        """Whether to print only the bare result."""
        return self.mode is Mode.QUIET

    # Results, on stdout.

    def document(self, value: object) -> None:
        """Print the JSON document of a command; JSON mode only."""
        if self.is_json:
            _write(sys.stdout, _json(value, sys.stdout, indent=2))

    def event(self, kind: str, /, **fields: object) -> None:
        """Print one JSON line `{"type": kind, ...}`; JSON mode only."""
        if self.is_json:
            _write(sys.stdout, _json({"type": kind, **fields}, sys.stdout))
            sys.stdout.flush()

    def answer(self, text: str) -> None:
        """Print a line of the bare result (a name, a path); all modes except JSON."""
        if not self.is_json:
            _write(sys.stdout, escape_lines(text))

    def line(self, text: str = "") -> None:
        """Print a line of text; human and plain mode only."""
        if self.mode in (Mode.HUMAN, Mode.PLAIN):
            _write(sys.stdout, escape_lines(text))

    def names(self, names: Iterable[str]) -> None:
        """Print one name per line; quiet mode only."""
        if self.is_quiet:
            for name in names:
                self.answer(name)

    def listing(self, fields: Sequence[Field[R]], records: Sequence[R]) -> None:
        """Print a table with a row for each record; human and plain mode only."""
        if self.mode in (Mode.HUMAN, Mode.PLAIN):
            cells = [(field, [field.cell(record) for record in records]) for field in fields]
            self._table([(field, texts) for field, texts in cells if any(texts) or not field.is_rare])

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; human and plain mode only."""
        if rows:
            self._table(list(zip(columns, zip(*rows, strict=True), strict=True)))

    def _table(self, cells: Sequence[tuple[Column, Sequence[str]]]) -> None:
        """Print columns with the texts of their cells."""
        if self.mode not in (Mode.HUMAN, Mode.PLAIN) or not cells or not cells[0][1]:
            return
        limit = shutil.get_terminal_size().columns if self.mode is Mode.HUMAN else None
        head, *rows = laid_out([column for column, _ in cells], [texts for _, texts in cells], limit)
        _write(sys.stdout, "\n".join([self._bold(head), *rows]))

    def record(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print name-value pairs, one per line; human and plain mode only."""
        if self.mode not in (Mode.HUMAN, Mode.PLAIN) or not pairs:
            return
        widest = max(width(name) for name, _ in pairs)
        for name, value in pairs:
            _write(sys.stdout, f"{self._bold(name.ljust(widest))}{GAP}{escape(value)}".rstrip())

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
        """Print a next step. Repeated hints are printed once; silent with --quiet and --json."""
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

    def progress(self, label: str) -> ProgressDisplay:
        """Return a progress display on stderr: a bar on a terminal, otherwise a line every few seconds."""
        if not self._progress or self.mode in (Mode.JSON, Mode.QUIET):
            return ProgressDisplay()
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            return RichProgress(label)
        return PlainProgress(label)

    def confirm(self, question: str, *, yes: bool) -> bool:
        """Ask before an irreversible action. Raises `UsageProblem` without a terminal."""
        if yes:
            return True
        if self.is_json or not sys.stdin.isatty():
            fact = f"{question} Cannot ask without a terminal."
            raise UsageProblem(fact, hint="add --yes to skip the question")
        sys.stderr.write(f"{escape_lines(question)} [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def _bold(self, text: str) -> str:
        coloured = self.mode is Mode.HUMAN and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        return f"\x1b[1m{text}\x1b[0m" if coloured else text


def _json(value: object, stream: TextIO, indent: int | None = None) -> str:
    # Use JSON escapes for characters outside the stream's encoding; `_write` would use Python escapes.
    is_utf8 = codecs.lookup(stream.encoding or "utf-8").name == "utf-8"
    return json.dumps(value, ensure_ascii=not is_utf8, indent=indent, allow_nan=False)


def _write(stream: TextIO, text: str) -> None:
    # Escape characters outside the stream's encoding instead of raising an error.

    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
