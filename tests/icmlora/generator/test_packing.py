"""Which slots are written."""

from __future__ import annotations

import numpy as np

from icmlora.generator.packing import KindIntegers, written_slots
from icmlora.generator.quantizer import Slots


def written(layer: list[int], slot: list[int], alive: list[bool]) -> KindIntegers:
    slots = Slots(0, np.array(layer, dtype=np.int64), np.array(slot, dtype=np.int64))
    numbers = np.arange(len(layer), dtype=np.int32)
    sides = (numbers[:, None],) * 3
    whole = KindIntegers(slots, 3, numbers, *sides, scales=sides)
    return whole[written_slots(whole.slots, np.array(alive, dtype=np.bool_))]


def test_slots_after_the_last_living_one_of_a_layer_are_left_out() -> None:
    kept = written([0, 0, 0, 1, 1], [0, 1, 2, 0, 1], [True, True, False, False, True])
    assert list(zip(kept.slots.layer, kept.slots.slot, strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert kept.residuals.tolist() == kept.inputs[:, 0].tolist() == [0, 1, 3, 4]
    assert kept.outputs[:, 0].tolist() == kept.along[:, 0].tolist() == [0, 1, 3, 4]
    assert [scales[:, 0].tolist() for scales in kept.scales] == [[0, 1, 3, 4]] * 3


def test_a_kind_of_which_nothing_lives_keeps_no_slot() -> None:
    assert len(written([0, 1], [0, 0], [False, False]).slots.layer) == 0


def test_a_kind_without_slots_stays_so() -> None:
    assert len(written([], [], []).slots.layer) == 0
