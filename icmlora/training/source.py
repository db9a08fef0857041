"""What training needs to know of a fleet, wherever it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from icmlora.adapter.model import Adapter
from icmlora.generator.initial_a.draw import InitialA


class AdapterSource(Protocol):
    """A fleet that is read one adapter at a time; nothing here holds more than that in memory."""

    def tasks(self) -> int:
        """Return the number of tasks."""

    def checkpoints(self, task: int) -> int:
        """Return how many adapters task `task` has besides its final one."""

    def load(self, task: int, checkpoint: int | None) -> Adapter:
        """Read the final adapter of a task (None), or one of its checkpoints."""

    def initial(self, task: int) -> InitialA | None:
        """Return where the A that a task's training began with was drawn, None where it is not known."""

    def support_sets(self, task: int) -> int:
        """Return the number of support sets with vectors, 0 without any."""

    def vectors(self, task: int, support_set: int) -> Mapping[str, torch.Tensor]:
        """Return a task's vectors of one support set by view, each float32 of shape (hidden,)."""
