"""Resolve settings: the flag wins, then `ICM_*`, then config.toml, then the default.

config.toml is read only from the user's configuration folder, never from the current folder. Otherwise a downloaded
folder could redirect the store.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from icm_cli.errors import ConfigProblem, UsageProblem

DEFAULT_LOCK_TIMEOUT = 30.0  # seconds

# Every environment variable that icm reads, for docs/reference/cli.md. A test compares the table with the code.
VARIABLES = {
    "ICM_STORE": "store: a folder or `postgresql://HOST/DATABASE`",
    "ICM_DEVICE": "compute device: auto, cpu, cuda, cuda:N or mps",
    "ICM_CONFIG": "configuration file; default `$XDG_CONFIG_HOME/icm/config.toml`",
    "ICM_LOCK_TIMEOUT": "seconds to wait for other icm processes",
    "ICM_NO_PROGRESS": "1: hide the progress display",
    "ICM_PROGRESS_INTERVAL": "seconds between progress lines if stderr is not a terminal; default 10",
    "ICM_DEBUG": "1: print tracebacks on stderr",
    "ICM_SERVE_TOKEN": "token that clients of `icm serve` must send",
    "ICM_ENGINE_TOKEN": "token that `icm serve` sends to the engine",
    "ICM_BUNDLE": "for vLLM (`icm serve --print-config vllm`): bundle with the tasks, instead of a store",
    "ICM_BASE_MODEL": "for vLLM: base model of the served tasks",
    "ICM_LOG": "log file for tracebacks of unexpected errors",
    "NO_COLOR": "any value: disable colour",
}

_KEYS = {"store": str, "device": str, "lock_timeout": (int, float)}

T = TypeVar("T")


@dataclass(frozen=True)
class Setting(Generic[T]):
    """A value and its source (`flag`, `ICM_STORE`, a file, `default`)."""

    value: T
    source: str


@dataclass(frozen=True)
class Settings:
    """All settings, resolved once per command."""

    named_store: Setting[object]  # as the user wrote it; None for the default
    device: Setting[str]
    lock_timeout: Setting[float]  # seconds to wait for other icm processes

    @property
    def store(self) -> Setting[str | Path]:
        """Address of the store, which may not exist. Commands that need no store never read this."""
        return Setting(_store_address(self.named_store), self.named_store.source)


def load_settings(*, store: str | Path | None = None, lock_timeout: float | None = None) -> Settings:
    """Resolve all settings. The arguments are the flags from the command line.

    Raises:
        ConfigProblem: The configuration file cannot be used.
        UsageProblem: The lock timeout is not a number of seconds.
    """
    config = _read_config()
    timeout = _pick(lock_timeout, "ICM_LOCK_TIMEOUT", config, "lock_timeout", DEFAULT_LOCK_TIMEOUT)
    chosen = _pick(None, "ICM_DEVICE", config, "device", "auto")
    return Settings(
        named_store=_pick(store, "ICM_STORE", config, "store", None),
        device=Setting(str(chosen.value), chosen.source),
        lock_timeout=Setting(_seconds(timeout), timeout.source),
    )


def config_file() -> Path:
    """Return the path of the configuration file, which may not exist."""
    named = os.environ.get("ICM_CONFIG")
    return Path(named) if named else _home("XDG_CONFIG_HOME", ".config", "ICM_CONFIG") / "icm" / "config.toml"


def log_file() -> Path:
    """Return the path of the log file for unexpected errors."""
    named = os.environ.get("ICM_LOG")
    return Path(named) if named else _home("XDG_STATE_HOME", ".local/state", "ICM_LOG") / "icm" / "errors.log"


def cache_folder() -> Path:
    """Return the folder for files that can be regenerated, such as dequantised base models."""
    return _home("XDG_CACHE_HOME", ".cache") / "icm"


def switched_on(variable: str) -> bool:
    """Return whether an environment variable is set to a value other than `0`."""
    return os.environ.get(variable, "") not in ("", "0")


def _home(variable: str, fallback: str, *others: str) -> Path:
    folder = os.environ.get(variable, "")
    if Path(folder).is_absolute():  # the XDG specification says to ignore a relative path
        return Path(folder)
    try:
        return Path.home() / fallback
    except RuntimeError as error:  # common in containers whose user is not in /etc/passwd
        hint = f"set {' or '.join(('HOME', variable, *others))}"
        raise ConfigProblem("this user has no home folder, and HOME is not set", hint=hint) from error


def _store_address(setting: Setting[object]) -> str | Path:
    if setting.value is None:
        return _home("XDG_DATA_HOME", ".local/share", "ICM_STORE") / "icm"
    try:
        return str(setting.value) if "://" in str(setting.value) else Path(str(setting.value)).expanduser()
    except RuntimeError as error:
        fact = f"the store {setting.value} ({setting.source}) refers to an unknown home folder"

        raise UsageProblem(fact, hint="use an absolute path") from error


def _read_config() -> Mapping[str, Setting[object]]:
    try:
        path = config_file()
    except ConfigProblem:
        return {}  # no home folder, so no configuration file
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigProblem(f"{path} cannot be read: {error}", hint="correct the file or move it away") from error
    for key, value in config.items():
        if key not in _KEYS:
            known = ", ".join(_KEYS)
            raise ConfigProblem(f"{path} has an unknown key {key!r}", hint=f"known keys: {known}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ConfigProblem(f"{path}: {key!r} has the wrong type", hint="see the example in `icm doctor --help`")
    return {key: Setting(value, str(path)) for key, value in config.items()}


def _pick(
    flag: object, variable: str, config: Mapping[str, Setting[object]], key: str, default: object
) -> Setting[object]:
    if flag is not None:
        return Setting(flag, "flag")
    if os.environ.get(variable):
        return Setting(os.environ[variable], variable)
    return config.get(key, Setting(default, "default"))


def _seconds(setting: Setting[object]) -> float:
    try:
        seconds = float(str(setting.value))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageProblem(f"the lock timeout {setting.value!r} ({setting.source}) is not a number of seconds")
    return seconds
