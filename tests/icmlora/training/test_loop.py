"""The training loop: fewer bits, and the same run however often it is stopped."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random

import pytest
import torch

from icmlora.adapter.model import Adapter
from icmlora.errors import AdapterRefused, GeneratorError
from icmlora.generator.config import config_for
from icmlora.training import loop
from icmlora.training.config import TrainConfig
from icmlora.training.initialisation import fresh_network
from icmlora.training.loop import fit, some_modules
from icmlora.training.state import TrainState, new_state, state_from_bytes
from tests.icmlora.peft_made import peft_fleet
from tests.icmlora.small_fleet import (
    BASE,
    HIDDEN,
    MemoryAdapterSource,
    begin,
    make_adapter,
    make_vectors,
    mixed_fleet,
    with_factors,
)

CPU = torch.device("cpu")


def run(state: TrainState, fleet: MemoryAdapterSource) -> list[float]:
    return [at.bits for at in fit(state, fleet)]


@pytest.mark.one_case
@pytest.mark.parametrize("sets", [0, 2])
def test_training_lowers_the_bits_of_a_fleet_of_mixed_ranks_and_kinds(sets: int) -> None:
    bits = run(begin(mixed_fleet(sets), 60), mixed_fleet(sets))
    assert sum(bits[-15:]) < 0.9 * sum(bits[:15])


@pytest.mark.slow
def test_initial_as_that_are_known_lower_the_bits() -> None:
    known, plain = (run(begin(fleet, 30), fleet) for fleet in (peft_fleet(), replace(peft_fleet(), initials=())))
    assert sum(known) < 0.8 * sum(plain)
    assert all(left < right for left, right in zip(known, plain, strict=True))


def test_a_run_with_initial_as_that_is_resumed_equals_the_uninterrupted_one() -> None:
    wanted = run(begin(peft_fleet(), 8), peft_fleet())
    stopped = begin(peft_fleet(), 8)
    before = [at.bits for at in islice(fit(stopped, peft_fleet()), 3)]
    resumed = state_from_bytes(stopped.network_bytes(), stopped.optimizer_bytes(), CPU)
    assert before + run(resumed, peft_fleet()) == wanted


def test_each_step_is_reported_once_with_its_parts() -> None:
    steps = list(fit(begin(mixed_fleet(), 5), mixed_fleet()))
    assert [at.step for at in steps] == [1, 2, 3, 4, 5]
    assert all(at.steps == 5 and 0 <= at.task < 3 for at in steps)
    assert all(0 < at.latent_bits + at.norm_bits + at.token_bits <= at.bits for at in steps)


@pytest.mark.one_case
@pytest.mark.parametrize("stop", [0, 1, 7, 11, 12])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(stop: int) -> None:
    whole = begin(mixed_fleet(), 12)
    wanted = run(whole, mixed_fleet())
    stopped = begin(mixed_fleet(), 12)
    before = [at.bits for at in islice(fit(stopped, mixed_fleet()), stop)]
    torch.manual_seed(99)  # nothing may depend on the process's own random numbers
    resumed = state_from_bytes(stopped.network_bytes(), stopped.optimizer_bytes(), CPU)
    assert before + run(resumed, mixed_fleet()) == wanted
    assert resumed.network_bytes() == whole.network_bytes()
    assert resumed.optimizer_bytes() == whole.optimizer_bytes()


def test_another_seed_is_another_run() -> None:
    assert run(begin(mixed_fleet(), 4, seed=1), mixed_fleet()) != run(begin(mixed_fleet(), 4), mixed_fleet())


def test_a_finished_run_does_nothing() -> None:
    state = begin(mixed_fleet(), 2)
    run(state, mixed_fleet())
    assert run(state, mixed_fleet()) == []


@dataclass(frozen=True)
class Watched(MemoryAdapterSource):
    """Remembers what was read."""

    seen: list[int | None] = field(default_factory=list)

    def load(self, task: int, checkpoint: int | None) -> Adapter:
        self.seen.append(checkpoint)
        return super().load(task, checkpoint)


@pytest.fixture
def no_token_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read an adapter at every step."""
    monkeypatch.setattr("icmlora.training.loop._CACHE_BYTES", 0)


