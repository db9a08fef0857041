"""Folders that the tests of a session share, whichever worker of pytest-xdist needs one first."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.storage.paths import StorePaths
from registry.store import Store


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Return the folder NAME of the session; `build` fills it, once for all workers. Nobody changes it afterwards.

    As in pytest-xdist's documentation, "Making session-scoped fixtures execute only once": a file lock beside the
    folder, which is above the temporary folders of the workers.
    """
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a build that failed left
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CONFIG_HOME", str(config_of(folder)))
                build(folder)
            done.touch()
    return folder


def use_config_of(template: Path) -> None:
    """Let this test or build know the base models that the build of a template added: icm notes them per user."""
    source = config_of(template)
    if source.is_dir():
        shutil.copytree(source, os.environ["XDG_CONFIG_HOME"], dirs_exist_ok=True)


def config_of(folder: Path) -> Path:
    """Return the configuration of the build of a template."""
    return folder.with_name(f"{folder.name}.config")


def paths_of(store: Store) -> StorePaths:
    """Return the paths of a store that is a folder."""
    assert isinstance(store.address, Path)
    return StorePaths(store.address)
