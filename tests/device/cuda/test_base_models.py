"""Every kind of base model on the card: what it computes there is what it computes on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.modality import BaseModel
from tests.icmlora.base_models.tiny_kinds import KINDS, Kind, texts
from tests.icmlora.tiny_base import write_tiny_base

_LIMIT = 64
_CAUSAL = Kind("llama", write_tiny_base, texts, ("model.layers.0.self_attn.q_proj",))


@dataclass(frozen=True)
class Pair:
    """One base model on the card and on the CPU, both in float32, and examples of it."""

    card: BaseModel
    cpu: BaseModel
    examples: tuple[Any, ...]
    bfloat16: BaseModel


@pytest.fixture(scope="module", params=[_CAUSAL, *KINDS.values()], ids=lambda kind: kind.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind: Kind = request.param
    found = inspect_base(kind.name, kind.write(tmp_path_factory.mktemp(kind.name)))
    modality = modality_of(found)
    card, cpu = (modality.load(found, device=torch.device(name), dtype=torch.float32) for name in ("cuda", "cpu"))
    examples = parse_examples(kind.examples, modality.example).items[:4]
    return Pair(card, cpu, examples, modality.load(found, device=torch.device("cuda")))


def close(card: torch.Tensor, cpu: torch.Tensor) -> None:
    """Insist that two results are alike up to rounding, and the first is on the card."""
    assert card.is_cuda
    scale = max(1.0, float(cpu.detach().abs().max()))
    torch.testing.assert_close(card.detach().cpu(), cpu.detach(), rtol=1e-4, atol=1e-4 * scale)


def test_it_is_loaded_onto_the_card_in_bfloat16(pair: Pair) -> None:
    assert (pair.bfloat16.device, pair.bfloat16.dtype) == (torch.device("cuda", 0), "bfloat16")
    assert {tensor.device.type for tensor in pair.bfloat16.model.state_dict().values()} == {"cuda"}
    assert pair.bfloat16.fingerprint == pair.cpu.fingerprint


def test_its_states_are_those_of_the_cpu(pair: Pair) -> None:
    modality = pair.card.modality
    for method in ("states", "context_state"):
        card, cpu = (getattr(modality, method)(base, pair.examples, _LIMIT) for base in (pair.card, pair.cpu))
        torch.testing.assert_close(card.cpu(), cpu, rtol=1e-4, atol=1e-4)


def test_its_predictions_losses_and_gradients_are_those_of_the_cpu(pair: Pair) -> None:
    gradients = []
    for base in (pair.card, pair.cpu):
        items = base.modality.prepare(base, pair.examples, _LIMIT)
        logits = base.modality.logits(base, items)
        weight = next(parameter for parameter in base.model.parameters() if parameter.dim() > 1)
        weight.requires_grad_(True)
        loss = base.modality.loss(base, items)
        (gradient,) = torch.autograd.grad(loss, [weight])
        weight.requires_grad_(False)
        counted = base.modality.counted(base, items)
        gradients.append((*logits, loss, gradient, *(() if counted is None else (counted.float(),))))
    for card, cpu in zip(*gradients, strict=True):
        close(card, cpu)


def test_it_is_measured_as_on_the_cpu(pair: Pair) -> None:
    card, cpu = (base.modality.measure(base, pair.examples, _LIMIT) for base in (pair.card, pair.cpu))
    assert card.value == pytest.approx(cpu.value, rel=1e-4)
    assert (card.count, dict(card.others)) == (cpu.count, pytest.approx(dict(cpu.others), rel=1e-4))
    assert pair.bfloat16.modality.measure(pair.bfloat16, pair.examples, _LIMIT).count == cpu.count


def test_it_writes_and_answers_as_on_the_cpu(pair: Pair) -> None:
    modality = pair.card.modality
    answers = [modality.answer(base, Prompt("text number"), 6) for base in (pair.card, pair.cpu)]
    assert answers[0] == answers[1]
    items = modality.prepare(pair.cpu, pair.examples, _LIMIT)
    counts = [len(modality.written(base, items[:2], 3, 24, seed=1)) for base in (pair.card, pair.cpu)]
    assert counts[0] == counts[1]
