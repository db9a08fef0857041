"""Adapters of a rank that does not fit in a byte: trained on, encoded, decoded, in codes of their own version."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.codec.code import ParsedCode
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.config import MAX_SLOTS, GeneratorConfig, ModuleKind, config_for
from icmlora.generator.files.container import ABSENT
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.generator.initial_a.draw import InitialA, InitialModule, initial_from_bytes, initial_to_bytes
from icmlora.generator.initial_a.search import initial_under
from icmlora.training.config import TrainConfig
from icmlora.training.initialisation import fresh_network
from icmlora.training.loop import fit
from icmlora.training.state import new_state
from tests.icmlora.small_fleet import MemoryAdapterSource

RANK, WIDTH = 300, 320


def wide_adapter(rank: int = RANK, width: int = WIDTH, layers: int = 1, seed: int = 3) -> Adapter:
    """Return an adapter whose A is near the one that PEFT would have drawn under a seed."""
    torch.manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    modules = []
    for layer in range(layers):
        for kind in ("q_proj", "v_proj"):
            torch.nn.Linear(width, rank, bias=False), torch.nn.Linear(rank, width, bias=False)
            a = torch.empty(rank, width)
            torch.nn.init.kaiming_uniform_(a, a=5**0.5)
            b = torch.randn(width, rank, generator=noise) * 0.98 ** torch.arange(float(rank))
            modules.append(LoraModule(f"model.layers.{layer}.self_attn.{kind}", a, 0.01 * b))
    return Adapter("tiny/wide", None, ("q_proj", "v_proj"), tuple(modules))


def trained(adapter: Adapter, steps: int = 2) -> Codec:
    fleet = MemoryAdapterSource([[adapter]], sets=0)
    config = config_for(adapter.base_model, fleet.layouts(), tasks=1, condition_size=0, quality=4)
    state = new_state(fresh_network(config, fleet, 0), TrainConfig(steps=steps))
    for _ in fit(state, fleet):
        pass
    return Codec.of(generator_to_bytes(state.net))


@cache
@torch.enable_grad()
def codec() -> Codec:
    return trained(wide_adapter())


def test_an_adapter_of_rank_300_round_trips_within_its_error() -> None:
    adapter = wide_adapter()
    made = encode_adapter(codec(), adapter, {}, limits=Limits(max_error=math.sqrt(0.05)))
    assert squared_error(adapter, codec().decode(made.data)) == pytest.approx(made.squared_error, abs=1e-6)
    assert made.squared_error <= 0.05


def test_all_its_slots_can_be_in_a_code() -> None:
    made = encode_adapter(codec(), wide_adapter(), {}, limits=Limits(max_error=math.sqrt(1e-7)))
    assert int(codec().open(made.data).head.kept.max()) > 255


def test_a_known_initial_a_of_rank_300_makes_its_code_smaller() -> None:
    adapter = wide_adapter()
    initial = initial_under(adapter, 3)
    assert initial is not None
    assert [module.shape.rank for module in initial.modules] == [RANK, RANK]
    without, known = (
        encode_adapter(codec(), adapter, {}, which, limits=Limits(max_error=math.sqrt(0.05))).data
        for which in (None, initial)
    )
    assert len(known) < len(without)


def config(slots: int) -> GeneratorConfig:
    return GeneratorConfig("base", (ModuleKind("layers.{}.q", 5000, 5000),), 2, slots, 0, 0.1)


@pytest.mark.parametrize(("slots", "size"), [(1, 1), (254, 1), (255, 2), (MAX_SLOTS, 2)])
def test_numbers_of_slots_take_two_bytes_only_where_one_is_too_small(slots: int, size: int) -> None:
    assert config(slots).count_bytes == size


def test_a_generator_of_more_slots_than_a_rank_may_have_is_refused() -> None:
    with pytest.raises(GeneratorError, match="too many rank slots"):
        config(MAX_SLOTS + 1)


def test_where_an_initial_a_of_the_largest_rank_was_drawn_comes_back_from_its_bytes() -> None:
    initial = InitialA(7, (InitialModule(9, ModuleShape("layers.1.q", MAX_SLOTS, 5000, 5000)),))
    wide = config(MAX_SLOTS)
    assert initial_from_bytes(initial_to_bytes(initial, wide), wide) == initial


def test_a_code_of_more_slots_than_a_module_has_singular_values_is_refused() -> None:
    narrow = trained(wide_adapter(rank=6, width=4))
    data = encode_adapter(narrow, wide_adapter(rank=6, width=4), {}).data
    code = ParsedCode.from_bytes(data, narrow.config)
    code.head.kept[code.head.kept != ABSENT] = 5
    assert np.all(code.head.kept <= narrow.config.slots)
    with pytest.raises(CodeError, match="range"):
        ParsedCode.from_bytes(code.to_bytes(narrow.config), narrow.config)


@pytest.mark.slow
def test_rank_1000_on_four_modules_of_width_256_is_trained_on_and_round_trips() -> None:
    adapter = wide_adapter(rank=1000, width=256, layers=2)
    wide = trained(adapter, steps=20)
    made = encode_adapter(wide, adapter, {})
    assert squared_error(adapter, wide.decode(made.data)) == pytest.approx(made.squared_error, abs=1e-6)
    assert made.squared_error <= wide.config.tolerance
