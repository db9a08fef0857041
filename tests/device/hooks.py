"""Compile and load `hooks.cpp`, which tells PyTorch that there is a device; before torch is imported.

The library is kept in the user's cache, under a name made of its source, the compiler's flags and the version of torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.device.counts import count_sync

_SOURCE = Path(__file__).with_name("hooks.cpp")


_HOST_WAITS = ctypes.CFUNCTYPE(None)(lambda: count_sync("event or stream"))


class NoStandIn(Exception):
    """Say why there can be no stand-in here: no compiler, or a torch that it does not know."""


def load_hooks(kind: str) -> ctypes.CDLL:
    """Load the hooks for a device of `kind`, "cuda" or "mps", and compile them if that was not done before.

    Returns:
        The library. Call its `register_guard` once torch is imported, which may bring a guard of its own.

    Raises:
        NoStandIn: torch is imported already, or not installed; or the hooks cannot be compiled.
    """
    if "torch" in sys.modules:
        raise NoStandIn("torch was imported before the stand-in")
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise NoStandIn("torch is not installed")
    torch = Path(found.origin).parent
    library = _compiled(kind, torch)
    try:
        for name in (torch / "lib" / "libc10.so", torch / "lib" / "libtorch_cpu.so"):
            ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
        hooks = ctypes.CDLL(str(library))
    except OSError as error:
        raise NoStandIn(f"the compiled hooks cannot be loaded: {error}") from error
    hooks.call_when_the_host_waits(_HOST_WAITS)
    return hooks


def _compiled(kind: str, torch: Path) -> Path:
    flags = ["-shared", "-fPIC", "-O1", "-std=c++20", f"-DCARD={kind.upper()}", f"-I{torch / 'include'}"]
    parts = (_SOURCE.read_bytes(), " ".join(flags).encode(), (torch / "version.py").read_bytes())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "icm-stand-in"
    library = cache / f"{kind}-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")  # processes that start together do not meet in one file
        _compile([*flags, str(_SOURCE), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(made)])
        made.rename(library)
    return library


def _compile(arguments: list[str]) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoStandIn("there is no g++ to compile its hooks with (apt-get install g++)")
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise NoStandIn(f"its hooks do not compile against the installed torch: {first}")
