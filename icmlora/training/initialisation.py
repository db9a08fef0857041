"""Where training begins: a fresh network set to the fleet's statistics, or an adapted copy of an existing one."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from icmlora.generator.config import GeneratorConfig
from icmlora.generator.network.cvae import CVAE, VIEWS, ConditionNet
from icmlora.generator.network.tokenizing import tokenize
from icmlora.generator.sensitivity import Sensitivity, even
from icmlora.io.devices import seed_everything
from icmlora.training.source import AdapterSource

# Spread of a log2 norm seen in only one adapter.
_DEFAULT_SPREAD = 0.5
# Smallest spread of a task vector's component, relative to its mean.
_MIN_SPREAD = 2.0**-12
# Tasks sampled for the statistics: reading an adapter of 84 MB takes seconds, and more tasks change the means by less
# than the grid of eighths that they are rounded to.
_SAMPLE = 1_000
# Name prefixes of the encoding parameters, which tuning leaves alone.
_READERS = ("condition.", "encoder.", "prior.")


def fresh_network(
    config: GeneratorConfig, fleet: AdapterSource, seed: int, sensitivity: Sensitivity | None = None
) -> CVAE:
    """Make a network with the norm tables and vector standardisation of the fleet's final adapters (1,000 at most)."""
    seed_everything(seed)
    net = CVAE(config)
    net.sensitivity = sensitivity or even(config)
    tasks = range(0, fleet.tasks(), -(-fleet.tasks() // _SAMPLE) or 1)  # evenly spaced, or all of a small fleet
    if len(net.condition.views):
        _standardise(net.condition, fleet, tasks)
    _set_norms(net, fleet, tasks)
    return net


def grown_network(
    config: GeneratorConfig, previous: CVAE, fleet: AdapterSource, seed: int, sensitivity: Sensitivity | None = None
) -> CVAE:
    """Make a network for a grown fleet, starting from the previous one where the two agree."""
    # New kinds, layers and slots start fresh. The standardisation of task vectors is kept, so the previous network's
    # condition keeps its meaning. The channel weights are kept too, unless there are new ones.
    old = previous.config
    places = torch.tensor([config.kinds.index(kind) for kind in old.kinds])
    if sensitivity is None:  # modules that the previous network lacks get even weights
        sensitivity, known = even(config), previous.sensitivity
        for number, place in enumerate(places.tolist()):
            sensitivity.inputs[place][: old.layers] = known.inputs[number]
            sensitivity.outputs[place][: old.layers] = known.outputs[number]
    net = fresh_network(config, fleet, seed, sensitivity)
    if old.condition_size == config.condition_size:
        net.condition.load_state_dict(previous.condition.state_dict())
    sides = torch.stack([2 * places, 2 * places + 1], dim=1).flatten()
    with torch.no_grad():
        for name in ("prior", "enter", "mix", "modulate", "leave"):
            getattr(net, name).load_state_dict(getattr(previous, name).state_dict())
        for name in ("enter", "leave"):
            getattr(net.encoder, name).load_state_dict(getattr(previous.encoder, name).state_dict())
        net.layer.weight[: old.layers] = previous.layer.weight
        net.slot.weight[: old.slots] = previous.slot.weight
        net.factor.weight[sides] = previous.factor.weight
        net.gain.weight[places], net.gain.bias[places] = previous.gain.weight, previous.gain.bias
        net.norm_mean[places, : old.layers, : old.slots] = previous.norm_mean
        net.norm_spread[places, : old.slots] = previous.norm_spread
        net.spread[places, :, : old.layers, : old.slots] = previous.spread
        for number, place in enumerate(places.tolist()):
            net.encoder.sketch_in[place].copy_(previous.encoder.sketch_in[number])
            net.encoder.sketch_out[place].copy_(previous.encoder.sketch_out[number])
            for side in (0, 1):
                net.directions[2 * place + side].copy_(previous.directions[2 * number + side])
    return net


def tunable_network(previous: CVAE) -> CVAE:
    """Copy a network and freeze all but its decoder: the parts that read adapters and vectors stay."""
    net = copy.deepcopy(previous)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(_READERS))
    return net


def _standardise(condition: ConditionNet, fleet: AdapterSource, tasks: Iterable[int]) -> None:
    count = torch.zeros(len(VIEWS), 1)
    total, squares = torch.zeros((2, *condition.shift.shape), dtype=torch.float64)
    for task in tasks:
        for support_set in range(fleet.support_sets(task)):
            for view, vector in fleet.vectors(task, support_set).items():
                row = VIEWS.index(view)
                count[row] += 1
                total[row] += vector
                squares[row] += vector.double().square()
    seen = count.clamp_min(1)
    variance = (squares / seen - (total / seen).square()).clamp_min(0)
    # A view of one vector has no spread; dividing by it would blow up the first new task.
    mean, scale = total / seen, torch.where(variance > 1e-12, variance.sqrt(), 1.0)
    # The shift mean / scale is stored as an integer of limited range.
    condition.standardise(mean.float(), torch.maximum(scale, mean.abs() * _MIN_SPREAD).float())


@torch.no_grad()
def _set_norms(net: CVAE, fleet: AdapterSource, tasks: Iterable[int]) -> None:
    # float64: the variance is the difference of two nearly equal numbers.
    count, total, squares = torch.zeros((3, *net.norm_mean.shape), dtype=torch.float64)
    for task in tasks:
        for group in tokenize(fleet.load(task, None), net.config, net.sensitivity):
            places = (torch.full_like(group.layer, group.kind), group.layer, group.slot)
            log = group.norm.double().log2()
            count.index_put_(places, torch.ones_like(log), accumulate=True)
            total.index_put_(places, log, accumulate=True)
            squares.index_put_(places, log.square(), accumulate=True)
    mean = total / count.clamp_min(1)
    variance = (squares / count.clamp_min(1) - mean.square()).clamp_min(0)
    pooled = (variance * count).sum(1) / count.sum(1).clamp_min(1)  # (K, S)
    # The guess is the mean of that slot over the kind's other layers, else the previous slot's, else the overall mean.
    # Without it the norm would be 2^0, far above what adapters have.
    seen, slots = count.sum(1), total.sum(1) / count.sum(1).clamp_min(1)  # (K, S)
    guess = (total.sum() / count.sum().clamp_min(1)).expand(len(slots))
    for slot in range(slots.shape[1]):
        guess = torch.where(seen[:, slot] > 0, slots[:, slot], guess)
        slots[:, slot] = guess
    net.norm_mean.copy_(torch.where(count > 0, total / count.clamp_min(1), slots[:, None, :]))
    net.norm_spread.copy_(torch.where(pooled > 1e-6, pooled.sqrt(), _DEFAULT_SPREAD).log2())
