"""Which linear modules a base model has, and whether an adapter fits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelMismatch

if TYPE_CHECKING:
    from torch import nn


def check_fits(base: BaseModel, layout: Sequence[tuple[str, int, int, int]]) -> None:
    """Check that every module of an adapter exists in the base model, with its sizes."""
    # layout: name, rank, input size and output size of each module.
    modules = dict(base.model.named_modules())
    hint = "name the right base model: icm base add NAME PATH"
    for name, _, inputs, outputs in layout:
        shape = linear_shape(modules.get(name))
        if shape is None:
            fact = "is not a linear layer" if name in modules else "does not exist"
            raise BaseModelMismatch(f"module {name!r} of the adapter {fact} in base model {base.label!r}", hint=hint)
        if shape != (outputs, inputs):
            raise BaseModelMismatch(
                f"module {name!r}: the adapter is for a weight of shape {(outputs, inputs)} (out, in), "
                f"base model {base.label!r} has {shape}",
                hint=hint,
            )


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer; quantised layers and GPT-2's Conv1D have the sizes in attributes."""
    # A quantised weight is packed, so its shape says nothing; GPT-2's Conv1D stores it transposed.
    for outputs, inputs in (("out_features", "in_features"), ("nf", "nx")):
        if module is not None and hasattr(module, outputs) and hasattr(module, inputs):
            return int(getattr(module, outputs)), int(getattr(module, inputs))
    return None