@pytest.mark.usefixtures("no_token_cache")
def test_checkpoints_are_seen_as_often_as_was_asked() -> None:
    fleet = Watched([[make_adapter(0), make_adapter(0, strength=0.05)]])
    state = begin(fleet, 24, final_share=0.25)
    fleet.seen.clear()
    run(state, fleet)
    assert 2 <= fleet.seen.count(None) <= 11


def test_each_adapter_is_read_once_as_long_as_its_tokens_fit_in_memory() -> None:
    fleet = Watched([[make_adapter(0), make_adapter(0, strength=0.05)], [make_adapter(1)]])
    state = begin(fleet, 24)
    fleet.seen.clear()
    run(state, fleet)
    assert len(fleet.seen) == 3


def test_tokens_that_do_not_fit_in_memory_are_made_again_and_the_run_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = run(begin(mixed_fleet(), 12), mixed_fleet())
    one_adapter = sum(shape.parameters for shape in mixed_fleet().adapters[0][0].layout) * 4
    for limit in (0, one_adapter):
        monkeypatch.setattr("icmlora.training.loop._CACHE_BYTES", limit)
        fleet = Watched(mixed_fleet().adapters, mixed_fleet().sets)
        state = begin(fleet, 12)
        fleet.seen.clear()
        assert run(state, fleet) == wanted
        assert len(fleet.seen) > 3


def test_without_checkpoints_every_step_sees_a_final_adapter() -> None:
    fleet = Watched([[make_adapter(0)], [make_adapter(1)]])
    run(begin(fleet, 6), fleet)
    assert set(fleet.seen) == {None}


@pytest.mark.parametrize(("dropout", "changes"), [(1.0, False), (0.0, True)])
def test_the_adapted_view_is_dropped_as_often_as_was_asked(dropout: float, changes: bool) -> None:
    state = begin(mixed_fleet(), 6, view_dropout=dropout)
    before = state.net.condition.views[0].weight.detach().clone()
    run(state, mixed_fleet())
    moments = state.optimizer.state[state.net.condition.views[0].weight]
    assert bool(moments) is changes
    assert torch.equal(before, state.net.condition.views[0].weight) is not changes


def test_an_adapter_of_zeros_does_not_spoil_the_network() -> None:
    fleet = MemoryAdapterSource([[with_factors(make_adapter(0), b=0.0)], [make_adapter(1)]])
    state = begin(fleet, 8)
    assert all(torch.isfinite(torch.tensor(run(state, fleet))))
    assert all(torch.isfinite(parameter).all() for parameter in state.net.parameters())


def test_an_adapter_too_large_for_float32_ends_training_by_name() -> None:
    fleet = MemoryAdapterSource([[with_factors(make_adapter(0), b=1e20)]])
    with pytest.raises(AdapterRefused, match=r"q_proj has the norm .*, too large"):
        run(begin(fleet, 1), fleet)


def test_a_single_adapter_is_a_fleet() -> None:
    fleet = MemoryAdapterSource([[make_adapter(0)]])
    bits = run(begin(fleet, 30), fleet)
    assert bits[-1] < bits[0]


def test_a_fleet_that_the_network_does_not_cover_is_refused() -> None:
    fleet = MemoryAdapterSource([[make_adapter(0, rank=4)]])
    config = config_for(BASE, [make_adapter(0).layout], tasks=64, condition_size=HIDDEN, quality=5)
    small = MemoryAdapterSource([[make_adapter(0)]])
    with pytest.raises(GeneratorError, match="does not cover"):
        run(new_state(fresh_network(config, small, 0), TrainConfig(steps=1)), fleet)


