"""A fleet of a few adapters for a two-layer model, in memory, and a generator trained on it in about a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.runs import Nonzeros
from icmlora.generator.config import GeneratorConfig, config_for
from icmlora.generator.files.entropy_coding import Integers
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.sensitivity import Sensitivity, even
from icmlora.training.config import TrainConfig
from icmlora.training.initialisation import fresh_network
from icmlora.training.loop import fit
from icmlora.training.state import TrainState, new_state

BASE = "tiny/llama"
HIDDEN = 24
WIDTHS = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, 12), "down_proj": (40, HIDDEN)}


def module_name(kind: str, layer: int) -> str:
    """Return the name of a module as a Llama calls it."""
    part = "mlp" if kind == "down_proj" else "self_attn"
    return f"model.layers.{layer}.{part}.{kind}"


def make_adapter(
    seed: int,
    rank: int = 2,
    kinds: Sequence[str] = ("q_proj", "v_proj"),
    layers: Sequence[int] = (0, 1),
    own: float = 0.5,
    strength: float = 0.1,
) -> Adapter:
    """Return an adapter that shares a part with all others and has a part of its own."""
    shared, random = torch.Generator().manual_seed(1234), torch.Generator().manual_seed(seed)
    modules = []
    for kind in WIDTHS:
        inputs, outputs = WIDTHS[kind]
        for layer in range(2):
            common = torch.randn(8, inputs, generator=shared), torch.randn(outputs, 8, generator=shared)
            mine = torch.randn(8, inputs, generator=random), torch.randn(outputs, 8, generator=random)
            if kind in kinds and layer in layers:
                decay = strength * 0.5 ** torch.arange(8.0)
                a = (decay[:, None] * (common[0] + own * mine[0]))[:rank]
                b = (common[1] + own * mine[1])[:, :rank]
                modules.append(LoraModule(module_name(kind, layer), a, b))
    names = target_modules(module.name for module in modules)
    return Adapter(BASE, "CAUSAL_LM", names, tuple(modules))


def with_factors(adapter: Adapter, a: float = 1.0, b: float = 1.0) -> Adapter:
    """Return the adapter with its factors multiplied."""
    modules = tuple(LoraModule(module.name, a * module.a, b * module.b) for module in adapter.modules)
    return Adapter(adapter.base_model, adapter.task_type, adapter.target_modules, modules)


def make_vectors(task: int, support_set: int = 0) -> dict[str, torch.Tensor]:
    """Return task vectors: near each other within a task, far between tasks."""
    task_part = torch.Generator().manual_seed(task)
    own = torch.Generator().manual_seed(1000 * task + support_set)
    return {
        view: 3.0 + torch.randn(HIDDEN, generator=task_part) + 0.1 * torch.randn(HIDDEN, generator=own)
        for view in ("adapted", "context")
    }


@dataclass(frozen=True)
class MemoryAdapterSource:
    """A fleet in memory: per task its final adapter, then its checkpoints."""

    adapters: Sequence[Sequence[Adapter]]
    sets: int = 2
    initials: Sequence[InitialA | None] = ()

    def tasks(self) -> int:
        return len(self.adapters)

    def checkpoints(self, task: int) -> int:
        return len(self.adapters[task]) - 1

    def load(self, task: int, checkpoint: int | None) -> Adapter:
        return self.adapters[task][0 if checkpoint is None else checkpoint + 1]

    def initial(self, task: int) -> InitialA | None:
        return self.initials[task] if self.initials else None

    def support_sets(self, task: int) -> int:
        return self.sets

    def vectors(self, task: int, support_set: int) -> Mapping[str, torch.Tensor]:
        return make_vectors(task, support_set)

    def layouts(self) -> list[tuple[ModuleShape, ...]]:
        return [adapter.layout for adapters in self.adapters for adapter in adapters]

    def config(self, quality: int = 5, previous: GeneratorConfig | None = None) -> GeneratorConfig:
        """Return the configuration of a generator for this fleet."""
        size = HIDDEN if self.sets else 0
        return config_for(BASE, self.layouts(), tasks=64, condition_size=size, quality=quality, previous=previous)


def mixed_fleet(sets: int = 2) -> MemoryAdapterSource:
    """Return three tasks of different ranks and kinds; the first has a checkpoint."""
    first = [make_adapter(0), make_adapter(0, strength=0.03)]
    rest = [[make_adapter(1, rank=4)], [make_adapter(2, rank=1, kinds=("q_proj", "down_proj"))]]
    return MemoryAdapterSource([first, *rest], sets)


def begin(fleet: MemoryAdapterSource, steps: int, **options: float) -> TrainState:
    """Start a training run."""
    net = fresh_network(fleet.config(), fleet, 0, uneven(fleet.config()))
    return new_state(net, TrainConfig(steps=steps, **options))  # type: ignore[arg-type]


def weighted(adapter: Adapter, config: GeneratorConfig, sensitivity: Sensitivity) -> Adapter:
    """Multiply dW by the weights of its channels."""
    modules = (sensitivity.weigh(module, *config.place_of(module.shape)) for module in adapter.modules)
    return replace(adapter, modules=tuple(modules))


def uneven(config: GeneratorConfig) -> Sensitivity:
    """Return channel weights between a half and two, in halves of an octave."""
    draw = torch.Generator().manual_seed(5)
    return Sensitivity(
        *(
            tuple(torch.randint(-2, 3, part.shape, generator=draw) / 2 for part in side)
            for side in (even(config).inputs, even(config).outputs)
        )
    )


@cache
@torch.enable_grad()  # the first caller may be in no_grad
def trained_file(sets: int = 2) -> bytes:
    """Return the file of a generator trained on the mixed fleet."""
    state = begin(mixed_fleet(sets), 40)
    for _ in fit(state, mixed_fleet(sets)):
        pass
    return generator_to_bytes(state.net)


def codec(sets: int = 2) -> Codec:
    """Return a codec of its own under the trained generator."""
    return Codec.of(trained_file(sets))


def sides_of(vectors: Nonzeros, count: int, sizes: Sequence[int]) -> list[Integers]:
    """Return all integers of the vectors of some slots by side, (count, size) each."""
    ends = np.cumsum([count * size for size in sizes])
    parts = np.split(vectors.dense(int(ends[-1])), ends[:-1])
    return [part.reshape(count, size) for part, size in zip(parts, sizes, strict=True)]


def same(left: Adapter, right: Adapter) -> bool:
    """Say whether two adapters are equal bit for bit."""
    return left.layout == right.layout and all(
        torch.equal(x.a, y.a) and torch.equal(x.b, y.b) for x, y in zip(left.modules, right.modules, strict=True)
    )


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return dW by module name, in float64."""
    return {module.name: module.b.double() @ module.a.double() for module in adapter.modules}
