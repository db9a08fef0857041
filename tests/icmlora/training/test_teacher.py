"""The teacher says how far other factors are from doing what an adapter does."""

from __future__ import annotations

import pytest
import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import Example, plain
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors, added, factors_of
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from icmlora.formats.discovery.folder import load_adapter
from icmlora.training.teacher import Shortfall, Teacher, shortfalls
from tests.icmlora.tiny_base import load_tiny_base, write_tiny_adapter

TEXTS = ["a first text of the task", "another one, of another length", "the third"]
ALL = range(len(TEXTS))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter that knows the texts."""
    start = load_adapter(write_tiny_adapter(tmp_path_factory.mktemp("adapter"), strength=0.1))
    items = base.modality.prepare(base, plain(TEXTS), 64)
    *_, (_, adapter) = finetune(base, start, items, FinetuneConfig(steps=40, learning_rate=0.02, batch=3))
    return adapter


def teacher(base: BaseModel, original: Factors) -> Teacher:
    return Teacher(base, original, base.modality.prepare(base, plain(TEXTS), 64, whole=True))


def compared(base: BaseModel, original: Factors, other: Factors) -> Shortfall:
    return shortfalls(base, [(teacher(base, original), other, ALL)])[0]


def test_an_adapter_falls_short_of_itself_by_nothing(base: BaseModel, trained: Adapter) -> None:
    short = compared(base, factors_of(trained), factors_of(trained))
    assert float(short.divergence) == pytest.approx(0.0, abs=1e-5)
    assert float(short.loss) == pytest.approx(0.0, abs=1e-5)


def test_the_base_model_falls_short_by_what_the_adapter_gains(base: BaseModel, trained: Adapter) -> None:
    items = base.modality.prepare(base, plain(TEXTS), 64)
    short = compared(base, factors_of(trained), {})
    before, after = (sum(losses(base, found, items)) for found in ({}, factors_of(trained)))
    read = sum(item.size for item in items)
    assert float(short.loss) == pytest.approx((before - after) / read, rel=1e-3)


def test_what_is_better_than_the_adapter_falls_short_by_less_than_nothing(base: BaseModel, trained: Adapter) -> None:
    short, other = compared(base, {}, factors_of(trained)), compared(base, factors_of(trained), {})
    assert float(short.loss) == pytest.approx(-float(other.loss), rel=1e-3)
    assert float(short.divergence) > 0


def test_a_few_texts_are_read_in_one_pass_and_as_if_alone(base: BaseModel, trained: Adapter) -> None:
    passes = []
    counting = base.model.register_forward_hook(lambda *_: passes.append(1))
    together = teacher(base, factors_of(trained)).targets(ALL)
    counting.remove()
    assert len(passes) == 1
    for number, target in enumerate(together):
        (alone,) = teacher(base, factors_of(trained)).targets([number])
        torch.testing.assert_close(target.log_p, alone.log_p, rtol=1e-4, atol=1e-4)


def test_of_a_prompt_and_its_answer_the_answer_counts(base: BaseModel, trained: Adapter) -> None:
    def short(example: Example) -> Shortfall:
        items = base.modality.prepare(base, [example], 64, whole=True)
        return shortfalls(base, [(Teacher(base, factors_of(trained), items), {}, range(1))])[0]

    asked, whole = short(Example("a question? ", "an answer")), short(Example("", "a question? an answer"))
    read, answered = len("a question? an answer"), len("an answer")
    parts = answered * asked.divergence + (read - answered) * asked.of_prompts
    assert float(parts) == pytest.approx(read * float(whole.divergence), rel=1e-4)
    assert (asked.fewest, whole.fewest, float(whole.of_prompts)) == (answered, read, 0.0)
    assert float(asked.of_prompts) > 0


def test_gradients_reach_the_other_factors(base: BaseModel, trained: Adapter) -> None:
    weak = {name: (a.clone(), (0.5 * b).requires_grad_()) for name, (a, b) in factors_of(trained).items()}
    short = compared(base, factors_of(trained), weak)
    for part in (short.divergence, short.loss):
        gradients = torch.autograd.grad(part, [b for _, b in weak.values()], retain_graph=True)
        assert all(bool(gradient.any()) for gradient in gradients)


def losses(base: BaseModel, factors: Factors, items: list[object]) -> list[float]:
    with torch.no_grad(), added(base.model, factors):
        return [float(base.modality.loss(base, [item])) for item in items]
