"""Failures of an exchange between training processes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from icmlora.errors import OtherProcessFailed
from icmlora.training.ranks import Ranks


class BrokenStore:
    """A store that raises the same error at each exchange."""

    def __init__(self, error: RuntimeError) -> None:
        self.error = error

    def set(self, key: str, value: str) -> None:
        raise self.error


def test_a_broken_connection_is_another_process_that_failed() -> None:
    ranks = Ranks(0, 2, cast(Any, BrokenStore(RuntimeError("connection closed by peer"))))
    with pytest.raises(OtherProcessFailed, match="was killed or hangs"):
        ranks.share([b"network"])


def test_a_process_that_runs_out_of_memory_does_not_blame_another_one() -> None:
    ranks = Ranks(0, 2, cast(Any, BrokenStore(torch.OutOfMemoryError("CUDA out of memory"))))
    with pytest.raises(torch.OutOfMemoryError):
        ranks.share([b"network"])
