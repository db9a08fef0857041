"""What every test gets: a home of its own, no network, no colour, one thread; and small stores that tests share."""

import gc
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings

from tests.pg_server import pg_server
from tests.rewriting import moved
from tests.s3_server import CannotStart, S3Server, s3_server
from tests.shared import built_once, use_config_of

# Before anything imports torch: tiny tensors are slower on many threads, and parallel runs then share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# Promises that are shipped with the library are tests too.
pytest.register_assert_rewrite("registry.testing")

# Tests do not time things: an example is slow when the machine is busy, and that is no failure.
# How many examples is said here alone. `--hypothesis-profile=thorough` tries new ones on every run (in CI the same).
settings.register_profile("thorough", deadline=None, max_examples=30)
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=12)
settings.load_profile("quick")

_IN_MEMORY, _ROOM = Path("/dev/shm"), 4 << 30
_SLOWEST = 10


def pytest_configure(config: pytest.Config) -> None:
    """Keep temporary folders in memory where there is room: most tests make a store, and a store waits for its disk."""
    if _IN_MEMORY.is_dir() and os.access(_IN_MEMORY, os.W_OK) and shutil.disk_usage(_IN_MEMORY).free >= _ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_IN_MEMORY))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test` leaves to `make test-all`: the further cases of a test that says so; and properties."""
    seen = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        if item.get_closest_marker("one_case") and function in seen:
            item.add_marker("slow")
        seen.add(function)
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("property")


def pytest_collection_finish() -> None:
    """Keep what imports and collection made from the garbage collector, which takes a second to go through it."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the files that took longest, so that `make test` stays fast."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) > _SLOWEST:
        terminalreporter.section("where the time goes")
        terminalreporter.write_line(f"{sum(seconds.values()):6.0f} s in {len(seconds)} files, of which")
        for file, took in seconds.most_common(_SLOWEST):
            terminalreporter.write_line(f"{took:6.1f} s {file}")


@pytest.fixture(scope="session", autouse=True)
def shared_statements() -> None:
    """Compile the statements of a store once for all tests of a worker."""
    from tests.statements import share_statements  # imports SQLAlchemy

    share_statements()


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what fixtures of a session or a module do out of the user's own home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


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


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Fail a test that leaves torch with another number of threads, which would slow down all tests after it."""
    torch = sys.modules.get("torch")
    before = torch and torch.get_num_threads()
    yield
    assert before is None or torch.get_num_threads() == before


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch have two threads, as on a machine of two cores."""
    import torch  # as most tests of the registry do not

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mixed_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny base model, the mixed fleet, and its store with vectors; made once, not to be changed."""

    def build(folder: Path) -> None:
        from tests.cli.tiny_fleet import build_ingested  # needs torch, as most tests of the registry do not

        build_ingested(folder, vectors=True)

    return built_once(tmp_path_factory, "mixed", build)


@pytest.fixture(scope="session")
def trained_template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store after `icm train`; made once, not to be changed."""

    def build(store: Path) -> None:
        from tests.cli.tiny_fleet import train_store

        use_config_of(mixed_template)
        shutil.copytree(mixed_template / "store", store, dirs_exist_ok=True)
        train_store(store)

    return built_once(tmp_path_factory, "trained", build)


@pytest.fixture(scope="session")
def started_template(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained store with a few-shot start for its generator; made once, not to be changed."""

    def build(store: Path) -> None:
        from tests.cli.tiny_fleet import EPISODES, icm_quietly

        use_config_of(trained_template)
        shutil.copytree(trained_template, store, dirs_exist_ok=True)
        icm_quietly(store, "train", "--few-shot", "--episodes", EPISODES, "--device", "cpu")

    return built_once(tmp_path_factory, "started", build)


@pytest.fixture
def mixed(mixed_template: Path, tmp_path: Path) -> Path:
    """The store of the mixed fleet with its vectors, at the default place."""
    use_config_of(mixed_template)
    return Path(shutil.copytree(mixed_template / "store", tmp_path / "store"))


@pytest.fixture
def trained(trained_template: Path, tmp_path: Path) -> Path:
    """The same store with a generator and codes."""
    use_config_of(trained_template)
    return Path(shutil.copytree(trained_template, tmp_path / "store"))


@pytest.fixture
def own_loras(trained: Path, mixed_template: Path, tmp_path: Path) -> Path:
    """Folders of the mixed fleet that a test may change; the trained store says that it ingested them from there."""
    folder = Path(shutil.copytree(mixed_template / "loras", tmp_path / "loras"))
    moved(trained, mixed_template / "loras", folder)
    return folder


@pytest.fixture
def started(started_template: Path, tmp_path: Path) -> Path:
    """The same store with a few-shot start."""
    use_config_of(started_template)
    return Path(shutil.copytree(started_template, tmp_path / "store"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; what needs it says why it was skipped where there is none."""
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'icm-lora[team]'")
    try:
        with s3_server(tmp_path_factory.mktemp("s3")) as server:
            _make_bucket(server)
            yield server
    except CannotStart as error:
        pytest.skip(str(error))


@pytest.fixture
def s3_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test find the server."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)


def _make_bucket(server: S3Server) -> None:
    """Write the first object, which takes the server seconds."""
    from registry.storage.blobs.objects import connect

    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        connect("s3://icm/first", "tests").claim()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a real PostgreSQL; what needs it says why it was skipped where there is none."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'icm-lora[team]'")
    with folder_of_a_server() as folder, pg_server(folder) as url:
        yield url


@contextmanager
def folder_of_a_server() -> Iterator[Path]:
    """Yield a folder in memory, if there is room, for a server that runs as another user.

    It is not among those of pytest, each run of which closes the folder of all runs to others.
    """
    with TemporaryDirectory(prefix="icm-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as folder:
        yield Path(folder)
