"""Learned steps from a few-shot start, on a tiny base model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.fewshot.adapt import adapt, supports
from icmlora.fewshot.start import FewShotStart, untrained_fewshot_start
from icmlora.generator.scales import OCTAVE
from tests.icmlora.fewshot.trained_tasks import (
    NAMES,
    is_untouched,
    loss_of,
    random_adapter,
    scored,
    texts_of,
    weights_of,
)
from tests.icmlora.small_fleet import dense, same


def start(lengths: tuple[int, ...] = (-24, -20, -16, -12)) -> FewShotStart:
    """Return a start whose first step has lengths of so many eighths of an octave; the second one is half as long."""
    second = tuple(length - OCTAVE for length in lengths)
    return FewShotStart(random_adapter(1, strength=0.05), (0,) * len(NAMES), (lengths, second), (0, 0), (0, 0), 3)


def test_every_module_steps_as_far_as_was_learned_for_it(base: BaseModel, samples: list[Scored]) -> None:
    known = start()
    before = dense(known.adapter)
    for step, adapted in enumerate(adapt(base, known, samples)):
        after = dense(adapted.adapter)
        for number, name in enumerate(module.name for module in known.adapter.modules):
            moved = float((after[name] - before[name]).norm())
            assert moved == pytest.approx(known.length(step, number, len(samples)), rel=1e-3)
        before = after


def test_the_loss_falls_with_each_step(base: BaseModel, samples: list[Scored]) -> None:
    first, second = adapt(base, start(), samples)
    losses = [first.nats, second.nats, loss_of(base, second.adapter, samples)]
    assert losses[0] == pytest.approx(loss_of(base, start().adapter, samples), rel=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


def test_more_samples_step_farther_where_that_was_learned(base: BaseModel, samples: list[Scored]) -> None:
    known = replace(start(), slopes=(8, 8))
    four, two = (dense(next(adapt(base, known, some)).adapter) for some in (samples, samples[:2]))
    origin = dense(known.adapter)
    for name in NAMES:
        assert float((four[name] - origin[name]).norm()) == pytest.approx(
            2 * float((two[name] - origin[name]).norm()), rel=1e-3
        )


@given(st.integers(1, 64), st.integers(1, 3))
def test_every_sample_is_read_and_no_step_reads_more_than_sixteen(count: int, learned: int) -> None:
    samples = [Scored([0, number], 1) for number in range(count)]
    read = [[sample.ids[1] for sample in some] for some in supports(samples, learned)]
    assert {number for some in read for number in some} == set(range(count))
    assert all(len(set(some)) == len(some) == min(count, 16) for some in read)
    assert len(read) == max(learned, math.ceil(count / 16))


def test_a_step_reads_samples_from_all_over() -> None:
    samples = [Scored([0, number], 1) for number in range(64)]
    assert all(min(some) < 4 <= 60 <= max(some) for some in ([s.ids[1] for s in part] for part in supports(samples, 2)))


def test_steps_after_the_learned_ones_are_shorter_and_read_other_samples(base: BaseModel) -> None:
    known, many = start(), scored(base, texts_of("grey geese", count=40))
    before, moved = dense(known.adapter), []
    for adapted in adapt(base, known, many):
        after = dense(adapted.adapter)
        moved.append(float((after[NAMES[0]] - before[NAMES[0]]).norm()))
        before = after
    assert [moved[1] / moved[0], moved[2] / moved[1]] == pytest.approx([2**-1, 2**-0.5], rel=1e-3)


def test_the_same_samples_give_the_same_adapter(base: BaseModel, samples: list[Scored]) -> None:
    (*_, one), (*_, other) = adapt(base, start(), samples), adapt(base, start(), samples)
    assert same(one.adapter, other.adapter)


def test_batches_give_the_adapter_that_single_samples_give(base: BaseModel, samples: list[Scored]) -> None:
    (*_, one), (*_, other) = adapt(base, start(), samples), adapt(base, start(), samples, batch_size=3)
    found, wanted = dense(one.adapter), dense(other.adapter)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in NAMES)


def test_adapting_leaves_the_base_model_as_it_was(base: BaseModel, samples: list[Scored]) -> None:
    before = weights_of(base)
    list(adapt(base, untrained_fewshot_start([random_adapter(1), random_adapter(2)]), samples))
    assert is_untouched(base, before)
