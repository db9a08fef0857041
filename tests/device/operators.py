"""How a card treats each operator: which only look at memory, which make the host wait, and what each refuses.

Taken from PyTorch's CUDA sources. Imports torch, so only after the hooks are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

aten = torch.ops.aten
_INDEXING = frozenset(
    (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
)
_ALLOCATING = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_", "resize_")
)
_RESULT_SIZED = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_ALWAYS_WAITING = frozenset(
    ("multinomial", "histc", "_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_lstsq", "_linalg_check_errors")
)


@dataclass(frozen=True, slots=True)
class Traits:
    """What the stand-in asks of an operator each time, found out once.

    Attributes:
        name: What it is counted as.
        is_composite: It is nothing but other operators.
        only_looks: It launches no kernel: it makes a view or allocates.
        indexes: It copies indices from the host to the card by itself.
        draws: It draws random numbers.
        waits: Whether the host waits for its result, given its arguments.
    """

    name: str
    is_composite: bool
    only_looks: bool
    indexes: bool
    draws: bool
    waits: Callable[[Sequence[Any], dict[str, Any]], bool]


@cache
def traits_of(func: OpOverload) -> Traits:
    """Return what there is to know of an operator."""
    plain = func.overloadpacket.__name__
    always = plain in _ALWAYS_WAITING or any(tag in func.tags for tag in _RESULT_SIZED)
    return Traits(
        name=str(func),
        is_composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        only_looks=func.is_view or plain in _ALLOCATING,
        indexes=func in _INDEXING,
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        waits=_RULES.get(func, lambda args, kwargs: always),
    )


def refuse_mixture(func: OpOverload, args: Sequence[Any], strays: Sequence[torch.Tensor], card: torch.device) -> None:
    """Refuse tensors on the CPU (`strays`) in an operator on the card, but for what a card takes from there.

    It takes numbers (tensors without dimensions) where it computes element by element, and indices.
    """
    if func in _INDEXING:
        indexed, _, *values = args
        if indexed.device != card:
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({CPU})")
        strays = [x for x in values[:1] if x.device != card and x.dim() > 0]
    elif _computes_element_by_element(func):
        written = {id(arg) for arg, spec in zip(args, func._schema.arguments, strict=False) if _is_written(spec)}
        strays = [x for x in strays if x.dim() > 0 or id(x) in written]
    refuse_strays(str(func), strays, card)


def refuse_strays(name: str, strays: Sequence[torch.Tensor], card: torch.device) -> None:
    """Refuse any tensors on the CPU in an operator on the card."""
    if strays:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {card} and {CPU}! "
            f"(when calling {name})"
        )


def refuse_generator(func: OpOverload, generator: torch.Generator | None, card: torch.device) -> None:
    """Refuse to draw numbers on the card with a generator that is not the card's."""
    if generator is not None and generator.device.type != card.type:
        raise RuntimeError(
            f"Expected a {card.type!r} device type for generator but found {generator.device.type!r} "
            f"(when calling {func})"
        )


CPU = torch.device("cpu")


def _computes_element_by_element(func: OpOverload) -> bool:
    return torch.Tag.pointwise in func.tags or func.overloadpacket.__name__.startswith(("_foreach_", "_fused_"))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _has_mask(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _index_waits(args: Sequence[Any], _: dict[str, Any]) -> bool:
    return _has_mask(args[1])


def _index_put_waits(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    accumulates = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    fills = args[2].numel() == 1 and args[2].device == CPU and not accumulates  # then it is a masked_fill
    return _has_mask(args[1]) and not fills


def _repeat_waits(_: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("output_size") is None


def _isin_waits(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    elements, tested = args[:2]
    sorts = tested.numel() >= int(10 * elements.numel() ** 0.145)
    return sorts and not kwargs.get("assume_unique", False)  # it removes repetitions first


_RULES: dict[OpOverload, Callable[[Sequence[Any], dict[str, Any]], bool]] = {
    aten.index.Tensor: _index_waits,
    aten.index_put.default: _index_put_waits,
    aten.index_put_.default: _index_put_waits,
    aten._index_put_impl_.default: _index_put_waits,
    aten.repeat_interleave.Tensor: _repeat_waits,
    aten.isin.Tensor_Tensor: _isin_waits,
}
