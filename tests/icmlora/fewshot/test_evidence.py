"""Evidence is the gradient that autograd finds for each module's weight, and the mean squares around it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fewshot.evidence import Evidence, ModuleEvidence, gather_evidence
from tests.icmlora.fewshot.trained_tasks import NAMES, is_untouched, random_adapter, scored, weights_of
from tests.icmlora.small_fleet import dense
from tests.icmlora.tiny_base import load_tiny_base

TEXTS = ["a first text", "another one, and a longer one", "third", "one more of the fourth length"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny_base(tmp_path_factory.mktemp("base"))


def by_hand(base: BaseModel, samples: list[Scored], names: list[str] = NAMES, start: int | None = None) -> Evidence:
    """Return the same from autograd on the weights themselves, one sample a time, unbatched."""
    model = copy.deepcopy(base.model).requires_grad_()
    if start is not None:
        for name, change in dense(random_adapter(start)).items():
            model.get_submodule(name).weight.data += change.float()
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}

    def keep(name: str) -> object:
        def hook(_: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name].append((inputs[0].detach()[0], output))

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    tokens, nats = sum(len(sample.ids) - sample.first for sample in samples), 0.0
    for sample in samples:
        logits = model(torch.tensor([sample.ids])).logits[0]
        wanted = torch.tensor(sample.ids[sample.first :])
        loss = functional.cross_entropy(logits[sample.first - 1 : -1], wanted, reduction="sum")
        loss.backward()
        nats += float(loss.detach())
    found = {}
    for name in names:
        inputs = sum((x.square().sum(0) for x, _ in seen[name]), torch.zeros(()))
        outputs = sum((y.grad[0].square().sum(0) for _, y in seen[name]), torch.zeros(()))
        gradient = model.get_submodule(name).weight.grad / tokens
        found[name] = ModuleEvidence(gradient, inputs / tokens, outputs / tokens)
    return Evidence(found, nats / tokens, tokens)


def assert_same(found: Evidence, wanted: Evidence) -> None:
    assert found.tokens == wanted.tokens
    assert found.nats == pytest.approx(wanted.nats, rel=1e-5)
    assert list(found.modules) == list(wanted.modules)
    for name, other in wanted.modules.items():
        one = found.modules[name]
        for part in ("gradient", "inputs", "outputs"):
            mine, theirs = getattr(one, part), getattr(other, part)
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def gathered(base: BaseModel, samples: list[Scored], **more: int) -> Evidence:
    return gather_evidence(base, {}, NAMES, samples, **more)


def test_it_is_what_autograd_finds_for_the_weights(base: BaseModel) -> None:
    samples = scored(base, TEXTS)
    assert_same(gathered(base, samples), by_hand(base, samples))


def test_it_is_gathered_where_the_start_stands(base: BaseModel) -> None:
    samples = scored(base, TEXTS[:2])
    found = gather_evidence(base, factors_of(random_adapter(3)), NAMES, samples)
    assert_same(found, by_hand(base, samples, start=3))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_neither_padding_nor_the_size_of_a_batch_changes_it(base: BaseModel, size: int) -> None:
    samples = scored(base, TEXTS)
    assert_same(gathered(base, samples, batch_size=size), gathered(base, samples))


def test_of_a_labelled_sample_only_the_completion_counts(base: BaseModel) -> None:
    samples = scored(base, TEXTS, prompt=3)
    found = gathered(base, samples)
    assert found.tokens == sum(len(sample.ids) - 3 for sample in samples)
    assert_same(found, by_hand(base, samples))


def test_modules_come_in_the_order_in_which_they_are_named(base: BaseModel) -> None:
    names = NAMES[::-1]
    assert list(gather_evidence(base, {}, iter(names), scored(base, TEXTS[:1])).modules) == names


def test_only_the_modules_that_are_named_are_looked_at(base: BaseModel) -> None:
    found = gather_evidence(base, {}, NAMES[:1], scored(base, TEXTS[:1]))
    assert list(found.modules) == NAMES[:1]


def test_layers_that_hold_their_weight_the_other_way_round_are_read_as_they_are(base: BaseModel) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2)).eval()
    gpt2, name = replace(base, model=model), "transformer.h.0.attn.c_attn"
    samples = scored(base, TEXTS[:1])
    wanted = copy.deepcopy(model).requires_grad_()
    wanted(torch.tensor([samples[0].ids]), labels=torch.tensor([samples[0].ids])).loss.backward()
    found = gather_evidence(gpt2, {}, [name], samples).modules[name].gradient
    torch.testing.assert_close(found, wanted.get_submodule(name).weight.grad.T, rtol=1e-3, atol=1e-6)


def test_a_module_that_is_no_linear_layer_is_refused(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="neither a linear layer nor"):
        gather_evidence(base, {}, ["model.norm"], scored(base, TEXTS[:1]))


def test_the_base_model_is_left_as_it_was(base: BaseModel) -> None:
    before = weights_of(base)
    gather_evidence(base, factors_of(random_adapter(1)), NAMES, scored(base, TEXTS), batch_size=2)
    assert is_untouched(base, before)


def test_the_base_model_is_left_as_it_was_where_gathering_fails(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    before = weights_of(base)
    monkeypatch.setattr("icmlora.base_models.log_probabilities.cross_entropy", fail)
    with pytest.raises(RuntimeError):
        gather_evidence(base, factors_of(random_adapter(1)), NAMES, scored(base, TEXTS))
    assert is_untouched(base, before)
