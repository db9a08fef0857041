"""Adapters that are made for their context, and what of a context moves into an adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.base_models.examples.context import SEPARATOR
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import IGNORED, BaseModel
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.errors import DataError
from icmlora.fewshot.adapt import adapt, shuffled_together
from icmlora.fewshot.distil import DistilConfig, PromptedTeacher, distil
from icmlora.fewshot.start import FewShotStart
from icmlora.training.teacher import shortfalls
from tests.icmlora.fewshot.trained_tasks import (
    NAMES,
    is_untouched,
    loss_of,
    random_adapter,
    scored,
    texts_of,
    trained_tasks,
    weights_of,
)
from tests.icmlora.small_fleet import dense

CONFIG = DistilConfig(steps=30, learning_rate=0.02)


def start(in_context: int = 0) -> FewShotStart:
    steps = ((-24,) * len(NAMES), (-32,) * len(NAMES))
    return FewShotStart(random_adapter(1, strength=0.05), (0,) * len(NAMES), steps, (0, 0), (in_context,) * 2, 3)


def told(items: list[Scored]) -> list[int]:
    """Return the tokens that are scored, in order."""
    return [token for item in items for token in item.targets if token != IGNORED]


@given(st.lists(st.tuples(st.integers(2, 30), st.integers(1, 29), st.booleans()), min_size=1, max_size=9))
def test_samples_in_one_text_are_scored_as_before_and_each_is_there(
    base: BaseModel, some: list[tuple[int, int, bool]]
) -> None:
    items = [Scored(list(range(3, 3 + size)), min(first, size - 1), is_chat=is_chat) for size, first, is_chat in some]
    texts = base.modality.joined(base, items, 64)
    assert told(texts) == told(items)
    assert all(text.size <= 64 for text in texts)
    between = len(base.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"])
    assert sum(text.size for text in texts) <= sum(item.size + between for item in items)


def test_a_step_for_a_context_reads_each_sample_behind_others(base: BaseModel, samples: list[Scored]) -> None:
    known = start()
    made = next(adapt(base, known, samples, in_context=True))
    (text,) = shuffled_together(base, samples, 0)
    assert made.nats == pytest.approx(loss_of(base, known.adapter, [text]), rel=1e-5)
    assert sorted(told([text])) == sorted(told(samples))


def test_it_is_longer_where_that_was_learned(base: BaseModel, samples: list[Scored]) -> None:
    before = dense(start().adapter)
    near, far = (dense(next(adapt(base, start(added), samples, in_context=True)).adapter) for added in (0, 8))
    for name in NAMES:
        moved = [float((one[name] - before[name]).norm()) for one in (near, far)]
        assert moved[1] == pytest.approx(2 * moved[0], rel=1e-3)


@pytest.mark.parametrize("in_context", [False, True])
def test_it_lowers_what_is_lost_where_it_is_to_stand(base: BaseModel, in_context: bool) -> None:
    samples = scored(base, texts_of("grey geese", count=12))
    *_, made = adapt(base, start(), samples, in_context=in_context)
    read = shuffled_together(base, samples, 7) if in_context else samples
    assert loss_of(base, made.adapter, read) < loss_of(base, start().adapter, read)


def test_a_teacher_says_of_a_sample_what_the_model_predicts_behind_others(base: BaseModel) -> None:
    samples, adapter = scored(base, texts_of("grey geese", count=2)), random_adapter(2)
    teacher = PromptedTeacher(base, factors_of(adapter), samples, CONFIG)
    target = teacher.targets([1])[0]
    (text,) = base.modality.joined(base, samples, 512)
    with torch.no_grad(), added(base.model, factors_of(adapter)):
        (logits,) = base.modality.logits(base, [text])
    wanted = logits[-samples[1].count - 1 : -1].log_softmax(-1)  # of the scored tokens of the last sample
    found = target.log_p[:-1, :-1]
    assert torch.allclose(found, wanted.gather(-1, target.tokens[:-1]), atol=1e-5)
    assert target.count == samples[1].count


@pytest.mark.parametrize("count", [2, 3, 40])
def test_every_sample_is_taught(base: BaseModel, count: int) -> None:
    samples = scored(base, texts_of("grey geese", count=count))
    teacher = PromptedTeacher(base, {}, samples, CONFIG)
    assert [target.item for target in teacher.targets(range(count))] == samples


def test_distilling_brings_an_adapter_nearer_to_what_it_predicts_behind_samples(base: BaseModel) -> None:
    adapter, samples = trained_tasks(base).adapters[0], scored(base, texts_of("grey geese", count=8))
    *_, (_, taught) = distil(base, adapter, adapter, samples, replace(CONFIG, part=1))
    teacher = PromptedTeacher(base, factors_of(adapter), samples, CONFIG)
    before, after = (
        float(shortfalls(base, [(teacher, factors_of(one), range(8))])[0].divergence.detach())
        for one in (adapter, taught)
    )
    assert after < 0.5 * before
    assert taught.layout == adapter.layout


def test_a_distilled_adapter_goes_half_of_the_way(base: BaseModel, samples: list[Scored]) -> None:
    adapter, teacher, short = random_adapter(1), random_adapter(2), replace(CONFIG, steps=3)
    (*_, (_, half)), (*_, (_, there)) = (
        distil(base, adapter, teacher, samples, replace(short, part=part)) for part in (DistilConfig.part, 1)
    )
    assert any(not torch.equal(one.b, two.b) for one, two in zip(adapter.modules, there.modules, strict=True))
    for first, middle, last in zip(adapter.modules, half.modules, there.modules, strict=True):
        assert torch.allclose(middle.a, (first.a + last.a) / 2, atol=1e-6)
        assert torch.allclose(middle.b, (first.b + last.b) / 2, atol=1e-6)


def test_samples_of_which_no_two_fit_are_refused(base: BaseModel) -> None:
    long = [Scored(list(range(1, 251)) * 3, 1)] * 2
    with pytest.raises(DataError, match="exceed the"):
        distil(base, random_adapter(1), random_adapter(1), long, CONFIG)


def test_distilling_leaves_the_base_model_as_it_was(base: BaseModel, samples: list[Scored]) -> None:
    before = weights_of(base)
    list(distil(base, random_adapter(1), random_adapter(2), samples, replace(CONFIG, steps=2)))
    assert is_untouched(base, before)
