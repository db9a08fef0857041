"""One row of docs/compatibility.md: an adapter as a library writes it, and what icm makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Outcome = Literal["exact", "extras", "original", "refused"]
Build = Callable[[Path], "torch.Tensor | None"]


@dataclass(frozen=True)
class Case:
    """An adapter, and its outcome."""

    name: str
    """Names the case, the adapter's folder and the task."""
    group: str
    """The heading of the page under which it is listed."""
    build: Build
    """Writes the adapter into a folder; returns what its model computes, if PEFT can load it."""
    outcome: Outcome
    remark: str = ""
    base: str | None = None
    """The base model, by its name in `bases`, for cases that PEFT can load."""
