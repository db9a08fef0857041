"""An adapter in memory: one pair of factors per module, in float32, with the scale folded in.

W + dW,   dW = B @ A:   x (in) --A (r, in)--> (r) --B (out, r)--> (out)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from icmlora.adapter.layout import ModuleShape
from registry.names import natural_key


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The two factors of one module; the scale is part of `b`.

    Attributes:
        name: The module's name in the base model, without PEFT's prefix.
        a: Float32 of shape (r, in).
        b: Float32 of shape (out, r).
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor

    @property
    def shape(self) -> ModuleShape:
        """The module's name, rank and widths."""
        return ModuleShape(self.name, self.a.shape[0], self.a.shape[1], self.b.shape[0])

    def cut(self, rank: int) -> LoraModule:
        """Return the module with its first `rank` slots."""
        return LoraModule(self.name, self.a[:rank], self.b[:, :rank])


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: its base model, task type, and modules in natural order (layer 2 before layer 10).

    Attributes:
        base_model: The base model's label, opaque text.
        task_type: PEFT's task type ("CAUSAL_LM"), or None.
        target_modules: Literal names for the configuration, as `icmlora.adapter.layout.target_modules` derives them.
        modules: The adapted modules; sorted on construction.
        revision: The base model's revision, or None.
    """

    base_model: str
    task_type: str | None
    target_modules: tuple[str, ...]
    modules: tuple[LoraModule, ...]
    revision: str | None = None

    def __post_init__(self) -> None:
        """Order the modules.

        Raises:
            ValueError: There are no modules, or two of one name.
        """
        names = {module.name for module in self.modules}
        if not names or len(names) != len(self.modules):
            raise ValueError("an adapter needs at least one module, each with a unique name")
        object.__setattr__(self, "modules", tuple(sorted(self.modules, key=lambda module: natural_key(module.name))))

    @property
    def layout(self) -> tuple[ModuleShape, ...]:
        """Names, ranks and widths of the modules."""
        return tuple(module.shape for module in self.modules)

    def to(self, device: torch.device) -> Adapter:
        """Return the same adapter with its factors on a device."""
        modules = tuple(LoraModule(module.name, module.a.to(device), module.b.to(device)) for module in self.modules)
        return replace(self, modules=modules)


def is_finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite."""
    # aminmax returns NaN if any value is NaN. This takes a tenth of the time of torch.isfinite.
    return not values.numel() or all(math.isfinite(value) for value in torch.aminmax(values))
