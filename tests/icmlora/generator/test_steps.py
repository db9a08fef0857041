"""The code of an adapter at any step, with and without the slots whose values are small beside it."""

from __future__ import annotations

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.codec import Codec
from icmlora.generator.encoding import Steps
from tests.icmlora.peft_made import peft_codec, peft_fleet
from tests.icmlora.untrained import untrained_codec

WIDTH = 256


def two_slots(*sizes: float) -> Adapter:
    """Return an adapter whose modules are a strong direction and a weak one, of values with these root mean squares."""
    draw = torch.Generator().manual_seed(0)
    modules = []
    for layer in range(3):
        right, left = (torch.linalg.qr(torch.randn(WIDTH, 2, generator=draw)).Q for _ in range(2))
        roots = torch.tensor(sizes).mul(WIDTH**0.5).sqrt()
        modules.append(LoraModule(f"layers.{layer}.q", (right * roots).T.contiguous(), left * roots))
    return Adapter("base", "CAUSAL_LM", ("q",), tuple(modules))


def ranks(codec: Codec, code: bytes) -> list[int]:
    return [int(torch.linalg.matrix_rank(module.b @ module.a)) for module in codec.decode(code).modules]


def test_a_slot_whose_values_are_small_beside_the_step_is_left_out() -> None:
    adapter = two_slots(1.0, 0.24)  # the step is 1; some values of the weak direction are above one half
    codec = untrained_codec(adapter)
    steps = Steps(codec, adapter, {}, None)
    assert ranks(codec, steps.code(0)[0]) == [2, 2, 2]
    assert ranks(codec, steps.without_faint(0)) == [1, 1, 1]


def test_a_finer_step_leaves_out_none() -> None:
    adapter = two_slots(1.0, 0.24)
    steps = Steps(untrained_codec(adapter), adapter, {}, None)
    assert steps.without_faint(-8) == steps.code(-8)[0]


def test_a_step_beside_which_all_are_small_leaves_a_code_without_slots() -> None:
    adapter = two_slots(1.0, 0.24)
    codec = untrained_codec(adapter)
    assert ranks(codec, Steps(codec, adapter, {}, None).without_faint(24)) == [0, 0, 0]


def test_a_code_without_slots_says_nothing_about_the_initial_a_of_slots() -> None:
    codec, fleet = peft_codec(), peft_fleet()
    steps = Steps(codec, fleet.load(0, None), {}, fleet.initial(0))
    shifts = [codec.open(steps.without_faint(step)).head.shifts for step in (-40, 40)]
    assert [bool(found.any()) for found in shifts] == [True, False]
