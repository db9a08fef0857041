"""The one table from exceptions to exit codes, and how a failure is told.

    CliError                what this package itself refuses
    ├── UsageProblem        options that do not go together, a value that makes no sense (2)
    ├── ConfigProblem       config.toml cannot be used (2)
    ├── Interrupted         Ctrl-C, with one line on what was kept (130)
    └── StdoutClosed        the reader of stdout went away (141, silently)

Exceptions of the other packages are named here by their full name and found along their method resolution order, so
that `icm --help` imports none of them.
"""

from __future__ import annotations

import errno
import json
import re
from dataclasses import dataclass
from enum import IntEnum

from icmlora.io.text import escape


class ExitCode(IntEnum):
    """What a command's exit code says. Codes are only added; `docs/reference/exit-codes.md` lists the same."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        """Make a member that carries its meaning."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "done"
    FAILED = 1, "failed, or `verify` found problems"
    USAGE = 2, "wrong usage"
    PARTLY = 3, "partly done: some inputs were refused, or some originals kept"
    NO_STORE = 10, "no store there"
    LOCKED = 11, "the store is locked by another icm and `--lock-timeout` passed"
    TOO_NEW = 12, "store format or schema is newer than this icm"
    DAMAGED = 13, "damaged data met (digest mismatch, missing blob)"
    TOO_LOSSY = 14, "distortion above the limit that was asked for"
    NO_SPACE = 15, "no space left; the store is consistent"
    UNSAFE = 16, "input refused as unsafe (pickle, symlink out of the tree, over limits)"
    INTERRUPTED = 130, "interrupted"
    STDOUT_CLOSED = 141, "stdout was closed by its reader"


class CliError(Exception):
    """Base class of what the command line itself refuses.

    Attributes:
        hint: What to do next, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageProblem(CliError):
    """Options or arguments that make no sense together."""


class ConfigProblem(CliError):
    """A configuration file that cannot be used."""


class Interrupted(CliError):
    """The user stopped the command; the message says what was kept."""


class StdoutClosed(CliError):
    """Nobody reads the answer any more."""


@dataclass(frozen=True)
class Failure:
    """What is told about an exception.

    Attributes:
        code: The exit code.
        kind: A short stable word for scripts.
        message: The fact.
        hint: What to do next, or None.
        expected: Whether the exception is in the table; others are bugs and get a traceback in the log.
    """

    code: ExitCode
    kind: str
    message: str
    hint: str | None
    expected: bool = True

    def as_text(self) -> str:
        """Return `error: ...` and, after a blank line, `hint: ...`."""
        text = f"error: {escape_lines(self.message)}"
        return text if self.hint is None else f"{text}\n\nhint: {escape_lines(self.hint)}"

    def as_json(self) -> str:
        """Return the one line that `--json` puts on stderr."""
        fields = {"type": "error", "code": int(self.code), "kind": self.kind, "message": self.message}
        return json.dumps({**fields, "hint": self.hint})


# Full name of an exception class -> exit code. A class that is not here takes its nearest base's line.
TABLE: dict[str, ExitCode] = {
    "icm_cli.errors.CliError": ExitCode.FAILED,
    "icm_cli.errors.UsageProblem": ExitCode.USAGE,
    "icm_cli.errors.ConfigProblem": ExitCode.USAGE,
    "icm_cli.errors.Interrupted": ExitCode.INTERRUPTED,
    "icm_cli.errors.StdoutClosed": ExitCode.STDOUT_CLOSED,
    "icmlora.fleet.materialize.TooLossy": ExitCode.TOO_LOSSY,
    "typer.exceptions.TyperException": ExitCode.USAGE,
    "registry.errors.RegistryError": ExitCode.FAILED,
    "registry.errors.StoreNotFound": ExitCode.NO_STORE,
    "registry.errors.NotAStore": ExitCode.NO_STORE,
    "registry.errors.StoreLocked": ExitCode.LOCKED,
    "registry.errors.StoreTooNew": ExitCode.TOO_NEW,
    "registry.errors.StoreFull": ExitCode.NO_SPACE,
    "registry.errors.DamagedStore": ExitCode.DAMAGED,
    "registry.errors.SourceRefused": ExitCode.UNSAFE,
    "registry.errors.SourceChanged": ExitCode.FAILED,
    "icmlora.errors.IcmLoraError": ExitCode.FAILED,
    "icmlora.errors.Cancelled": ExitCode.INTERRUPTED,
    "icmlora.errors.UnsafeInput": ExitCode.UNSAFE,
    "icmlora.errors.CodeError": ExitCode.DAMAGED,
    "icmlora.errors.UnknownBaseline": ExitCode.USAGE,
    "icmlora.errors.BundleError": ExitCode.DAMAGED,
}


def describe(error: BaseException) -> Failure:
    """Return what is told about an exception: from the table, from the operating system, or as a bug."""
    if isinstance(error, KeyboardInterrupt):
        hint = "run the same command again to continue"
        return Failure(ExitCode.INTERRUPTED, "interrupted", "interrupted; what was finished is kept", hint)
    code = next((TABLE[name] for name in map(full_name, type(error).__mro__) if name in TABLE), None)
    if code is not None:
        return Failure(code, _kind(error), _fact(error), getattr(error, "hint", None))
    if isinstance(error, OSError):
        return _from_system(error)
    message = f"unexpected {type(error).__name__}: {error}"
    return Failure(ExitCode.FAILED, "unexpected", message, None, expected=False)


def is_help(error: BaseException) -> bool:
    """Say whether an exception stands for a group without a subcommand, whose help is all that there is to say."""
    return type(error).__name__ == "NoArgsIsHelpError"


def full_name(kind: type) -> str:
    """Return a class's module and name, as the table spells it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def escape_lines(text: str) -> str:
    """Escape a text and keep its line breaks."""
    return "\n".join(escape(line) for line in text.split("\n"))


def _fact(error: BaseException) -> str:
    """Return the message of an exception; a usage error of Typer names its option only when it is asked for that."""
    if is_help(error):
        return "no command was given"
    formatted = getattr(error, "format_message", None)
    if formatted is None:
        return str(error)
    return str(formatted()).replace(": Value error, ", ": ", 1)  # Pydantic's words, which say nothing


def _kind(error: BaseException) -> str:
    declared = getattr(error, "kind", None)
    return declared if isinstance(declared, str) else _snake(type(error).__name__)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _from_system(error: OSError) -> Failure:
    message = error.strerror or str(error)
    if error.filename is not None:
        message = f"{error.filename}: {message}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(ExitCode.NO_SPACE, "no_space", message, "free some space; `icm prune` needs none to run")
    return Failure(ExitCode.FAILED, _snake(type(error).__name__), message, None)
