"""Locations of base models on this machine: a per-user setting, shared by all stores. Never imports torch.

    ~/.config/icm/base_models.yaml        next to config.toml; written by `icm base add` and `icm base rm`

        meta-llama/Llama-3.1-8B:
          load_in: nf4
          path: /models/llama-8b

A base model is located by any of its names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from icmlora.base_models.finding.lookup import FoundBase, find_base_model
from icmlora.base_models.finding.mirrors import original_of
from icmlora.errors import BaseModelNotFound, DataError
from registry import files as fs
from registry.names import LOAD_IN, LoadIn

_FILE = "base_models.yaml"
_HEADER = "# Where base models are on this machine, written by `icm base add` and `icm base rm`.\n"


@dataclass(frozen=True)
class Location:
    """The path of a base model and how to load it."""

    path: Path
    loader: str | None = None  # MODULE:FUNCTION that loads it, if transformers does not
    load_in: LoadIn | None = None  # quantised format for loading the weights; None for the device's default


def locations_file() -> Path | None:
    """Return the path of the locations file, which may not exist; None for a user without a home folder."""
    if named := os.environ.get("ICM_CONFIG"):
        return Path(named).with_name(_FILE)
    folder = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        return (folder if folder.is_absolute() else Path.home() / ".config") / "icm" / _FILE
    except RuntimeError:  # common in containers whose user is not in /etc/passwd
        return None


def locations() -> Mapping[str, Location]:
    """Return name -> location; raise `DataError` if the file is invalid."""
    file = locations_file()
    return {} if file is None else _read(file)


def set_location(name: str, location: Location | None) -> None:
    """Record the location of a base model; None removes it. Safe across concurrent processes."""
    import yaml

    file = locations_file()
    if file is None:
        hint = "set HOME or XDG_CONFIG_HOME or ICM_CONFIG"
        raise DataError("this user has no home folder, and HOME is not set", hint=hint)
    file = file.resolve()  # keep a symlink to a file elsewhere
    with fs.store_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        # A separate file, because the locations file is replaced and its lock would stay on the old inode.
        descriptor = fs.open_file(file.with_name(f"{_FILE}.lock"), os.O_CREAT | os.O_RDWR)
        try:
            fs.lock(descriptor, "alone", wait=True)
            known = {label: place for label, place in _read(file).items() if label != name}
            known |= {} if location is None else {name: location}
            entries = {
                label: {key: str(value) for key, value in vars(place).items() if value is not None}
                for label, place in known.items()
            }
            text = _HEADER + (yaml.safe_dump(entries, allow_unicode=True) if entries else "")
            new = file.with_name(f"{_FILE}.new")
            fs.unlink(new)  # left over from a killed process
            fs.write_file(new, text.encode())
            fs.replace(new, file)
            fs.fsync_dir(file.parent)
        finally:
            os.close(descriptor)


def location_of(names: Sequence[str], known: Mapping[str, Location]) -> Location | None:
    """Return the location of a base model with these names, or None."""
    return next((known[name] for name in _in_order(names, known) if name in known), None)


def find_located(names: Sequence[str]) -> FoundBase:
    """Find a base model by any of its names; raise `BaseModelNotFound` if no name has a copy."""
    known = locations()
    chosen, first = location_of(names, known), None
    for name in _in_order(names, known):
        place = known.get(name)
        aliases, loader = ({}, None) if place is None else ({name: place.path}, place.loader)
        try:
            found = find_base_model(name, aliases=aliases, loader=loader)
            return replace(found, load_in=None if chosen is None else chosen.load_in)
        except BaseModelNotFound as error:
            first = first or error
    assert first is not None
    raise first


def _in_order(names: Sequence[str], known: Mapping[str, Location]) -> list[str]:
    """Sort names with a location first and quantised mirrors last, because adapters are measured on the original."""
    return sorted(names, key=lambda name: (original_of(name).is_quantised, name not in known))


def _read(file: Path) -> dict[str, Location]:
    import yaml

    hint, found = "correct the file or move it away", {}
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if not isinstance(entries, dict):
            raise DataError("is not a mapping of base models")
        for name, fields in entries.items():
            found[str(name)] = _location(file.parent, str(name), fields)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the file of base models cannot be read: {error}", path=file, hint=hint) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the file of base models is not YAML: {reason}", path=file, hint=hint) from error
    except DataError as error:
        raise DataError(f"the file of base models {error.message}", path=file, hint=hint) from None
    return found


def _location(folder: Path, name: str, fields: object) -> Location:
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
        raise DataError(f"has no path for {name!r}")
    if odd := sorted(map(str, fields.keys() - {"path", "loader", "load_in"})):
        raise DataError(f"has an unknown key {odd[0]!r} for {name!r}")
    loader, load_in = fields.get("loader"), fields.get("load_in")
    if not isinstance(loader, str | None):
        raise DataError(f"has a loader for {name!r} that is not MODULE:FUNCTION")
    if load_in not in (None, *LOAD_IN):
        raise DataError(f"has a load_in for {name!r} that is not {' or '.join(LOAD_IN)}")
    return Location(folder / Path(fields["path"]).expanduser(), loader, load_in)
