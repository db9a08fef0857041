"""What every test gets: a home of its own, no network, no colour, one thread; and small stores that tests share."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from tests.rewriting import rewriting

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


@pytest.fixture(scope="session")
def mixed_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny base model, the mixed fleet, and its store with vectors; made once, not to be changed."""
    from tests.cli.tiny_fleet import build_ingested  # needs torch, as most tests of the registry do not

    folder = tmp_path_factory.mktemp("mixed")
    build_ingested(folder, vectors=True)
    return folder


@pytest.fixture(scope="session")
def trained_template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store after `icm train`; made once, not to be changed."""
    from tests.cli.tiny_fleet import train_store

    store = tmp_path_factory.mktemp("trained") / "store"
    shutil.copytree(mixed_template / "store", store)
    train_store(store)
    return store


@pytest.fixture(scope="session")
def started_template(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained store with a few-shot start for its generator; made once, not to be changed."""
    from tests.cli.tiny_fleet import EPISODES, icm_quietly

    store = tmp_path_factory.mktemp("started") / "store"
    shutil.copytree(trained_template, store)
    icm_quietly(store, "train", "--objective", "functional", "--episodes", EPISODES, "--device", "cpu")
    return store


@pytest.fixture
def mixed(mixed_template: Path, tmp_path: Path) -> Path:
    """The store of the mixed fleet with its vectors, at the default place."""
    return Path(shutil.copytree(mixed_template / "store", tmp_path / "store"))


@pytest.fixture
def trained(trained_template: Path, tmp_path: Path) -> Path:
    """The same store with a generator and codes."""
    return Path(shutil.copytree(trained_template, tmp_path / "store"))


@pytest.fixture
def own_loras(trained: Path, mixed_template: Path, tmp_path: Path) -> Path:
    """Folders of the mixed fleet that a test may change; the trained store says that it ingested them from there."""
    folder = Path(shutil.copytree(mixed_template / "loras", tmp_path / "loras"))
    with rewriting(trained / "registry.db") as database:
        for column in ("tasks.folder", "adapters.source"):
            table, name = column.split(".")
            moved = (str(mixed_template / "loras"), str(folder))
            database.execute(f"UPDATE {table} SET {name} = replace({name}, ?, ?)", moved)
    return folder


@pytest.fixture
def started(started_template: Path, tmp_path: Path) -> Path:
    """The same store with a few-shot start."""
    return Path(shutil.copytree(started_template, tmp_path / "store"))
