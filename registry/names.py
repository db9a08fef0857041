"""Names from outside: which ones may name a task, how they are shown, how module names are sorted; where a store is.

A name is data. It is never joined to a path inside the store, and it reaches a message only through `escape`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Literal, get_args

from registry.errors import InvalidName, NotAStore, RegistryError

MAX_NAME = 128
NLL = "nats per token"
"""The metric of a causal language model: its mean negative log-likelihood."""
_BUNDLE = "bundle "
UNKNOWN_BASE = "unknown"  # the base model of adapters that name none
LoadIn = Literal["nf4", "int8"]
"""In what few bits the weights of a base model can be loaded; their order is part of the schema."""
LOAD_IN = get_args(LoadIn)

MAX_NAME_BYTES = 192
"""In UTF-8: with an ending it is still the name of a file, which may take 255 bytes."""
# Such a name means the same on every file system, and a shell takes it as one word. Spaces are not allowed: commands
# print lists of names for others to read, and these split at spaces.
_ASCII_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Letters and marks that show nothing, so that two names could look alike: joiners, fillers, variation selectors.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_FOLDED = {ord(letter): letter.lower() for letter in ascii_uppercase}
_MODULE_NAME = re.compile(r"\w[\w-]*(?:\.\w[\w-]*)*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@=+-]{0,63}")
MAX_NOTE = 4000
# Windows allows none of these in the name of a file, and `/` and `\\` would lead out of its folder.
_NOT_IN_FILE_NAMES = frozenset('/\\:*?"<>|')
_MAX_FILE_NAME = 255  # bytes, on most file systems
_CHECKPOINT = re.compile(r"/checkpoint-[0-9]+$")
_DIGITS = re.compile(r"(\d+)")
# Windows opens a device, not a file, for these, with any extension.
_WINDOWS_NAMES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³")]
)


def task_name_problem(name: str) -> str | None:
    """Return the reason why a name cannot be a task's; None if it can."""
    if not name:
        return "the name is empty"
    if len(name) > MAX_NAME:
        return f"the name has {len(name)} characters, more than {MAX_NAME}"
    if not (_ASCII_NAME.fullmatch(name) if name.isascii() else _is_one_word(name)):
        return "a name has letters, digits (of any script), '.', '_' and '-', and starts with a letter or digit"
    if not unicodedata.is_normalized("NFC", name):
        return "the name is not in Unicode's composed form (NFC)"
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        return f"the name takes {size} bytes, more than {MAX_NAME_BYTES}"
    if name.split(".")[0].lower() in _WINDOWS_NAMES:
        return "the name is reserved by Windows"
    return None


def _is_one_word(name: str) -> bool:
    return unicodedata.category(name[0])[0] != "M" and all(map(is_name_character, name)) and name[0] not in "._-"


def is_name_character(char: str) -> bool:
    """Return whether a task name may contain a character: letters, marks and numbers of every script, and `._-`."""
    return (unicodedata.category(char)[0] in "LMN" and not _UNSEEN.match(char)) or char in "._-"


def check_name(name: str) -> str:
    """Return `name` unchanged if it can name a task, else raise `InvalidName`."""
    if (problem := task_name_problem(name)) is not None:
        raise InvalidName(f"{escape(name, 120)!r} is not a valid task name: {problem}", hint="choose another name")
    return name


def check_tag(tag: str) -> str:
    """Return `tag` unchanged if it can be a tag, else raise `InvalidName`."""
    if not _TAG.fullmatch(tag):
        rule = "a tag has at most 64 letters, digits and . _ : / @ = + -, and starts with a letter or digit"
        raise InvalidName(f"{escape(tag, 80)!r} is not a valid tag: {rule}", hint="choose another tag")
    return tag


def check_note(text: str) -> str:
    """Return a note without spaces around it; raise `InvalidName` if it is empty, too long or no text."""
    note = text.strip()
    if not note or len(note) > MAX_NOTE:
        fact = "it is empty" if not note else f"it has {len(note)} characters, more than {MAX_NOTE}"
    elif not is_text(note):
        fact = "it is not text"
    else:
        return note
    raise InvalidName(f"the note is not valid: {fact}", hint="run `icm edit TASK --no-note` to remove a note")


def is_text(text: str) -> bool:
    """Return whether UTF-8 can encode a text: command-line arguments may contain invalid bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def folded(text: str) -> str:
    """Return a text with lower-case ASCII letters, which every database compares alike."""
    return text.translate(_FOLDED)


def is_module_name(name: str) -> bool:
    """Return whether a name is a dotted path of words, as in `model.layers.0.self_attn.q_proj` or `experts.en-de`."""
    return _MODULE_NAME.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Return whether a name is a plain file name: no path, nothing hidden, no control characters."""
    return (
        name.isprintable()  # which lone surrogates are not, so that it can be encoded
        and 0 < len(name.encode()) <= _MAX_FILE_NAME
        and name[0] not in " .-"
        and name[-1] != " "
        and not _NOT_IN_FILE_NAMES & set(name)
    )


