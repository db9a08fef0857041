"""Which slots are written."""

from __future__ import annotations

import numpy as np

from icmlora.generator.codec.packing import written_slots
from icmlora.generator.network.tokens import Slots


def written(layer: list[int], slot: list[int], alive: list[bool]) -> list[bool]:
    slots = Slots(0, np.array(layer, dtype=np.int64), np.array(slot, dtype=np.int64))
    return written_slots(slots, np.array(alive, dtype=np.bool_)).tolist()


def test_slots_after_the_last_living_one_of_a_layer_are_left_out() -> None:
    kept = written([0, 0, 0, 1, 1], [0, 1, 2, 0, 1], [True, True, False, False, True])
    assert kept == [True, True, False, True, True]


def test_a_kind_of_which_nothing_lives_keeps_no_slot() -> None:
    assert written([0, 1], [0, 0], [False, False]) == [False, False]


def test_a_kind_without_slots_stays_so() -> None:
    assert written([], [], []) == []
