"""What every test gets: a home of its own, no network, no colour, one thread."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch: tiny tensors are slower on many threads, and parallel runs then share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests do not time things: an example is slow when the machine is busy, and that is no failure.
settings.register_profile("icm", deadline=None)
settings.load_profile("icm")


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point every variable that icm reads at `tmp_path`, so that no test sees or touches the user's own store."""
    for name in [name for name in os.environ if name.startswith("ICM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ICM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
