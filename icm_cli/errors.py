"""Map exceptions to exit codes and messages.

    CliError                errors of this package
    |-- UsageProblem        conflicting options or an invalid value (2)
    |-- ConfigProblem       an unusable config.toml (2)
    |-- Interrupted         Ctrl-C or SIGTERM; the message lists the finished work (130)
    `-- StdoutClosed        stdout was closed by its reader (141, silent)

`TABLE` lists exceptions of other packages by full name, so that `icm --help` imports none of them.
"""

from __future__ import annotations

import errno
import json
import re
from dataclasses import dataclass
from enum import IntEnum

from icmlora.io.memory import out_of_memory, ran_out
from icmlora.io.text import escape_lines

INTERRUPTED = "interrupted; finished work is kept"


class ExitCode(IntEnum):
    """Exit codes of all commands, listed in docs/reference/exit-codes.md. Existing codes never change."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        """Create a member with its meaning."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "done"
    FAILED = 1, "failed, or `icm verify` found problems"
    USAGE = 2, "wrong usage"
    PARTLY = 3, "partly done: some inputs or tasks were skipped, or some originals were not evicted"
    NO_STORE = 10, "no store found at this location"
    LOCKED = 11, "another icm process held the lock longer than `--lock-timeout`"
    OTHER_VERSION = 12, "the store or a code was written by an incompatible version of icm"
    DAMAGED = 13, "damaged data: a digest mismatch or a missing blob"
    TOO_LOSSY = 14, "the error exceeds the given limit"
    NO_SPACE = 15, "no space left on the device; the store is intact"
    UNSAFE = 16, "unsafe input refused: a pickle, a link out of the folder, or a file over the limits"
    NOT_RECOGNIZED = 17, "the samples match no stored task"
    UNAVAILABLE = 18, "the store's database or bucket is unreachable or refused the request; committed data is safe"
    INTERRUPTED = 130, "interrupted"
    STDOUT_CLOSED = 141, "stdout was closed by its reader"


class CliError(Exception):
    """Base class of command-line errors."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageProblem(CliError):
    """Conflicting options or an invalid value."""


class ConfigProblem(CliError):
    """An unusable configuration file."""


class Interrupted(CliError):
    """The user stopped the command. The message lists the finished work."""


class StdoutClosed(CliError):
    """Stdout was closed by its reader."""


@dataclass(frozen=True)
class Failure:
    """The printed form of an exception."""

    code: ExitCode
    kind: str
    message: str
    hint: str | None
    # False for a bug: an exception outside the table. Its traceback is written to the log.
    expected: bool = True

    def as_text(self) -> str:
        """Return `error: ...` and, after a blank line, `hint: ...`."""
        text = f"error: {escape_lines(self.message)}"
        return text if self.hint is None else f"{text}\n\nhint: {escape_lines(self.hint)}"

    def as_json(self) -> str:
        """Return the JSON line for stderr."""
        fields = {"type": "error", "code": int(self.code), "kind": self.kind, "message": self.message}
        return json.dumps({**fields, "hint": self.hint})


# Full name of an exception class -> exit code. Other classes use the code of their nearest listed base class.
TABLE: dict[str, ExitCode] = {
    "icm_cli.errors.CliError": ExitCode.FAILED,
    "icm_cli.errors.UsageProblem": ExitCode.USAGE,
    "icm_cli.errors.ConfigProblem": ExitCode.USAGE,
    "icm_cli.errors.Interrupted": ExitCode.INTERRUPTED,
    "icm_cli.errors.StdoutClosed": ExitCode.STDOUT_CLOSED,
    "icmlora.fleet.write.sources.TooLossy": ExitCode.TOO_LOSSY,
    "typer.exceptions.TyperException": ExitCode.USAGE,
    "registry.errors.IcmError": ExitCode.FAILED,
    "registry.errors.InvalidFilter": ExitCode.USAGE,
    "registry.errors.StoreNotFound": ExitCode.NO_STORE,
    "registry.errors.NotAStore": ExitCode.NO_STORE,
    "registry.errors.StoreLocked": ExitCode.LOCKED,
    "registry.errors.StoreTooNew": ExitCode.OTHER_VERSION,
    "registry.errors.StoreTooOld": ExitCode.OTHER_VERSION,
    "registry.errors.StoreFull": ExitCode.NO_SPACE,
    "registry.errors.StoreUnavailable": ExitCode.UNAVAILABLE,
    "registry.errors.DamagedStore": ExitCode.DAMAGED,
    "registry.errors.SourceRefused": ExitCode.UNSAFE,
    "registry.errors.SourceChanged": ExitCode.FAILED,
    "icmlora.errors.UnsafeInput": ExitCode.UNSAFE,
    "icmlora.errors.CodeError": ExitCode.DAMAGED,
    "icmlora.errors.OtherFormat": ExitCode.OTHER_VERSION,
    "icmlora.errors.InvalidShard": ExitCode.USAGE,
    "icmlora.errors.InvalidWorkers": ExitCode.USAGE,
    "icmlora.errors.OptionsConflict": ExitCode.USAGE,
    "icmlora.errors.BundleError": ExitCode.DAMAGED,
    "icmlora.errors.NotRecognized": ExitCode.NOT_RECOGNIZED,
}


def describe(error: BaseException) -> Failure:
    """Return the failure for an exception: a listed exception, an operating system error, or a bug."""
    if isinstance(error, KeyboardInterrupt):
        return Failure(ExitCode.INTERRUPTED, "interrupted", INTERRUPTED, "run the same command again to continue")
    code = next((TABLE[name] for name in map(full_name, type(error).__mro__) if name in TABLE), None)
    if code is not None:
        return Failure(code, _kind(error), _fact(error), getattr(error, "hint", None))
    if isinstance(error, OSError):
        return _from_system(error)
    if ran_out(error):
        found = out_of_memory(error)
        return Failure(ExitCode.FAILED, _kind(found), found.message, found.hint)
    message = f"unexpected {type(error).__name__}: {error}"
    return Failure(ExitCode.FAILED, "unexpected", message, None, expected=False)


def is_help(error: BaseException) -> bool:
    """Return whether a command group was called without a subcommand and printed its help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def full_name(kind: type) -> str:
    """Return the module and name of a class, as in `TABLE`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _fact(error: BaseException) -> str:
    """Return the message of an exception. For Typer's usage errors, only `format_message` names the option."""
    if is_help(error):
        return "no command given"
    formatted = getattr(error, "format_message", None)
    if formatted is None:
        return str(error)
    return str(formatted()).replace(": Value error, ", ": ", 1)  # Pydantic's noise


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
        return Failure(ExitCode.NO_SPACE, "no_space", message, "free some space; `icm prune` also works on a full disk")
    return Failure(ExitCode.FAILED, _snake(type(error).__name__), message, _ERRNO_HINTS.get(error.errno or 0))


_ERRNO_HINTS = {
    errno.EROFS: "use another path, or remount the read-only file system for writing",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check the owner and permissions of this path, or use another path"),
}
