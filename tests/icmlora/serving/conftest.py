"""A trained store of tiny adapters, one of them evicted, a bundle of it, and its base model; not to be changed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.tiny_fleet import icm_quietly
from tests.icmlora.tiny_base import LABEL
from tests.quick import quick_codes
from tests.shared import built_once

__all__ = ["quick_codes"]


@dataclass(frozen=True)
class Served:
    """What a server is started with."""

    store: Path
    bundle: Path
    base: Path
    label: str = LABEL


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return name -> content of the files in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="session")
def served_template(trained_template: Path, mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    def build(folder: Path) -> None:
        shutil.copytree(trained_template, folder / "store")
        icm_quietly(folder / "store", "evict", "poems", "--max-error", "10")
        icm_quietly(folder / "store", "export", folder / "fleet.icm")

    folder = built_once(tmp_path_factory, "served", build)
    return Served(folder / "store", folder / "fleet.icm", mixed_template / "base")


@pytest.fixture
def served(served_template: Served, tmp_path: Path) -> Served:
    """The same with a store of its own."""
    store = tmp_path / "served-store"
    shutil.copytree(served_template.store, store)
    return Served(store, served_template.bundle, served_template.base)
