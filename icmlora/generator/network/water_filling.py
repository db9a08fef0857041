"""The quantiser step of a code with a given error: reverse water-filling (Cover and Thomas, 10.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.network.stack import INPUTS
from icmlora.generator.network.tokens import KindTokens, squared_norm
from icmlora.generator.scales import OCTAVE
from icmlora.generator.sensitivity import Sensitivity
from icmlora.io.threads import one_thread

_PARTS = 16  # groups of channels of about equal weight, as the step need not be exact


class WaterFilling:
    """The variances of an adapter's coefficients."""

    @one_thread()
    def __init__(self, tokens: Sequence[KindTokens], sensitivity: Sensitivity, subspace: InitialSubspace) -> None:
        # The variances of a side's coefficients, and how many coefficients have each of them.
        variances, numbers = ([torch.zeros(0, dtype=torch.float64)] for _ in range(2))
        for group in tokens:
            layers, number = torch.unique_consecutive(group.layer, return_inverse=True)
            for side, values in enumerate((group.inputs, group.outputs)):
                size = values.shape[1]
                profile = (OCTAVE * sensitivity.profile(group.kind, side)[layers]).to(torch.int16)
                # numpy sorts two bytes in linear time.
                ordered = torch.from_numpy(np.sort(profile.cpu().numpy(), axis=1, kind="stable")).to(group.norm)
                square = torch.exp2(2 / OCTAVE * ordered).double()  # (layers, size)
                parts = 1 if sensitivity.is_even else min(_PARTS, size)
                share = torch.stack([part.mean(dim=1) for part in square.tensor_split(parts, dim=1)], dim=1)
                counts = torch.tensor(  # channels in each group
                    [len(part) for part in torch.arange(size).tensor_split(parts)], device=square.device
                )
                share = share / (share * counts).sum(dim=1, keepdim=True)  # (layers, parts)
                energy = group.norm.double().square()
                if side == INPUTS:  # those along the subspace take next to no bits, so they lose next to nothing
                    energy = energy - subspace.project(group.kind, group.layer, values).double().square().sum(1)
                variance = energy.clamp_min(0)[:, None] * share[number]
                variances.append(variance.flatten())
                numbers.append(counts.double().expand_as(variance).flatten())
        self._variance, self._count = torch.cat(variances), torch.cat(numbers)
        self._energy = squared_norm(tokens)

    @one_thread()
    def step(self, tolerance: float) -> float:
        """Return the quantiser step whose expected squared error is `tolerance` (1 for an adapter of zeros).

        A coefficient of variance v contributes min(v, step^2 / 12): reverse water-filling (Cover and Thomas, 10.3.3).
        """
        if not len(self._variance):
            return 1.0
        low, high = -40.0, 40.0  # log2 of the step
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.error(2.0**middle) < tolerance else (low, middle)
        return float(2.0**low)

    def error(self, step: float) -> float:
        """Return the expected squared error of a quantiser step, as a share of the adapter's energy."""
        lost = float((torch.clamp(self._variance, max=step * step / 12) * self._count).sum())
        return lost / self._energy if lost else 0.0
