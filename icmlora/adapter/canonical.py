"""One representative per adapter: the balanced singular value decomposition of B @ A.

(A, B) and (M A, B M^-1) are the same adapter for every invertible M. Before adapters are compared, averaged or learned,
each is put in the form that depends on dW = B @ A alone:

    B = Qb Rb,   A^T = Qa Ra,   Rb Ra^T = U S V^T   (r x r),   A' = S^1/2 V^T Qa^T,   B' = Qb U S^1/2

Singular values descend along the rank slots; the largest entry of each row of A' is positive. dW is never formed.

Sums of adapters, on their factors: dW is added, ranks are added; dW itself (out x in) is never formed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused

# Below this share of the largest singular value a slot holds rounding noise of float64. The square root would lift
# the noise from 1e-16 to 1e-8 of the adapter, so it is set to zero.
_NOISE = 1e-13


def canonicalize(adapter: Adapter) -> Adapter:
    """Fix the gauge of every module; dW stays the same up to float32 rounding, ranks and names stay the same.

    Slots that the module does not use (a rank-deficient dW) become zero and come last.

    Args:
        adapter: Any adapter with finite values.

    Returns:
        The canonical adapter, float32 on the CPU.

    Raises:
        AdapterRefused: A factor that float32 cannot hold, from values near its limit.
    """
    groups: defaultdict[tuple[int, ...], list[LoraModule]] = defaultdict(list)
    for module in adapter.modules:
        groups[module.shape[1:]].append(module)
    done: dict[str, LoraModule] = {}
    for modules in groups.values():
        a, b = balance(torch.stack([module.a for module in modules]), torch.stack([module.b for module in modules]))
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            message = f"the factors of {modules[0].name} or a module like it exceed float32"
            raise AdapterRefused(message, kind="overflow")
        for module, new_a, new_b in zip(modules, a, b, strict=True):
            done[module.name] = LoraModule(module.name, new_a, new_b)
    return replace(adapter, modules=tuple(done[module.name] for module in adapter.modules))


def balance(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance a batch of factor pairs of one shape.

    Args:
        a: Shape (n, r, in).
        b: Shape (n, out, r).

    Returns:
        The canonical factors, same shapes, float32 on the CPU.
    """
    rank = a.shape[1]
    # float64: the sign and order of slots should not depend on rounding, and some devices have no float64.
    a64, b64 = a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)
    q_b, r_b = torch.linalg.qr(b64)  # (n, out, k), (n, k, r)
    q_a, r_a = torch.linalg.qr(a64.mT)  # (n, in, k), (n, k, r)
    u, s, v_t = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    s = torch.where(s > _NOISE * s[:, :1], s, 0.0)
    root = s.sqrt()
    new_a = root[:, :, None] * (v_t @ q_a.mT)  # (n, k, in)
    new_b = (q_b @ u) * root[:, None, :]  # (n, out, k)
    largest = new_a.gather(2, new_a.abs().argmax(dim=2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(torch.float64)  # (n, k, 1)
    new_a, new_b = new_a * sign, new_b * sign.mT
    # A rank above the module's width leaves slots that no singular value fills.
    unused = rank - s.shape[1]
    new_a = torch.nn.functional.pad(new_a, (0, 0, 0, unused))
    new_b = torch.nn.functional.pad(new_b, (0, unused))
    return new_a.to(torch.float32), new_b.to(torch.float32)


_WORKING_RANK = 256
"""Ranks that a running sum may reach before it is cut: exact for a few dozen tasks, bounded for thousands."""


def plus(left: Adapter, right: Iterable[LoraModule]) -> Adapter:
    """Add modules to an adapter; its head stays."""
    total = {module.name: module for module in left.modules}
    for module in right:
        known = total.get(module.name)
        if known is not None:
            a, b = torch.cat([known.a, module.a]), torch.cat([known.b, module.b], dim=1)
            module = LoraModule(module.name, a, b)
        total[module.name] = module
    return with_modules(left, total.values())


def times(modules: Iterable[LoraModule], factor: float) -> list[LoraModule]:
    """Multiply the dW of modules by a number."""
    return [LoraModule(module.name, module.a, factor * module.b) for module in modules]


def with_modules(adapter: Adapter, modules: Iterable[LoraModule]) -> Adapter:
    """Return an adapter of other modules."""
    chosen = tuple(modules)
    return replace(adapter, modules=chosen, target_modules=target_modules(module.name for module in chosen))


def truncated(adapter: Adapter, rank: int) -> Adapter:
    """Return the best adapter of a smaller rank, in the Frobenius norm of dW."""
    kept = [LoraModule(module.name, module.a[:rank], module.b[:, :rank]) for module in canonicalize(adapter).modules]
    return replace(adapter, modules=tuple(kept))


def mean_adapter(adapters: Iterable[Adapter], rank: int) -> Adapter:
    """Return the mean dW over the modules that at least half of the adapters have.

    Args:
        adapters: Read once, one at a time; one that lacks a module counts as zero there.
        rank: Directions kept of each module.

    Raises:
        ValueError: There is no adapter.
    """
    total: Adapter | None = None
    owners: Counter[str] = Counter()
    count = 0
    for adapter in adapters:
        count += 1
        owners.update(module.name for module in adapter.modules)
        total = adapter if total is None else plus(total, adapter.modules)
        if max(shape.rank for shape in total.layout) > _WORKING_RANK:
            total = truncated(total, _WORKING_RANK // 2)
    if total is None:
        raise ValueError("no adapters have no mean")
    most = [module for module in total.modules if 2 * owners[module.name] >= count]
    return truncated(with_modules(total, times(most or total.modules, 1 / count)), rank)


def among(modules: Iterable[LoraModule], adapter: Adapter) -> list[LoraModule]:
    """Return those of some modules that an adapter has too."""
    own = {module.name for module in adapter.modules}
    return [module for module in modules if module.name in own]
