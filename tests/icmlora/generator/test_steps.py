"""The code of an adapter at any step, with and without the slots whose values are small beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from icmlora.adapter.model import Adapter
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.steps import AdapterSteps, SlotChoice
from tests.icmlora.peft_made import peft_codec, peft_fleet
from tests.icmlora.untrained import untrained_codec, with_directions

STRONGER = SlotChoice(keep_weak=False, energy_weighted=False)


def ranks(codec: Codec, code: bytes) -> list[int]:
    return [int(torch.linalg.matrix_rank(module.b @ module.a)) for module in codec.decode(code).modules]


def test_a_slot_whose_values_are_small_beside_the_step_is_left_out() -> None:
    adapter = with_directions(1.0, 0.24)  # the step is 1; some values of the weak direction are above one half
    codec = untrained_codec(adapter)
    steps = AdapterSteps(codec, adapter, {}, None)
    assert ranks(codec, steps.code(0)[0]) == [2, 2, 2]
    assert ranks(codec, steps.with_slots(0, STRONGER)) == [1, 1, 1]


def test_a_code_may_have_the_faint_slots_too() -> None:
    adapter = with_directions(1.0, 0.24)
    steps = AdapterSteps(untrained_codec(adapter), adapter, {}, None)
    assert steps.with_slots(0, replace(STRONGER, keep_weak=True)) == steps.code(0)[0]


def test_a_finer_step_leaves_out_none() -> None:
    adapter = with_directions(1.0, 0.24)
    steps = AdapterSteps(untrained_codec(adapter), adapter, {}, None)
    assert steps.with_slots(-8, STRONGER) == steps.code(-8)[0]


def test_a_step_beside_which_all_are_small_leaves_a_code_without_slots() -> None:
    adapter = with_directions(1.0, 0.24)
    codec = untrained_codec(adapter)
    assert ranks(codec, AdapterSteps(codec, adapter, {}, None).with_slots(24, STRONGER)) == [0, 0, 0]


def test_strengths_for_strong_slots_leave_these_as_long_as_they_were() -> None:
    adapter = with_directions(2.0, *[0.5] * 8)  # the step is 1: of the weak directions little is left
    codec = untrained_codec(adapter)
    steps = AdapterSteps(codec, adapter, {}, None)

    def length(adapter: Adapter) -> float:
        return sum(float(torch.linalg.matrix_norm(module.b @ module.a, ord=2)) for module in adapter.modules)

    of_all, of_strong = (
        codec.decode(steps.with_slots(0, replace(STRONGER, energy_weighted=wanted))) for wanted in (False, True)
    )
    assert length(of_strong) == pytest.approx(length(adapter), rel=0.05)
    assert length(of_all) > 1.05 * length(of_strong)


def test_a_code_without_slots_says_nothing_about_the_initial_a_of_slots() -> None:
    codec, fleet = peft_codec(), peft_fleet()
    steps = AdapterSteps(codec, fleet.load(0, None), {}, fleet.initial(0))
    shifts = [codec.open(steps.with_slots(step, STRONGER)).head.shifts for step in (-40, 40)]
    assert [bool(found.any()) for found in shifts] == [True, False]
