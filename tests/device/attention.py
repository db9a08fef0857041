"""Attention on the stand-in: one operator forward and one backward, as the fused kernels of a card are.

PyTorch chooses these kernels in C++, which knows none for the stand-in. Imports torch, so only after the hooks are
loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tests.device.counts import count_operator
from tests.device.operators import refuse_strays
from tests.device.tensors import OnCard

_on_cpu = functional.scaled_dot_product_attention


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """Do what `scaled_dot_product_attention` does, also for tensors on the card."""
    given = [x for x in (query, key, value, attn_mask) if x is not None]
    if not any(isinstance(x, OnCard) for x in given):
        return _on_cpu(query, key, value, attn_mask, **options)
    refuse_strays("attention", [x for x in given if not isinstance(x, OnCard)], OnCard.card)
    kind = OnCard.card.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    return _Fused.apply(query, key, value, attn_mask, options)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: OnCard, key: OnCard, value: OnCard, mask: OnCard | None, options: dict[str, Any]
    ) -> torch.Tensor:
        count_operator("attention")
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options
        return OnCard(_on_cpu(query.held, key.held, value.held, None if mask is None else mask.held, **options))

    @staticmethod
    def backward(ctx: Any, gradient: OnCard) -> Any:
        count_operator("attention backward")
        *given, mask = ctx.saved_tensors
        held = [x.held.detach().requires_grad_() for x in given]
        with torch.enable_grad():
            out = _on_cpu(*held, None if mask is None else mask.held, **ctx.options)
        gradients = torch.autograd.grad(out, held, gradient.held)
        return *(OnCard(x) for x in gradients), None, None
