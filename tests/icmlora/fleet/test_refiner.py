"""Codes for a share of the effect: where their refinement begins, and where it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import Example, plain
from icmlora.base_models.modality import BaseModel
from icmlora.fleet.encode import refiner
from icmlora.fleet.encode.refiner import Refiner, TrialCode, coarse_for, near, refine_all
from icmlora.formats.discovery.folder import load_adapter
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.steps import AdapterSteps
from icmlora.training.effect import EffectLoss
from icmlora.training.refinement import FOR_SHARE
from tests.icmlora.tiny_base import load_tiny_base, write_tiny_adapter
from tests.icmlora.untrained import untrained_codec, with_directions

TEXTS = plain([f"text {number} of a task with some words in it" for number in range(12)])


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return load_adapter(write_tiny_adapter(tmp_path / "adapter", strength=2.0))


@pytest.fixture
def codec(adapter: Adapter) -> Codec:
    return untrained_codec(adapter)


def coarse(base: BaseModel, adapter: Adapter, codec: Codec, keep: float, lost: float) -> TrialCode:
    found = Refiner.of(base, adapter, TEXTS, FOR_SHARE)
    return coarse_for(keep, lost, found, codec, adapter, AdapterSteps(codec, adapter, {}, None))


@given(share=st.floats(0.001, 0.5), power=st.floats(1.2, 3.0), at=st.integers(-60, 0), first=st.integers(-60, 0))
def test_a_few_looks_find_the_step_that_loses_a_share(share: float, power: float, at: int, first: int) -> None:
    looks = []

    def lost(step: int) -> float:
        looks.append(step)
        return min(share * 2.0 ** (power * (step - at) / 8), 1.0)

    step, found = near(share, lost, first)
    assert len(looks) <= 4
    assert step in looks
    assert found == pytest.approx(max(lost(step), 1e-4))
    if abs(first - at) <= 16:
        assert abs(math.log2(found / share)) < 1


def test_refinement_begins_with_a_code_that_loses_about_the_share(
    base: BaseModel, adapter: Adapter, codec: Codec
) -> None:
    begun = coarse(base, adapter, codec, keep=0.9, lost=0.3)
    assert 0.15 < begun.refiner.lost(codec, begun.encoded.data, of_few=True).of_most < 0.6


def test_refinement_begins_with_the_strengths_that_lose_less(base: BaseModel, adapter: Adapter, codec: Codec) -> None:
    begun = coarse(base, adapter, codec, keep=0.9, lost=0.3)
    share, step = begun.share, codec.open(begun.encoded.data).head.step
    assert share is not None
    other = share.steps.with_slots(step, replace(share.slots, energy_weighted=not share.slots.energy_weighted))
    taken, left = (begun.refiner.lost(codec, data, of_few=True).of_most for data in (begun.encoded.data, other))
    assert 0.9 * taken <= left


@dataclass(frozen=True)
class Looking(Refiner):
    """Sees what is looked for at the step 2^-1, and so many times as much lost by codes without their weak slots."""

    without: float

    def lost(self, codec: Codec, data: bytes, *, of_few: bool = False) -> EffectLoss:
        modules = codec.decode(data).modules
        share = 0.1 * 2.0 ** ((codec.open(data).head.step + 8) / 4)
        return EffectLoss(*[share * (self.without if all(len(module.a) == 1 for module in modules) else 1.0)] * 2)


@pytest.mark.parametrize(("without", "keep_weak"), [(1.1, False), (10.0, True)])
def test_a_code_has_its_faint_slots_if_what_they_do_is_worth_their_bytes(
    base: BaseModel, without: float, *, keep_weak: bool
) -> None:
    adapter = with_directions(1.0, *[0.12] * 63)  # at 2^-1 the weak ones are faint, and take four fifths of the bytes
    codec, looking = untrained_codec(adapter), Looking(base, *[None] * 3, without)  # type: ignore[arg-type]
    share = coarse_for(0.9, 0.1 * without, looking, codec, adapter, AdapterSteps(codec, adapter, {}, None)).share
    assert share is not None
    assert share.slots.keep_weak == keep_weak


@pytest.mark.parametrize(("keep", "is_finer"), [(0.999, True), (0.3, False)])
def test_a_code_that_would_miss_its_share_goes_on_with_another_step(
    base: BaseModel, adapter: Adapter, codec: Codec, keep: float, is_finer: bool
) -> None:
    begun = coarse(base, adapter, codec, keep, lost=0.2)
    (made,) = refine_all([begun], lambda _: None)
    before, after = (codec.open(code.encoded.data).head.step for code in (begun, made))
    assert (after < before, after > before) == (is_finer, not is_finer)


@dataclass(frozen=True)
class Doubting(Refiner):
    """Sees a code on its way at the first look, a bad one at the second, and then one that keeps enough."""

    looks: list[EffectLoss]

    def lost(self, codec: Codec, data: bytes, *, of_few: bool = False) -> EffectLoss:
        return EffectLoss(1.0, 1.0) if of_few else self.looks.pop(0)


@pytest.mark.parametrize(
    ("examples", "is_finer"), [(TEXTS, True), ([Example(text.completion, "yes") for text in TEXTS], False)]
)
def test_a_second_look_does_not_make_codes_of_short_answers_finer(
    base: BaseModel, adapter: Adapter, codec: Codec, examples: list[Example], *, is_finer: bool
) -> None:
    begun = coarse(base, adapter, codec, keep=0.9, lost=0.3)
    read = Refiner.of(base, adapter, examples, FOR_SHARE)
    looks = [EffectLoss(lost, lost) for lost in (0.15, 0.4, 0.1)]
    doubting = Doubting(base, read.teacher, read.effect, FOR_SHARE, looks)
    (made,) = refine_all([replace(begun, refiner=doubting)], lambda _: None)
    before, after = (codec.open(code.encoded.data).head.step for code in (begun, made))
    assert (after < before) == is_finer


def test_a_code_that_loses_right_answers_at_the_end_goes_on_with_a_finer_step(
    base: BaseModel, adapter: Adapter, codec: Codec
) -> None:
    begun = coarse(base, adapter, codec, keep=0.9, lost=0.3)
    read = Refiner.of(base, adapter, [Example(text.completion, "yes") for text in TEXTS], FOR_SHARE)
    steps = []
    for of_right in (0.0, 0.5):
        looks = [EffectLoss(0.15, 0.15), EffectLoss(0.1, 0.1), EffectLoss(0.1, 0.1, of_right), EffectLoss(0.1, 0.1)]
        doubting = Doubting(base, read.teacher, read.effect, FOR_SHARE, looks)
        (made,) = refine_all([replace(begun, refiner=doubting)], lambda _: None)
        steps.append(codec.open(made.encoded.data).head.step)
        assert not made.misses_limit
    keeps_them, lost_them = steps
    assert lost_them < keeps_them


def test_a_code_that_is_for_no_share_keeps_its_step(base: BaseModel, adapter: Adapter, codec: Codec) -> None:
    begun = coarse(base, adapter, codec, keep=0.9, lost=0.2)
    (made,) = refine_all([TrialCode(begun.refiner, codec, adapter, begun.encoded)], lambda _: None)
    assert codec.open(made.encoded.data).head.step == codec.open(begun.encoded.data).head.step


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of refinement, as they are done."""
    done, real = list[int](), refiner.refine
    monkeypatch.setattr(
        refiner,
        "refine",
        lambda *asked: (step for step in real(*asked) if not done.append(step)),  # type: ignore[func-returns-value]
    )
    return done


