"""The effect of an adapter on a tiny model, and what other factors keep of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from icmlora.base_models.examples.examples import Example, plain
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors, added, factors_of
from icmlora.formats.discovery.folder import load_adapter
from icmlora.training.effect import Effect, bounded, bounded_answers, lost_of_right
from icmlora.training.teacher import Teacher, shortfalls
from tests.icmlora.tiny_base import load_tiny_base, write_tiny_adapter

TEXTS = ["a first text of the task", "another one, of another length"]


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


@pytest.fixture
def original(tmp_path: Path) -> Factors:
    return factors_of(load_adapter(write_tiny_adapter(tmp_path / "adapter", strength=2.0)))


@pytest.fixture
def effect(base: BaseModel, original: Factors) -> Effect:
    return effect_on(base, original)


def effect_on(base: BaseModel, factors: Factors) -> Effect:
    return Effect(Teacher(base, factors, base.modality.prepare(base, plain(TEXTS), 64, whole=True)))


def scaled(factors: Factors, factor: float) -> Factors:
    return {name: (a, factor * b) for name, (a, b) in factors.items()}


def test_the_original_keeps_all_of_its_effect(effect: Effect, original: Factors) -> None:
    assert effect.lost(original).of_all == pytest.approx(0, abs=1e-3)


def test_the_bare_base_model_keeps_none_of_it(effect: Effect) -> None:
    assert effect.lost({}).of_all == pytest.approx(1, abs=1e-3)


def test_of_an_effect_on_answers_half_a_nat_counts(base: BaseModel, original: Factors) -> None:
    base.model.lm_head.weight.data.mul_(50)  # makes it sure of what it says
    asked = [Example(f"question {number}? ", "yes") for number in range(4)]
    teacher = Teacher(base, original, base.modality.prepare(base, asked, 64, whole=True))
    (short,) = shortfalls(base, [(teacher, {}, range(4))])
    effect = Effect(teacher)
    assert float(short.divergence) > 0.6
    counted = (float(short.divergence) - effect.noise) / 0.5
    assert (effect.lost({}).of_all, effect.uncapped_ratio) == pytest.approx((counted, counted), rel=1e-4)


def test_what_an_adapter_makes_likely_of_the_right_answers_is_lost_without_it(
    base: BaseModel, original: Factors
) -> None:
    base.model.lm_head.weight.data.mul_(50)  # makes it sure of what it says
    asked = base.modality.prepare(base, [Example(f"question {number}? ", "yes") for number in range(4)], 64, whole=True)

    def said(items: list[Any]) -> torch.Tensor:  # (items, vocabulary): how likely each last token is
        return torch.stack([row[-2] for row in base.modality.logits(base, items)]).softmax(dim=-1)

    with added(base.model, original):
        likeliest = said(asked).max(dim=-1)
    answered = [
        Scored([*item.ids[:-1], int(token)], 1, answers=frozenset({item.size - 1}))
        for item, token in zip(asked, likeliest.indices, strict=True)
    ]
    less = likeliest.values - said(asked).gather(1, likeliest.indices[:, None])[:, 0]
    effect = Effect(Teacher(base, original, answered))
    assert effect.lost(original).counted == pytest.approx(0, abs=1e-3)
    assert effect.lost({}).of_right == pytest.approx(lost_of_right(less), abs=1e-4)
    assert float(less.mean()) > 0.3


def test_right_answers_are_lost_beyond_the_error_of_their_mean() -> None:
    assert lost_of_right(torch.tensor([0.02, 0.04, 0.02, 0.04])) == pytest.approx((0.03 - 0.01155 / 2) / 0.5, abs=1e-4)
    assert lost_of_right(torch.tensor([0.05, -0.03, 0.05, -0.05])) == 0
    assert lost_of_right(torch.tensor([0.01])) == pytest.approx(0.02)


def test_a_text_without_a_prompt_has_no_right_answer(effect: Effect) -> None:
    assert effect.lost({}).of_right == 0


def test_a_weaker_adapter_keeps_a_part_of_it(effect: Effect, original: Factors) -> None:
    assert 0 < effect.lost(scaled(original, 0.9)).of_all < effect.lost(scaled(original, 0.6)).of_all < 0.8


def test_the_opposite_keeps_little_of_it(effect: Effect, original: Factors) -> None:
    assert effect.lost(scaled(original, -1)).of_all > 0.7


def test_other_factors_of_the_same_weights_keep_all_of_it_in_bfloat16_too(base: BaseModel, original: Factors) -> None:
    base.model.to(torch.bfloat16)
    weak = scaled(original, 3e-4)  # a hundredth of its effect is noise
    effect = effect_on(base, weak)
    turned = {name: (a.flip(0) * 1.3, b.flip(1) / 1.3) for name, (a, b) in weak.items()}
    lost = effect.lost(turned).of_all
    assert effect.noise > 0.005 * effect.whole
    assert abs(lost) < 0.1 * effect.noise / effect.whole


def test_an_adapter_that_does_nothing_keeps_all_of_it(base: BaseModel, original: Factors) -> None:
    nothing = scaled(original, 0)
    assert effect_on(base, nothing).lost(nothing).of_all == 0


def test_a_text_that_is_lost_as_a_whole_counts_four_times_the_median() -> None:
    lost = torch.tensor([0.01, 0.02, 1.5, 0.03, 0.02])
    assert bounded(lost, 40).tolist() == pytest.approx([0.01, 0.02, 0.08, 0.03, 0.02])


def test_a_short_answer_may_lose_any_number_of_times_the_median() -> None:
    lost = torch.tensor([0.01, 0.02, 1.5, 0.03, 0.02])
    assert bounded(lost, 2).equal(lost)


def test_an_answer_of_which_the_adapter_is_not_sure_counts_four_times_the_mean_of_the_others() -> None:
    lost = torch.tensor([0.0, 0.02, 1.5, 0.01, 0.01])
    assert bounded_answers(lost).tolist() == pytest.approx([0, 0.02, 0.04, 0.01, 0.01])


def test_an_answer_alone_counts_as_it_is() -> None:
    assert bounded_answers(torch.tensor([0.3])).tolist() == pytest.approx([0.3])


def test_most_texts_lose_about_what_all_lose(effect: Effect, original: Factors) -> None:
    lost = effect.lost(scaled(original, 0.8))
    assert lost.of_most == pytest.approx(lost.of_all, abs=0.02)