def source_label(path: Path) -> str:
    """Return a path as text that every database takes: bytes that are not UTF-8 are written out in hexadecimal."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def bundle_source(digest: str) -> str:
    """Return the source label of an adapter from a bundle."""
    return f"{_BUNDLE}{digest}"


def is_bundle_source(source: str) -> bool:
    """Return whether an adapter came from a bundle, so that its weights were never in this store."""
    return source.startswith(_BUNDLE)


def folder_of(source: str) -> str:
    """Return the folder of a task whose final adapter came from a place, which may be one of its checkpoints."""
    return _CHECKPOINT.sub("", source)


def split_version(name: str) -> tuple[str, str | None]:
    """Return the name and the version, a number or an alias, of `TASK@VERSION`; no task has `@` in its name."""
    task, _, version = name.partition("@")
    return task, version or None


def split_label(label: str) -> tuple[str, str | None]:
    """Return the hub name and the revision of a base model's name; a path has no revision."""
    if os.path.isabs(label):
        return label, None
    name, _, revision = label.partition("@")
    return name, revision or None


@lru_cache(maxsize=4096)  # the adapters of a fleet have modules of the same names
def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that orders numbers by value: `layers.2` before `layers.10`."""
    parts = _DIGITS.split(name)
    return tuple((0, int(part), part) if index % 2 else (1, 0, part) for index, part in enumerate(parts))


def some(items: Sequence[str], separator: str = ", ", most: int = 4) -> str:
    """Return the first items in one line, and how many more there are."""
    left = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *left])


def escape(text: str, limit: int | None = None) -> str:
    r"""Write out everything that could move a cursor, reorder a line or end it, as `\x1b` or `\u202e`.

    Names of files, tensors and tasks are hostile text until they have passed through here.
    """
    shown = text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(char if char.isprintable() else _written_out(char) for char in shown)


def _written_out(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# As others write it: MLflow's users name SQLAlchemy's driver too, hosts of databases say `postgres`.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")
_SECRETS = re.compile(r"[?&](user|password|sslpassword)=[^&]*")
_CREDENTIALS = re.compile(r"(?<=://).*@", re.DOTALL)
_PASSWORD = re.compile(r"://[^/@:]*:[^/]+@|[?&](ssl)?password=.")


@dataclass(frozen=True)
class DatabaseUrl:
    """The address of a store whose rows are in PostgreSQL, such as `postgresql://HOST/DATABASE`.

    As text it has neither user nor password.

    Attributes:
        secret: The complete URL, for connecting.
    """

    secret: str = field(repr=False)

    def __str__(self) -> str:
        return _without_credentials(self.secret)

    def check_shareable(self) -> None:
        """Raise `RegistryError` if it has a password: other processes could read it."""
        if _PASSWORD.search(self.secret):
            hint = "remove it from the address, and set PGPASSWORD or write ~/.pgpass on each machine"
            raise RegistryError(
                f"the address {self} contains a password, which icm does not pass to other processes", hint=hint
            )

    def __reduce__(self) -> tuple[type[DatabaseUrl], tuple[str]]:
        """Pickle it, unless it has a password."""
        self.check_shareable()
        return DatabaseUrl, (self.secret,)


Address = Path | DatabaseUrl
"""Where a store is."""


def absolute(address: Address) -> str:
    """Return where a store is as text that means the same from every folder, and has no credentials."""
    return source_label(address.resolve()) if isinstance(address, Path) else str(address)


def address_of(text: str | Path | DatabaseUrl) -> Address:
    """Read where a store is: a folder, or the address of a database.

    Raises:
        NotAStore: It is the address of something else.
    """
    match = _SCHEME.match(text) if isinstance(text, str) else None
    if match is None:
        return text if isinstance(text, DatabaseUrl) else Path(text)
    assert isinstance(text, str)
    if match[1].lower() in _POSTGRES:
        return DatabaseUrl(f"postgresql://{text[match.end() :]}")
    hint = "use a folder or postgresql://HOST/DATABASE; run `icm init --blobs URL` to keep the files in an object store"
    raise NotAStore(f"{_without_credentials(text)} is not a valid store address", hint=hint)


def _without_credentials(address: str) -> str:
    """Leave out all that may be a user or a password, also where it should have been quoted."""
    shown = _CREDENTIALS.sub("", _SECRETS.sub("", address))
    return shown if "?" in shown else shown.replace("&", "?", 1)
