"""Adapters put into a model on the card, exchanged and taken out; and loaded onto the card, many at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from icmlora import Fleet, attach
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.running.attach import adapted
from icmlora.fleet.resources.loading import read_runnable
from registry.store import Store
from tests.device.counts import counting
from tests.icmlora.fleet.stores import TASKS, equal
from tests.icmlora.serving.conftest import Served
from tests.icmlora.tiny_base import LABEL

TOKENS = torch.arange(1, 13)[None]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device
    found: torch.Tensor = model(TOKENS.to(device)).logits
    assert found.device == device
    return found.cpu()


@pytest.fixture
def models(served_template: Served) -> tuple[Any, Any]:
    """The base model on the card and on the CPU."""
    on_card, on_cpu = (AutoModelForCausalLM.from_pretrained(served_template.base).eval() for _ in range(2))
    return on_card.to("cuda"), on_cpu


def test_attached_adapters_take_turns_as_on_the_cpu(served_template: Served, models: tuple[Any, Any]) -> None:
    fleet, (card, cpu) = Fleet(served_template.store), models
    bare = logits(card)
    for task in (*TASKS, TASKS[0]):
        card, cpu = attach(card, fleet, task), attach(cpu, fleet, task)
        torch.testing.assert_close(logits(card), logits(cpu), rtol=1e-4, atol=1e-5)
    assert {parameter.device.type for parameter in card.parameters()} == {"cuda"}
    assert torch.equal(logits(card.unload()), bare)


def test_an_exchange_brings_the_factors_to_the_card_and_computes_nothing_else(
    served_template: Served, models: tuple[Any, Any]
) -> None:
    fleet = Fleet(served_template.store)
    card = attach(attach(models[0], fleet, "rules"), fleet, "poems")  # of other modules: the slot has all of them now
    with counting() as counts:
        attach(card, fleet, "poems")
    assert 0 < counts.copies_to <= 2 * 2 * 4  # A and B of at most four modules in two layers
    assert (counts.copies_from, counts.names["sync: item"]) == (0, 0)


@pytest.mark.parametrize("task", ["rules", "silent"])  # the original of poems was evicted
def test_an_original_is_put_on_and_taken_off_without_a_trace(served_template: Served, task: str) -> None:
    found = inspect_base(LABEL, served_template.base)
    card, cpu = (CausalLM().load(found, device=torch.device(name), dtype=torch.float32) for name in ("cuda", "cpu"))
    bare = logits(card.model)
    with Store.open(served_template.store, read_only=True) as store:
        original = read_runnable(store, store.task(task).final)
    with adapted(card, original), adapted(cpu, original):
        assert not torch.equal(logits(card.model), bare)
        torch.testing.assert_close(logits(card.model), logits(cpu.model), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(card.model), bare)


def test_many_adapters_are_loaded_onto_the_card_with_the_numbers_of_the_cpu(served_template: Served) -> None:
    fleet = Fleet(served_template.store)
    with counting() as counts:
        on_card = dict(fleet.load_many(TASKS, source="code", device="cuda"))
    factors = [factor for adapter in on_card.values() for module in adapter.modules for factor in (module.a, module.b)]
    assert {factor.device.type for factor in factors} == {"cuda"}
    assert (counts.operators, counts.copies_to, counts.copies_from) == (0, len(factors), 0)
    for task, adapter in fleet.load_many(TASKS, source="code"):
        assert equal(on_card[task].to(torch.device("cpu")), adapter)