def test_the_steps_of_a_code_are_as_many_as_were_asked_for(
    base: BaseModel, adapter: Adapter, codec: Codec, done: list[int]
) -> None:
    begun = coarse(base, adapter, codec, keep=0.9, lost=0.2)
    refine_all([TrialCode(begun.refiner, codec, adapter, begun.encoded)], lambda _: None)
    assert done == list(range(1, FOR_SHARE.steps + 1))


def test_the_last_steps_of_a_code_that_misses_its_share_are_done_again(
    base: BaseModel, adapter: Adapter, codec: Codec, done: list[int]
) -> None:
    begun = coarse(base, adapter, codec, keep=0.9999, lost=0.2)
    (made,) = refine_all([begun], lambda _: None)
    assert made.misses_limit
    again = FOR_SHARE.steps * 4 // 10
    assert done[FOR_SHARE.steps :] == list(range(FOR_SHARE.steps - again + 1, FOR_SHARE.steps + 1))


@dataclass(frozen=True)
class OnTheBrink(Refiner):
    """Sees codes beyond some step lose everything; one that is refined is never there."""

    coarsest: int = 0

    def lost(self, codec: Codec, data: bytes, *, of_few: bool = False) -> EffectLoss:
        if codec.open(data).head.step <= self.coarsest:
            return super().lost(codec, data, of_few=of_few)
        assert of_few
        return EffectLoss(9.0, 9.0)


def test_a_code_does_not_go_on_where_it_would_lose_everything(base: BaseModel, adapter: Adapter, codec: Codec) -> None:
    begun = coarse(base, adapter, codec, keep=0.3, lost=0.2)
    brink = codec.open(begun.encoded.data).head.step
    looking = begun.refiner
    there = OnTheBrink(looking.base, looking.teacher, looking.effect, looking.config, coarsest=brink)
    (made,) = refine_all([replace(begun, refiner=there)], lambda _: None)
    assert not made.misses_limit
