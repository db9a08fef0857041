"""Where training reads its adapters from: a store, or memory in tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from icmlora.adapter.model import Adapter
from icmlora.generator.initial_a.draw import InitialA


class AdapterSource(Protocol):
    """The tasks of a fleet, numbered from 0. Adapters are read one at a time, so memory does not grow with tasks."""

    def tasks(self) -> int:
        """Return the number of tasks."""

    def checkpoints(self, task: int) -> int:
        """Return how many adapters a task has in addition to its final one."""

    def load(self, task: int, checkpoint: int | None) -> Adapter:
        """Read the final adapter of a task (None), or one of its checkpoints."""

    def initial(self, task: int) -> InitialA | None:
        """Return where a task's initial A was drawn, None if that is unknown."""

    def support_sets(self, task: int) -> int:
        """Return the number of a task's support sets that have vectors; may be 0."""

    def vectors(self, task: int, support_set: int) -> Mapping[str, torch.Tensor]:
        """Return the vectors of one support set by view, each float32 of shape (hidden,)."""
