"""Where settings come from: flag, then `ICM_*`, then config.toml, then the default.

config.toml is read from the user's configuration folder alone, never from the current one: a downloaded tree must not
be able to redirect the store.
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

# Every variable that icm reads, for `docs/reference/cli.md`. A test compares it with the code.
VARIABLES = {
    "ICM_STORE": "folder of the store",
    "ICM_DEVICE": "device for training and extraction: auto, cpu, cuda, cuda:N, mps",
    "ICM_CONFIG": "configuration file to read instead of `$XDG_CONFIG_HOME/icm/config.toml`",
    "ICM_LOCK_TIMEOUT": "seconds to wait for another icm",
    "ICM_NO_PROGRESS": "1: no progress on stderr",
    "ICM_PROGRESS_INTERVAL": "seconds between progress lines where stderr is no terminal (10)",
    "ICM_DEBUG": "1: tracebacks on stderr",
    "ICM_LOG": "file for the tracebacks of unexpected errors",
    "NO_COLOR": "any value: no colour",
}

_KEYS = {"store": str, "device": str, "lock_timeout": (int, float)}

T = TypeVar("T")


@dataclass(frozen=True)
class Setting(Generic[T]):
    """A value and where it came from (`flag`, `ICM_STORE`, a file, `default`)."""

    value: T
    source: str


@dataclass(frozen=True)
class Settings:
    """Everything that is configured, resolved once per command.

    Attributes:
        store: The store folder; it need not exist.
        device: The device name, not yet resolved to hardware.
        lock_timeout: Seconds to wait for another icm.
        config_file: The configuration file that was read, or would be if it existed.
        log_file: Where unexpected errors leave their traceback.
    """

    store: Setting[Path]
    device: Setting[str]
    lock_timeout: Setting[float]
    config_file: Path
    log_file: Path


def load_settings(
    *, store: Path | None = None, device: str | None = None, lock_timeout: float | None = None
) -> Settings:
    """Resolve all settings; the arguments are the flags that were given.

    Raises:
        ConfigProblem: config.toml is not TOML, or a key of it is unknown or of the wrong type.
        UsageProblem: `ICM_LOCK_TIMEOUT` is not a number, or a timeout is negative.
    """
    config_file = _config_file()
    config = _read_config(config_file)
    timeout = _pick(lock_timeout, "ICM_LOCK_TIMEOUT", config, config_file, "lock_timeout", DEFAULT_LOCK_TIMEOUT)
    default_store = _home("XDG_DATA_HOME", ".local/share") / "icm"
    folder = _pick(store, "ICM_STORE", config, config_file, "store", default_store)
    chosen = _pick(device, "ICM_DEVICE", config, config_file, "device", "auto")
    return Settings(
        store=Setting(Path(str(folder.value)).expanduser(), folder.source),
        device=Setting(str(chosen.value), chosen.source),
        lock_timeout=Setting(_seconds(timeout), timeout.source),
        config_file=config_file,
        log_file=log_file(),
    )


def log_file() -> Path:
    """Return where unexpected errors leave their traceback."""
    named = os.environ.get("ICM_LOG")
    return Path(named) if named else _home("XDG_STATE_HOME", ".local/state") / "icm" / "errors.log"


def cache_folder() -> Path:
    """Return the folder of what can be made again, such as dequantised base models."""
    return _home("XDG_CACHE_HOME", ".cache") / "icm"


def switched_on(variable: str) -> bool:
    """Say whether an environment variable is set to something other than nothing or `0`."""
    return os.environ.get(variable, "") not in ("", "0")


def _config_file() -> Path:
    named = os.environ.get("ICM_CONFIG")
    return Path(named) if named else _home("XDG_CONFIG_HOME", ".config") / "icm" / "config.toml"


def _home(variable: str, fallback: str) -> Path:
    folder = os.environ.get(variable, "")
    # The XDG specification: a relative path is to be ignored.
    return Path(folder) if Path(folder).is_absolute() else Path("~").expanduser() / fallback


def _read_config(path: Path) -> Mapping[str, object]:
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigProblem(f"{path} cannot be read: {error}", hint="correct it or move it away") from error
    for key, value in config.items():
        if key not in _KEYS:
            known = ", ".join(_KEYS)
            raise ConfigProblem(f"{path} has an unknown key {key!r}", hint=f"the keys are: {known}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ConfigProblem(f"{path}: {key!r} has the wrong type", hint="`icm path --help` shows an example")
    return config


def _pick(
    flag: object, variable: str, config: Mapping[str, object], config_file: Path, key: str, default: object
) -> Setting[object]:
    if flag is not None:
        return Setting(flag, "flag")
    if os.environ.get(variable):
        return Setting(os.environ[variable], variable)
    if key in config:
        return Setting(config[key], str(config_file))
    return Setting(default, "default")


def _seconds(setting: Setting[object]) -> float:
    try:
        seconds = float(str(setting.value))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageProblem(f"the lock timeout {setting.value!r} ({setting.source}) is not a number of seconds")
    return seconds
