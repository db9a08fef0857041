"""Which slots are written."""

from __future__ import annotations

import numpy as np

from icmlora.generator.packing import KindIntegers
from icmlora.generator.quantizer import Slots


def integers(layer: list[int], slot: list[int], inputs: list[int], outputs: list[int]) -> KindIntegers:
    slots = Slots(0, np.array(layer, dtype=np.int64), np.array(slot, dtype=np.int64))
    column = [np.array(values, dtype=np.int32)[:, None] for values in (inputs, outputs)]
    return KindIntegers(slots, 3, np.arange(len(layer), dtype=np.int32), *column)


def test_slots_after_the_last_living_one_of_a_layer_are_left_out() -> None:
    kept = integers([0, 0, 0, 1, 1], [0, 1, 2, 0, 1], [1, 1, 0, 0, 2], [1, 1, 0, 0, 2]).written()
    assert list(zip(kept.slots.layer, kept.slots.slot, strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (kept.residuals.tolist(), kept.inputs[:, 0].tolist()) == ([0, 1, 3, 4], [1, 1, 0, 2])


def test_a_slot_with_one_vector_of_zeros_is_not_alive() -> None:
    assert len(integers([0, 1], [0, 0], [1, 0], [0, 1]).written().slots.layer) == 0


def test_a_kind_without_slots_stays_so() -> None:
    assert len(integers([], [], [], []).written().slots.layer) == 0
