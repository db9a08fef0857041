"""Where base models are on this machine: a setting of each user, and not a fact about a store that a team shares.

$XDG_CONFIG_HOME/icm/base_models.json      {"NAME": {"path": "/models/llama", "load_in": "nf4"}, ...}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from icmlora.errors import DataError
from registry import files as fs
from registry.names import LOAD_IN, LoadIn


@dataclass(frozen=True)
class Location:
    """Where a base model is, and how it is loaded."""

    path: str
    loader: str | None = None  # MODULE:FUNCTION that loads it, if transformers does not
    load_in: LoadIn | None = None  # the few bits in which its weights are loaded


def locations_file() -> Path:
    """Return the file with all locations."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "icm" / "base_models.json"


def locations() -> dict[str, Location]:
    """Return name -> location of all base models that the user added on this machine.

    Raises:
        DataError: The file is damaged.
    """
    path = locations_file()
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from error
    try:
        return {str(name): _location(entry) for name, entry in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "correct the file, or delete it and run `icm base add NAME PATH` again"
        raise DataError("is not a list of base models", path=path, hint=hint) from error


def location_of(names: Iterable[str], known: Mapping[str, Location] | None = None) -> Location | None:
    """Return the location of a base model that is known under the first of some names."""
    known = locations() if known is None else known
    return next((known[name] for name in names if name in known), None)


def set_location(name: str, location: Location | None) -> None:
    """Record where a base model is; None forgets it."""
    path = locations_file()
    with fs.store_errors(path), _locked(path):
        known = locations()
        known.pop(name, None)
        if location is not None:
            known[name] = location
        entries = {key: {k: v for k, v in asdict(one).items() if v is not None} for key, one in sorted(known.items())}
        temporary = path.with_suffix(".tmp")
        fs.unlink(temporary)
        fs.write_file(temporary, (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode())
        fs.replace(temporary, path)
        fs.fsync_dir(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing the file meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = fs.open_file(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    try:
        fs.lock(descriptor, "alone", wait=True)
        yield
    finally:
        os.close(descriptor)


def _location(entry: Mapping[str, object]) -> Location:
    path, loader, load_in = entry["path"], entry.get("loader"), entry.get("load_in")
    if not isinstance(path, str) or not isinstance(loader, str | None) or load_in not in (None, *LOAD_IN):
        raise ValueError(str(entry)[:80])
    return Location(path, loader, cast("LoadIn | None", load_in))
