"""A base model in a GGUF file: it is converted once into the cache, whoever else does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from icmlora.base_models import load as base_loading
from icmlora.base_models.finding.locations import Location, set_location
from icmlora.fleet.resources.loading import open_base
from registry.store import Store
from tests.icmlora.base_models.test_gguf import write_tiny_gguf
from tests.shared import paths_of

LABEL = "example/tiny"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = Store.open(tmp_path / "store", create=True)
    set_location(LABEL, Location(write_tiny_gguf(tmp_path / "tiny.gguf")))
    return store


def converted(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("**/base-models/*"))


def test_a_gguf_file_is_converted_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_base(store, LABEL, torch.device("cpu"), cache=paths_of(store).root.parent / "cache" / "icm")
    monkeypatch.setattr(base_loading, "load_gguf", lambda *_: pytest.fail("it is in the cache"))
    second = open_base(store, LABEL, torch.device("cpu"), cache=paths_of(store).root.parent / "cache" / "icm")
    assert first.fingerprint == second.fingerprint
    assert len(converted(tmp_path)) == 1


def test_two_processes_that_convert_it_at_the_same_time_both_succeed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, others = base_loading.load_gguf, []

    def load(*arguments: Any) -> Any:
        if not others:
            others.append(None)
            open_base(store, LABEL, torch.device("cpu"), cache=paths_of(store).root.parent / "cache" / "icm")
        return real(*arguments)

    monkeypatch.setattr(base_loading, "load_gguf", load)
    open_base(store, LABEL, torch.device("cpu"), cache=paths_of(store).root.parent / "cache" / "icm")
    assert len(converted(tmp_path)) == 1
