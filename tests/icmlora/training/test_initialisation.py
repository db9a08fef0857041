"""Where training begins: the fleet's statistics, and what a present generator already knows."""

from __future__ import annotations

import pytest
import torch

from icmlora.adapter.model import Adapter
from icmlora.generator.network.cvae import CVAE
from icmlora.generator.network.tokenizing import tokenize
from icmlora.training import initialisation
from icmlora.training.config import TrainConfig
from icmlora.training.initialisation import fresh_network, grown_network
from icmlora.training.loop import fit
from icmlora.training.state import new_state
from tests.icmlora.small_fleet import HIDDEN, MemoryAdapterSource, codec, make_adapter, make_vectors, mixed_fleet

LARGER = MemoryAdapterSource([*mixed_fleet().adapters, [make_adapter(7, rank=6, kinds=("v_proj", "down_proj"))]])


def first_bits(net: CVAE, fleet: MemoryAdapterSource) -> float:
    return sum(at.bits for at in fit(new_state(net, TrainConfig(steps=12, learning_rate=1e-9)), fleet))


def grown() -> CVAE:
    present = codec().net
    return grown_network(LARGER.config(previous=present.config), present, LARGER, 5)


def test_the_same_seed_makes_the_same_network() -> None:
    nets = [fresh_network(mixed_fleet().config(), mixed_fleet(), seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert not torch.equal(nets[0]["layer.weight"], nets[2]["layer.weight"])


def test_norm_tables_are_the_mean_over_final_adapters() -> None:
    fleet = MemoryAdapterSource([[make_adapter(0), make_adapter(9)], [make_adapter(1)]])
    net = fresh_network(fleet.config(), fleet, 0)
    groups = [tokenize(fleet.load(task, None), net.config, net.sensitivity)[0] for task in range(2)]
    wanted = torch.stack([group.norm.log2() for group in groups]).mean(0)
    torch.testing.assert_close(net.norm_mean[0].flatten(), wanted)


def test_of_a_large_fleet_tasks_at_even_distances_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Watched(MemoryAdapterSource):
        def load(self, task: int, checkpoint: int | None) -> Adapter:
            read.append(task)
            return super().load(task, checkpoint)

    fleet = Watched([[make_adapter(number)] for number in range(7)], sets=0)
    for most, wanted in ((3, [0, 3, 6]), (4, [0, 2, 4, 6]), (7, list(range(7))), (100, list(range(7)))):
        monkeypatch.setattr(initialisation, "_SAMPLE", most)
        fresh_network(fleet.config(), fleet, 0)
        assert read == wanted
        read.clear()


def test_a_place_that_no_final_adapter_has_gets_a_norm_like_its_neighbours() -> None:
    # down_proj has one slot in this fleet, the table four: 2^0 would be far above every adapter's norm.
    net = fresh_network(mixed_fleet().config(), mixed_fleet(), 0)
    down = next(number for number, kind in enumerate(net.config.kinds) if "down" in kind.pattern)
    torch.testing.assert_close(net.norm_mean[down, :, 1:], net.norm_mean[down, :, :1].mean().expand(2, 3))


def test_a_kind_that_only_checkpoints_have_gets_the_fleets_norm() -> None:
    fleet = MemoryAdapterSource([[make_adapter(0), make_adapter(0, kinds=("down_proj",))]])
    net = fresh_network(fleet.config(), fleet, 0)
    down = next(number for number, kind in enumerate(net.config.kinds) if "down" in kind.pattern)
    seen = [number for number in range(3) if number != down]
    assert net.norm_mean[seen].min() <= net.norm_mean[down].min() == net.norm_mean[down].max()
    assert net.norm_mean[down].max() <= net.norm_mean[seen].max()


def test_one_adapter_alone_gives_the_default_spread() -> None:
    fleet = MemoryAdapterSource([[make_adapter(0, layers=(0,))]])
    net = fresh_network(fleet.config(), fleet, 0)
    torch.testing.assert_close(net.norm_spread, torch.full_like(net.norm_spread, -1.0))


def test_task_vectors_are_standardised_over_the_fleet() -> None:
    net = fresh_network(mixed_fleet().config(), mixed_fleet(), 0)
    vectors = torch.stack([make_vectors(task, number)["context"] for task in range(3) for number in range(2)])
    standard = vectors * torch.exp2(-net.condition.log_scale[1]) - net.condition.shift[1]
    torch.testing.assert_close(standard.mean(0), torch.zeros(HIDDEN), rtol=0, atol=1 / 15)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(HIDDEN), rtol=0, atol=1 / 20)


def test_a_single_vector_does_not_make_the_scale_zero() -> None:
    fleet = MemoryAdapterSource([[make_adapter(0)]], sets=1)
    assert torch.equal(fresh_network(fleet.config(), fleet, 0).condition.log_scale, torch.zeros(2, HIDDEN))


def test_a_fleet_without_vectors_has_a_network_without_their_layers() -> None:
    net = fresh_network(mixed_fleet(0).config(), mixed_fleet(0), 0)
    assert not any(name.startswith(("condition.views", "condition.shift")) for name in net.state_dict())


def test_a_network_grown_to_the_same_fleet_is_the_present_one() -> None:
    present = codec().net
    net = grown_network(mixed_fleet().config(previous=present.config), present, mixed_fleet(), 5)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in present.state_dict().items())


@pytest.mark.parametrize("sets", [0, 2])
def test_a_grown_network_predicts_for_old_tasks_what_it_did(sets: int) -> None:
    present = codec(sets).net
    fleet = MemoryAdapterSource(LARGER.adapters, sets)
    net = grown_network(fleet.config(previous=present.config), present, fleet, 5)
    assert net.config.slots > present.config.slots
    left, right = (first_bits(network, mixed_fleet(sets)) for network in (net, present))
    assert left == pytest.approx(right, rel=1e-5)


def test_new_slots_of_a_grown_network_start_at_the_fleets_statistics() -> None:
    net = grown()
    fresh = fresh_network(LARGER.config(), LARGER, 5, net.sensitivity)
    torch.testing.assert_close(net.norm_mean[:, :, 4:], fresh.norm_mean[:, :, 4:])


def test_a_kind_between_two_known_ones_moves_them_without_mixing_them() -> None:
    old = MemoryAdapterSource([[make_adapter(0, kinds=("q_proj", "down_proj"))]])
    new = MemoryAdapterSource([*old.adapters, [make_adapter(1, kinds=("q_proj", "v_proj", "down_proj"))]])
    present = fresh_network(old.config(), old, 0)
    with torch.no_grad():
        for number, direction in enumerate(present.directions):
            direction.fill_(number + 1.0)
    net = grown_network(new.config(previous=present.config), present, new, 1)
    for number, kind in enumerate(old.config().kinds):
        place = net.config.kinds.index(kind)
        for side in (0, 1):
            assert torch.equal(net.directions[2 * place + side], present.directions[2 * number + side])
            assert torch.equal(net.factor.weight[2 * place + side], present.factor.weight[2 * number + side])
        assert torch.equal(net.encoder.sketch_in[place], present.encoder.sketch_in[number])
        assert torch.equal(net.gain.weight[place], present.gain.weight[number])


def test_vectors_that_come_later_start_a_condition_of_their_own() -> None:
    present = codec(sets=0).net
    fleet = mixed_fleet(sets=2)
    net = grown_network(fleet.config(previous=present.config), present, fleet, 5)
    assert net.config.condition_size == HIDDEN
    assert torch.equal(net.norm_mean, present.norm_mean)
    assert float(net.condition.shift.abs().max()) > 0
