"""What a fleet answers of which nothing is known but final adapters (see `icmlora.training.source.AdapterSource`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from icmlora.generator.initial_a.draw import InitialA


class AdaptersAlone:
    """A fleet without checkpoints, initial A and task vectors; tasks and adapters are added by subclasses."""

    def checkpoints(self, task: int) -> int:
        """Return that there are none."""
        return 0

    def initial(self, task: int) -> InitialA | None:
        """Return that it is not known."""
        return None

    def support_sets(self, task: int) -> int:
        """Return that there are none."""
        return 0

    def vectors(self, task: int, support_set: int) -> Mapping[str, torch.Tensor]:
        """Return no vectors."""
        return {}
