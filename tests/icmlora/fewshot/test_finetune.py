"""Ordinary gradient steps from an adapter, on a tiny base model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from tests.icmlora.fewshot.trained_tasks import (
    NAMES,
    is_untouched,
    loss_of,
    random_adapter,
    weights_of,
)
from tests.icmlora.small_fleet import dense, same

CONFIG = FinetuneConfig(steps=12, learning_rate=0.02)


def test_fine_tuning_lowers_the_loss_of(base: BaseModel, samples: list[Scored]) -> None:
    given = random_adapter(1)
    *_, (_, tuned) = finetune(base, given, samples, CONFIG)
    assert loss_of(base, tuned, samples) < loss_of(base, given, samples)


def test_each_step_reports_the_loss_before_it(base: BaseModel, samples: list[Scored]) -> None:
    given = random_adapter(1)
    nats, _ = next(finetune(base, given, samples, replace(CONFIG, batch=len(samples))))
    assert nats == pytest.approx(loss_of(base, given, samples), rel=1e-5)


def test_the_given_adapter_is_not_changed(base: BaseModel, samples: list[Scored]) -> None:
    given = random_adapter(1)
    *_, (_, tuned) = finetune(base, given, samples, CONFIG)
    assert same(given, random_adapter(1))
    assert tuned.layout == given.layout
    assert not any(module.a.requires_grad or module.b.requires_grad for module in tuned.modules)


def test_what_a_step_gave_is_not_changed_by_the_next(base: BaseModel, samples: list[Scored]) -> None:
    work = finetune(base, random_adapter(1), samples, CONFIG)
    _, first = next(work)
    before = dense(first)
    next(work)
    assert all(torch.equal(before[name], dense(first)[name]) for name in NAMES)


def test_a_seed_decides_everything(base: BaseModel, samples: list[Scored]) -> None:
    def last(seed: int) -> Adapter:
        *_, (_, tuned) = finetune(base, random_adapter(1), samples, replace(CONFIG, seed=seed))
        return tuned

    assert same(last(0), last(0))
    assert not same(last(0), last(1))


def test_one_sample_is_enough(base: BaseModel, samples: list[Scored]) -> None:
    assert len(list(finetune(base, random_adapter(1), samples[:1], CONFIG))) == CONFIG.steps


def test_the_learning_rate_rises_to_its_peak_and_falls_towards_zero() -> None:
    config = FinetuneConfig(steps=40, learning_rate=1.0)
    rates = [config.rate_at(step) for step in range(40)]
    assert max(rates) == rates[3] == 1.0
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.1


def test_fine_tuning_leaves_the_base_model_as_it_was(base: BaseModel, samples: list[Scored]) -> None:
    before = weights_of(base)
    list(finetune(base, random_adapter(1), samples, CONFIG))
    assert is_untouched(base, before)
