"""Settings: flag over environment over config.toml over default."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.config import VARIABLES, cache_folder, config_file, load_settings, log_file
from icm_cli.errors import ConfigProblem, UsageProblem
from tests.cli.homeless import leave_home


def write_config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config" / "icm" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file


def test_the_flag_wins_over_everything(tmp_path: Path) -> None:
    write_config(tmp_path, 'store = "/from/config"')
    assert load_settings(store=Path("/from/flag")).store.source == "flag"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    write_config(tmp_path, 'store = "/from/config"')
    assert load_settings().store.source == "ICM_STORE"


def test_the_file_wins_over_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICM_STORE")
    file = write_config(tmp_path, 'store = "/from/config"\nlock_timeout = 5\ndevice = "cpu"')
    settings = load_settings()
    assert (settings.store.value, settings.store.source) == (Path("/from/config"), str(file))
    assert (settings.lock_timeout.value, settings.device.value) == (5.0, "cpu")


def test_the_default_store_is_data_not_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICM_STORE")
    assert load_settings().store.value == tmp_path / "data" / "icm"


def test_a_relative_data_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICM_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    assert load_settings().store.value == tmp_path / "home" / ".local" / "share" / "icm"


def test_no_configuration_is_read_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ICM_STORE")
    (tmp_path / "config.toml").write_text('store = "/evil"')
    assert load_settings().store.source == "default"


def test_icm_config_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text('device = "cuda:1"')
    monkeypatch.setenv("ICM_CONFIG", str(tmp_path / "mine.toml"))
    assert load_settings().device.value == "cuda:1"


@pytest.mark.parametrize(
    ("text", "fact"),
    [("stor = 1", "unknown key"), ("store = 1", "wrong type"), ("lock_timeout = true", "wrong type"), ("=", "read")],
)
def test_a_config_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, fact: str) -> None:
    file = write_config(tmp_path, text)
    with pytest.raises(ConfigProblem, match=fact) as caught:
        load_settings()
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_lock_timeout_is_a_number_of_seconds(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_LOCK_TIMEOUT", value)
    with pytest.raises(UsageProblem, match="not a number of seconds"):
        load_settings()


def test_without_a_home_a_named_store_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(monkeypatch)
    settings = load_settings(store=tmp_path)
    assert (settings.store.value, settings.device.value, settings.lock_timeout.value) == (tmp_path, "auto", 30.0)


def test_without_a_home_icm_config_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_home(monkeypatch)
    (tmp_path / "mine.toml").write_text('store = "/from/config"')
    monkeypatch.setenv("ICM_CONFIG", str(tmp_path / "mine.toml"))
    monkeypatch.delenv("ICM_STORE")
    assert load_settings().store.value == Path("/from/config")


@pytest.mark.parametrize(
    ("find", "variables"),
    [
        (lambda: load_settings().store, "HOME or XDG_DATA_HOME or ICM_STORE"),
        (config_file, "HOME or XDG_CONFIG_HOME or ICM_CONFIG"),
        (log_file, "HOME or XDG_STATE_HOME or ICM_LOG"),
        (cache_folder, "HOME or XDG_CACHE_HOME"),
    ],
)
def test_without_a_home_the_error_names_the_variables_to_set(
    monkeypatch: pytest.MonkeyPatch, find: Callable[[], object], variables: str
) -> None:
    leave_home(monkeypatch)
    monkeypatch.delenv("ICM_STORE")
    with pytest.raises(ConfigProblem, match="no home folder") as caught:
        find()
    assert caught.value.hint == f"set {variables}"


def test_a_store_in_an_unknown_home_is_wrong_usage() -> None:
    with pytest.raises(UsageProblem, match="unknown home folder"):
        _ = load_settings(store=Path("~no-such-user/store")).store


def test_every_variable_that_the_command_line_reads_is_listed() -> None:
    root = Path(__file__).parents[2] / "icm_cli"
    used = {name for file in root.rglob("*.py") for name in re.findall(r'"(ICM_[A-Z_]+)"', file.read_text())}
    assert used == {name for name in VARIABLES if name.startswith("ICM_")}
