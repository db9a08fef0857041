"""What changes in torch so that it takes the stand-in for a card. Imports torch, so only after the hooks are loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim.optimizer import _foreach_supported_types as optimizer_types
from torch.utils._device import _device_constructors
from torch.utils._foreach_utils import _foreach_supported_types as other_types

from tests.device.attention import attention
from tests.device.counts import count_sync
from tests.device.tensors import OnCard, Operators, default_generator, is_card, pinned

NAME = "stand-in for a card"
_MEMORY = 80 << 30


def change_torch(kind: str) -> None:
    """Make torch believe that there is one card of `kind`, "cuda" or "mps"."""
    OnCard.card = torch.device(kind, 0)
    (_change_cuda if kind == "cuda" else _change_mps)()
    _change_constructors()
    _change_tensors()
    _change_optimisers()
    torch.nn.functional.scaled_dot_product_attention = attention
    # Parameters keep their identity when a module moves, as they do on a card. `.data` of another type cannot be set.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _enter_everywhere()


def try_it(kind: str) -> None:
    """Compute a little, with gradients and autocast, so that a torch with other internals is found out at once."""
    weight = torch.nn.Parameter(torch.ones(3, 3)).to(kind)
    weight.retain_grad()
    with torch.autocast(kind, dtype=torch.bfloat16):
        out = torch.tensor([[1.0, 2.0, 3.0]], device=kind) @ weight
    out.float().square().sum().backward()
    right = torch.full((3, 3), 12.0) * torch.tensor([1.0, 2.0, 3.0])[:, None]
    drawn = torch.randn(2, generator=torch.Generator(kind).manual_seed(1), device=kind)
    if out.device != OnCard.card or drawn.device != OnCard.card or not torch.equal(weight.grad.cpu(), right):
        raise RuntimeError("a product and its gradient came out wrong")


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _change_cuda() -> None:
    properties = SimpleNamespace(name=NAME, total_memory=_MEMORY, major=9, minor=0, multi_processor_count=132)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "is_bf16_supported": True,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "mem_get_info": (_MEMORY, _MEMORY),
        "is_current_stream_capturing": False,
        "_lazy_init": None,
        "empty_cache": None,
        "set_device": None,
        "reset_peak_memory_stats": None,
    }
    for name, value in answers.items():
        getattr(torch.cuda, name)  # what is gone from torch is no longer asked for
        setattr(torch.cuda, name, _answer(value))
    torch._C._cuda_getCurrentRawStream = _answer(0)  # bitsandbytes looks for it when it is imported
    torch.cuda._initialized = True
    torch.cuda.default_generators = (default_generator(),)
    torch.cuda._lazy_call = lambda call, **_: call()
    torch.cuda.random._lazy_call = torch.cuda._lazy_call
    torch.cuda.random._lazy_init = torch.cuda._lazy_init
    torch.cuda.random.current_device = torch.cuda.current_device
    torch.cuda.random.device_count = torch.cuda.device_count
    torch.cuda.synchronize = _synchronize
    torch.backends.cuda.is_built = _answer(True)


def _change_mps() -> None:
    torch._C._has_mps = True
    torch._C._mps_is_available = _answer(True)
    torch.backends.mps.is_available = _answer(True)
    torch.backends.mps.is_built = _answer(True)
    torch.mps._default_mps_generator = default_generator()
    torch.mps.synchronize = _synchronize
    torch.mps.empty_cache = _answer(None)


def _synchronize(*_: Any) -> None:
    count_sync("synchronize")


def _change_constructors() -> None:
    """`torch.tensor` and its like make a tensor on the CPU and copy it, as they do for a card."""

    def through_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
            if args and isinstance(args[0], OnCard):
                return args[0].to(device=device, dtype=options.get("dtype"))
            if not is_card(device):
                return make(*args, device=device, **options)
            return make(*args, device="cpu", **options).to(OnCard.card)

        return made

    _device_constructors()  # it remembers the present ones, for `with torch.device(...)`
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, through_cpu(getattr(torch, name)))


def _change_tensors() -> None:
    def cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        return self.to(OnCard.card, non_blocking=non_blocking)

    def pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
        return pinned(self.clone())

    def is_pinned(self: torch.Tensor, *_: Any) -> bool:
        return getattr(self, "is_in_pinned_memory", False)

    changes = {"pin_memory": pin_memory, "is_pinned": is_pinned}
    for name, change in (changes | {"cuda": cuda} if OnCard.card.type == "cuda" else changes).items():
        setattr(torch.Tensor, name, change)


def _change_optimisers() -> None:
    """Fused and `foreach` optimisers are chosen by type, and a parameter on the stand-in has another."""
    optimizer_types.append(OnCard)
    other_types.append(OnCard)


def _enter_everywhere() -> None:
    """Bring operators to the stand-in in this thread and in those that start later."""
    Operators().__enter__()
    start = threading.Thread.start

    def start_on_card(self: threading.Thread) -> None:
        run = self.run

        def run_on_card() -> None:
            with Operators():
                run()

        self.run = run_on_card
        start(self)

    threading.Thread.start = start_on_card
