"""Canonical form of an adapter: the balanced singular value decomposition of B @ A.

(A, B) and (M A, B M^-1) are the same adapter for every invertible M. Before adapters are compared, averaged or learned,
each is converted to a form that depends only on dW = B @ A:

    B = Qb Rb,   A^T = Qa Ra,   Rb Ra^T = U S V^T   (r x r),   A' = S^1/2 V^T Qa^T = S^-1/2 U^T Rb A
                                                               B' = Qb U S^1/2     = B Ra^T V S^-1/2

Singular values descend along the rank slots; the largest entry of each row of A' is positive. dW is never formed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter, LoraModule, is_finite
from icmlora.errors import AdapterRefused
from icmlora.io.threads import side_by_side

# Below this share of the largest singular value, a slot holds float64 rounding noise. The square root would raise the
# noise from 1e-16 to 1e-8 of the adapter, so it is set to zero.
_NOISE = 1e-13
_BYTES = 4 << 20  # float64 factors decomposed together: more would not stay in the processor's cache


def canonicalize(adapter: Adapter) -> Adapter:
    """Fix the gauge of every module; dW is unchanged up to rounding. Raise `AdapterRefused` if it exceeds float32."""
    # Unused slots (a rank-deficient dW) become zero and come last.
    groups: defaultdict[tuple[int, ...], list[LoraModule]] = defaultdict(list)
    for module in adapter.modules:
        groups[module.shape[1:]].append(module)
    parts = []
    for group in groups.values():
        count = together(group[0].shape)
        parts += [group[begin : begin + count] for begin in range(0, len(group), count)]
    done: dict[str, LoraModule] = {}
    with side_by_side() as each:
        for modules, (a, b) in zip(parts, each(_balanced, parts), strict=True):
            if not (is_finite(a) and is_finite(b)):
                message = f"the factors of {modules[0].name}, or of a module of the same shape, exceed float32"
                raise AdapterRefused(message, kind="overflow")
            for module, new_a, new_b in zip(modules, a, b, strict=True):
                done[module.name] = LoraModule(module.name, new_a, new_b)
    return replace(adapter, modules=tuple(done[module.name] for module in adapter.modules))


def _balanced(modules: list[LoraModule]) -> tuple[torch.Tensor, torch.Tensor]:
    _, a, b = singular_rows(*stacked_rows(modules), power=0.5)
    # A rank above the module's width leaves slots that no singular value fills.
    unused = (0, 0, 0, modules[0].shape.rank - a.shape[1])
    padded = [torch.nn.functional.pad(rows.to(torch.float32), unused) for rows in (a, b)]
    return padded[0], padded[1].mT


def together(shape: ModuleShape) -> int:
    """Return the batch size for decomposing modules of one shape."""
    return max(1, _BYTES // (8 * shape.parameters))


def stacked_rows(modules: Sequence[LoraModule]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B^T of modules of one shape in float64 on the CPU: (n, r, in) and (n, r, out)."""
    # float64: the sign and order of slots should not depend on rounding, and some devices have no float64.
    shape = modules[0].shape
    rows = [torch.empty(len(modules), shape.rank, size, dtype=torch.float64) for size in (shape.inputs, shape.outputs)]
    for number, module in enumerate(modules):
        rows[0][number] = module.a.detach()
        rows[1][number] = module.b.detach().T
    return rows[0], rows[1]


def singular_rows(
    rows_a: torch.Tensor, rows_b: torch.Tensor, power: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the singular values of dW of modules of one shape, and the vectors scaled by a power of them.

    Takes A (n, r, in) and B^T (n, r, out) in float64. Returns the values (n, k), descending, where k is r or a smaller
    width, and the vectors as rows (n, k, in) and (n, k, out). Slots of noise are zero.
    """
    r_a, r_b = (torch.linalg.qr(rows.mT, mode="r").R for rows in (rows_a, rows_b))  # (n, k, r); Q is never formed
    u, s, v_t = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    is_used = s > _NOISE * s[:, :1]
    factor = torch.where(is_used, s ** (power - 1), 0.0)[:, :, None]
    new_a = (factor * (u.mT @ r_b)) @ rows_a
    low, high = torch.aminmax(new_a, dim=2, keepdim=True)
    sign = torch.where(-low > high, -1.0, 1.0)  # (n, k, 1)
    return torch.where(is_used, s, 0.0), new_a.mul_(sign), (sign * factor * (v_t @ r_a)) @ rows_b
