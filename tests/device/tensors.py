"""Tensors on the stand-in: they say that they are on the card, live in the CPU's memory, and are computed there.

Every operator of PyTorch, forward and backward, comes to `run`, below autograd and autocast. It counts, refuses what a
card refuses, and lets the CPU compute. Imports torch, so only after the hooks are loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from tests.device.counts import count_copy, count_operator, count_sync, count_view
from tests.device.operators import (
    CPU,
    INDEXING,
    aten,
    is_composite,
    only_looks,
    refuse_generator,
    refuse_mixture,
    waits,
)


class OnCard(torch.Tensor):
    """A tensor on the card; `held` is the one that is computed with."""

    card = torch.device("cuda", 0)
    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> OnCard:
        if cls.card.type == "mps" and real.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                f"Cannot convert a MPS Tensor to {str(real.dtype)[6:]} dtype as the MPS framework doesn't support "
                "float64. Please use float32 instead."
            )
        # In inference mode, a view of a tensor that was made outside of it is none of that mode's own.
        with torch.inference_mode(real.is_inference()):
            made: OnCard = torch.Tensor._make_wrapper_subclass(
                cls,
                real.size(),
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                layout=real.layout,
                device=cls.card,
            )
        made.held = real
        return made

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copy = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = (
                torch.nn.Parameter(copy, self.requires_grad)
                if is_parameter
                else copy.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"a tensor on {self.device} cannot be pickled for another process; move it with .cpu()")

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Any:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **options)


class Operators(TorchDispatchMode):
    """Bring operators here that have no tensor on the card among their arguments: they may make one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to tell the compiler so costs more than most operators

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out one operator."""
    if is_composite(func):  # so they come in inference mode only
        with Operators():
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    tensors = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, torch.Tensor)]
    cards = [x for x in tensors if isinstance(x, OnCard)]
    device = kwargs.get("device")
    if not cards and (device is None or not is_card(device)):
        return _on_cpu(func, args, kwargs)
    if func is aten._to_copy.default:
        return _to_copy(args[0], **kwargs)
    if func is aten.copy_.default:
        return _copy_into(*args, **kwargs)
    if func is aten._local_scalar_dense.default:
        count_sync("item")
        return func(args[0].held)
    strays = [x for x in tensors if x.device == CPU]
    if strays and cards:
        refuse_mixture(func, args, strays, OnCard.card)
    if func in INDEXING:
        args = (args[0], [_brought(x) for x in args[1]], *args[2:])
    _count(func, args, kwargs)
    return _compute(func, args, kwargs, cards)


def _on_cpu(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    return pinned(func(*args, **kwargs | {"pin_memory": False}))


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor of the CPU as lying in memory that the card can read by itself."""
    tensor.is_in_pinned_memory = True
    return tensor


def is_card(device: Any) -> bool:
    """Say whether a device, or the name of one, is the card."""
    return device is not None and torch.device(device).type == OnCard.card.type


def _count(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if only_looks(func):
        count_view()
        return
    count_operator(str(func))
    if waits(func, args, kwargs):
        count_sync(str(func))


def _compute(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], cards: list[OnCard]) -> Any:
    to_cpu = kwargs.get("device") is not None and not is_card(kwargs["device"])
    real = {name: _real(value) for name, value in kwargs.items()}
    if real.get("device") is not None:
        real["device"] = CPU
    if real.get("pin_memory"):
        real["pin_memory"] = False
    if torch.Tag.nondeterministic_seeded in func.tags:
        generator = kwargs.get("generator")
        refuse_generator(func, generator, OnCard.card)
        if generator is not None:
            real["generator"] = None
        with _drawing_with(generator or default_generator()):
            out = func(*map(_real, args), **real)
    else:
        out = func(*map(_real, args), **real)
    return out if to_cpu else _placed(out, {id(card.held): card for card in cards})


def _to_copy(tensor: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    target, non_blocking = kwargs.pop("device", None), kwargs.pop("non_blocking", False)
    kwargs.pop("pin_memory", None)
    to_card = isinstance(tensor, OnCard) if target is None else is_card(target)
    copy = aten._to_copy.default(_real(tensor), **kwargs)
    made = OnCard(copy) if to_card else copy
    if to_card == isinstance(tensor, OnCard):
        count_operator("aten._to_copy.default")
    else:  # from the card, torch makes room in pinned memory if it need not wait
        count_copy(to_card=to_card, size=copy.nbytes, waits=not non_blocking)
    return made


def _brought(index: torch.Tensor | None) -> torch.Tensor | None:
    is_there = index is None or isinstance(index, OnCard)
    return index if is_there else _to_copy(index, device=OnCard.card)


def _copy_into(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    to_card, from_card = isinstance(target, OnCard), isinstance(source, OnCard)
    if to_card == from_card:
        count_operator("aten.copy_.default")
    else:
        free = non_blocking and (to_card or getattr(target, "is_in_pinned_memory", False))
        count_copy(to_card=to_card, size=target.nbytes, waits=not free)
    aten.copy_.default(_real(target), _real(source))
    return target


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _real(value: Any) -> Any:
    if isinstance(value, OnCard):
        return value.held
    if isinstance(value, (list, tuple)):
        return [_real(item) for item in value]
    return value


def _placed(out: Any, known: dict[int, OnCard]) -> Any:
    """Put results on the card; an operator that writes into its argument returns that argument."""
    if isinstance(out, torch.Tensor):
        same = known.get(id(out))
        if same is not None and same.shape != out.shape:
            raise NotImplementedError("the stand-in cannot change the shape of a tensor in place")
        return OnCard(out) if same is None else same
    if isinstance(out, (list, tuple)):
        return type(out)([_placed(item, known) for item in out])
    return out


_lock = threading.Lock()
_default: dict[str, torch.Generator] = {}


def default_generator() -> torch.Generator:
    """Return the generator that draws on the card where none is named."""
    if OnCard.card.type not in _default:
        _default[OnCard.card.type] = torch.Generator(OnCard.card)
    return _default[OnCard.card.type]


@contextmanager
def _drawing_with(generator: torch.Generator) -> Iterator[None]:
    """Let the CPU's own generator go on where the card's is, for one operator."""
    with _lock:
        mine = torch.default_generator.get_state()
        torch.default_generator.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(mine)
