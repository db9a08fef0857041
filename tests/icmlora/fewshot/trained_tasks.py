"""Tasks of a tiny base model whose adapters were trained on texts of their own, so that each helps on its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fewshot.evidence import gather_evidence
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from tests.icmlora.tiny_base import HIDDEN, LABEL

WIDTHS = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (2 * HIDDEN, HIDDEN)}
NAMES = [f"model.layers.{layer}.{part}" for layer in range(2) for part in WIDTHS]
SUBJECTS = ("red apples", "night trains", "tall ships")


def scored(base: BaseModel, texts: Sequence[str], prompt: int = 1) -> list[Scored]:
    """Return texts as token ids, scored from the token of a number on."""
    return [Scored(list(base.tokenizer(text)["input_ids"]), prompt) for text in texts]


def texts_of(subject: str, count: int = 8) -> list[str]:
    """Return texts that say much the same, of different lengths."""
    return [f"{subject} {'and ' * (number % 3)}{subject} {number}" for number in range(count)]


def random_adapter(seed: int, rank: int = 2, strength: float = 0.1) -> Adapter:
    """Return a random adapter on two kinds of modules."""
    random = torch.Generator().manual_seed(seed)
    modules = []
    for name in NAMES:
        inputs, outputs = WIDTHS[name.partition("layers.")[2][2:]]
        a = strength * torch.randn(rank, inputs, generator=random)
        modules.append(LoraModule(name, a, strength * torch.randn(outputs, rank, generator=random)))
    return Adapter(LABEL, "CAUSAL_LM", target_modules(NAMES), tuple(modules))


@dataclass(frozen=True, eq=False)
class TrainedTasks:
    """Adapters and samples by task, as `icmlora.fewshot.meta_training.EpisodeSource`."""

    adapters: Sequence[Adapter]
    texts: Sequence[Sequence[Scored]]

    def tasks(self) -> int:
        return len(self.adapters)

    def load(self, task: int) -> Adapter:
        return self.adapters[task]

    def samples(self, task: int) -> Sequence[Scored]:
        return self.texts[task]


def trained_tasks(base: BaseModel) -> TrainedTasks:
    """Train an adapter for each subject, from none."""
    texts = [scored(base, texts_of(subject)) for subject in SUBJECTS]
    start = random_adapter(0)
    nothing = replace(start, modules=tuple(LoraModule(m.name, m.a, 0 * m.b) for m in start.modules))
    adapters = []
    for samples in texts:
        *_, (_, adapter) = finetune(base, nothing, samples, FinetuneConfig(steps=20, learning_rate=0.05, batch=4))
        adapters.append(adapter)
    return TrainedTasks(adapters, texts)


def loss_of(base: BaseModel, adapter: Adapter, samples: Sequence[Scored]) -> float:
    """Return the loss of samples under an adapter, in nats per token."""
    return gather_evidence(base, factors_of(adapter), [], samples).nats


def weights_of(base: BaseModel) -> Mapping[str, torch.Tensor]:
    """Return a copy of the base model's weights."""
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def is_untouched(base: BaseModel, before: Mapping[str, torch.Tensor]) -> bool:
    """Say whether a base model has its weights, no gradient and no hook."""
    return (
        all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
        and all(value.grad is None for value in base.model.parameters())
        and not any(module._forward_hooks for module in base.model.modules())
    )
