"""The stand-in for a session of pytest: what `-p tests.device.as_cuda` and `-p tests.device.as_mps` begin with.

A session without one of them collects no test from here. Where there can be no stand-in, the tests say why and are
skipped, but if STAND_IN_REQUIRED is set, as it is in CI, the session fails.
"""

from __future__ import annotations

import os

import pytest

from tests.device.card import install
from tests.device.hooks import NoStandIn

_wanted: list[str] = []
_missing: list[str] = []


def begin(kind: str) -> None:
    """Install the stand-in for `kind`, "cuda" or "mps", for this session."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tests/conftest.py does, which comes after torch here
    _wanted.append(kind)
    try:
        install(kind)
    except NoStandIn as error:
        if os.environ.get("STAND_IN_REQUIRED"):
            raise pytest.UsageError(f"there is no stand-in for {kind}: {error}") from error
        _missing.append(str(error))


def wanted() -> str | None:
    """Return the kind of device that this session is for, or None for an ordinary session."""
    return _wanted[0] if _wanted else None


def why_missing() -> str | None:
    """Return why this session has no stand-in although it wants one, or None."""
    return _missing[0] if _missing else None
