"""Per-channel statistics of a base model's modules: their inputs, and the loss gradients of their outputs.

    example --base model--> inputs x of each module --mean squares--> (in,)
       `--- labels drawn from its own predictions --loss--> gradients g of their outputs --mean squares--> (out,)

Labels are sampled, not read from the data, so that the mean of g g^T belongs to the Fisher information
(Kunstner et al., arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.conv_as_linear import input_rows, output_rows
from icmlora.base_models.running.modules import matrix_shape
from icmlora.errors import DataError

_TOKENS_PER_EXAMPLE = 192
_MIN_EXAMPLES = 8
_SEED = 0


def channel_statistics(
    base: BaseModel, examples: Sequence[Any], modules: Iterable[str], *, max_tokens: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the mean squares of inputs (in,) and output gradients (out,) by module, float32 on the CPU."""
    # Reads the first 192 tokens of each example until there are at least `max_tokens` predictions and 8 examples,
    # because an image may have thousands of predictions. Skips modules that the model lacks, or that are neither
    # linear layers nor plain convolutions.
    named = {name: module for name, module in base.model.named_modules() if matrix_shape(module) is not None}
    sums: dict[str, list[torch.Tensor]] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def add(number: int, rows: torch.Tensor) -> None:
            sums[name][number] = sums[name][number] + rows.float().square().sum(dim=0)

        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
            sums.setdefault(name, [torch.zeros(()), torch.zeros(())])
            add(0, input_rows(module, inputs[0].detach()))
            outputs.register_hook(lambda gradient: add(1, output_rows(module, gradient)))  # type: ignore[no-untyped-call]

        return hook

    draw = torch.Generator(device=base.device).manual_seed(_SEED)
    tokens = 0
    with ExitStack() as stack:
        for name in modules:
            if name in named:
                stack.enter_context(named[name].register_forward_hook(hook_of(name)))
        for number, example in enumerate(examples):
            if tokens >= max_tokens and number >= _MIN_EXAMPLES:
                break
            with suppress(DataError), torch.enable_grad():  # too short to score; only the hooks collect gradients
                items = base.modality.prepare(base, [example], _TOKENS_PER_EXAMPLE, whole=True)
                (logits,) = base.modality.logits(base, items, from_leaf=True)
                logits = logits.float()  # (predictions, classes)
                labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=draw)[:, 0]
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
                tokens += len(logits)
    return {name: (inputs.cpu() / tokens, outputs.cpu() / tokens) for name, (inputs, outputs) in sums.items()}