def test_both_support_sets_are_seen() -> None:
    seen: set[int] = set()

    class Sets(MemoryAdapterSource):
        def vectors(self, task: int, support_set: int) -> dict[str, torch.Tensor]:
            seen.add(support_set)
            return make_vectors(task, support_set)

    fleet = Sets([[make_adapter(0)]])
    state = begin(fleet, 20)
    seen.clear()
    run(state, fleet)
    assert seen == {0, 1}


def test_a_step_sees_all_of_a_small_adapter_and_some_modules_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(0)
    assert some_modules(adapter.modules, Random(0)) == adapter.modules
    sizes = [module.shape.parameters for module in adapter.modules]
    monkeypatch.setattr(loop, "STEP_PARAMETERS", sum(sizes) // 2)
    seen = [some_modules(adapter.modules, Random(seed)) for seed in range(40)]
    assert all(0 < sum(module.shape.parameters for module in some) <= sum(sizes) // 2 for some in seen)
    assert {module.name for some in seen for module in some} == {module.name for module in adapter.modules}


def test_a_module_larger_than_a_step_should_see_is_seen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEP_PARAMETERS", 1)
    assert len(some_modules(make_adapter(0).modules, Random(0))) == 1


@pytest.mark.slow
def test_parts_of_large_adapters_train_a_network_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = mixed_fleet(0)
    whole, part = begin(fleet, 60), begin(fleet, 60)
    run(whole, fleet)
    monkeypatch.setattr(loop, "STEP_PARAMETERS", 100)
    run(part, fleet)
    monkeypatch.undo()
    sizes = [sum(at.bits for at in fit(replace(state, step=0), fleet)) for state in (whole, part)]
    assert sizes[1] < 1.1 * sizes[0]


def test_an_adapter_has_its_turn_for_several_steps() -> None:
    fleet = mixed_fleet(0)
    state = new_state(begin(fleet, 1).net, TrainConfig(steps=24, turn=4))
    tasks = [at.task for at in fit(state, fleet)]
    assert all(len(set(tasks[start : start + 4])) == 1 for start in range(0, 24, 4))
    assert len(set(tasks)) > 1


def test_a_run_with_turns_that_is_resumed_equals_the_uninterrupted_one() -> None:
    fleet = mixed_fleet(0)
    config = TrainConfig(steps=10, turn=4)
    wanted = run(new_state(begin(fleet, 1).net, config), fleet)
    stopped = new_state(begin(fleet, 1).net, config)
    before = [at.bits for at in islice(fit(stopped, fleet), 6)]
    assert before + run(state_from_bytes(stopped.network_bytes(), stopped.optimizer_bytes(), CPU), fleet) == wanted


def test_a_step_sees_half_of_the_layers_of_each_kind_and_in_time_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_WHOLE", 0)
    read = loop._Adapters(mixed_fleet(), begin(mixed_fleet(), 1).net)
    seen: dict[int, set[int]] = {}
    for seed in range(20):
        for group in read(0, None, Random(seed)).tokens:
            layers = set(group.layer.tolist())
            assert len(layers) == 1  # of two
            seen.setdefault(group.kind, set()).update(layers)
    assert len(seen) == 2
    assert all(layers == {0, 1} for layers in seen.values())


def test_a_step_sees_a_very_small_adapter_whole() -> None:
    read = loop._Adapters(mixed_fleet(), begin(mixed_fleet(), 1).net)
    assert read(0, None, Random(0)) is read(0, None, Random(1))


def test_an_adapter_that_cannot_be_read_ends_the_run_with_its_error() -> None:
    class Broken(MemoryAdapterSource):
        def load(self, task: int, checkpoint: int | None) -> Adapter:
            raise AdapterRefused("gone", kind="missing")

    state = begin(mixed_fleet(), 5)
    with pytest.raises(AdapterRefused, match="gone"):
        next(fit(state, Broken(mixed_fleet().adapters)))
