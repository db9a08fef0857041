"""One learned step: evidence about a module becomes a low-rank change of its weights with a given length.

    P = gradient / (root mean squares of outputs) / (root mean squares of inputs)     (out, in)
    dW = - length * P_r / |P_r|                P_r: the strongest r directions of P

The gradient alone points where inputs are large, not where tasks differ. Dividing by both root mean squares is
K-FAC with diagonal factors (Martens and Grosse, arXiv 1503.05671), to half its power as in Shampoo (arXiv 1802.09568).
The right length of a step differs by module and hardly by task, so lengths are learned (see `meta_training`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icmlora.adapter.model import LoraModule
from icmlora.errors import GeneratorError
from icmlora.fewshot.evidence import Evidence

RANK = 16  # directions kept of each step
_DAMPING = 0.05  # share of the mean that is added to every mean square: a few samples say little about quiet channels
_OVERSAMPLING = 8  # extra columns of the random sketch, for accuracy in its strongest directions
_ITERATIONS = 2  # passes over the matrix and back that sharpen the sketch
_SEED = 0


@torch.no_grad()
def unit_steps(evidence: Evidence, rank: int = RANK) -> tuple[LoraModule, ...]:
    """Return the downhill direction of each module with |dW| = 1, or zeros where there is no gradient."""
    # The same evidence gives the same directions: the random sketch of the singular vectors is seeded.
    draw = torch.Generator().manual_seed(_SEED)
    units = []
    for name, module in evidence.modules.items():
        scaled = module.gradient / _root(module.outputs)[:, None] / _root(module.inputs)  # (out, in)
        if not torch.isfinite(scaled).all():
            fact = f"the gradient of the loss on the samples is not finite ({name})"
            raise GeneratorError(fact, hint="leave out samples that are not ordinary text")
        u, s, v = strongest(scaled, min(rank + _OVERSAMPLING, *scaled.shape), draw)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
        # Balanced factors with |B A| = 1; the sign makes the step go downhill.
        root = (s / s.norm().clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
        units.append(LoraModule(name, (v * root).T.contiguous(), -(u * root)))
    return tuple(units)


def lengthened(units: Sequence[LoraModule], lengths: Sequence[float]) -> list[LoraModule]:
    """Scale each direction to its length."""
    return [LoraModule(unit.name, unit.a, length * unit.b) for unit, length in zip(units, lengths, strict=True)]


def strongest(
    matrix: torch.Tensor, count: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return approximate top singular vectors and values of a matrix (m, n): (m, count), (count,), (n, count).

    Does the same as `torch.svd_lowrank` (Halko et al., arXiv 0909.4061, algorithm 5.1), but draws the sketch on the
    CPU, so it is the same on every device. The matrix stays where it is; the result is on the CPU.
    """
    # An 8B model has 28 GB of such matrices: copying them off a card would take longer than everything else.
    tall = matrix if matrix.device.type in ("cpu", "cuda") else matrix.cpu()
    if is_wide := tall.shape[0] < tall.shape[1]:
        tall = tall.mT
    sketch = torch.randn(tall.shape[1], count, generator=draw).to(tall.device)
    basis = torch.linalg.qr(tall @ sketch).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(tall.mT @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    small, values, right = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    left, right = (basis @ small).cpu(), right.mT.cpu()
    return (right, values.cpu(), left) if is_wide else (left, values.cpu(), right)


def _root(mean_squares: torch.Tensor) -> torch.Tensor:
    damped = mean_squares + _DAMPING * mean_squares.mean()
    return damped.clamp_min(torch.finfo(damped.dtype).tiny).sqrt()
