"""The training loop: one adapter per step, or several on a card, each drawn from its own stream of random numbers.

    CPU    draw 0 ──step──▶ draw 1 ──step──▶ ...            one adapter per step
    card   draws 0 to 7 ──step──▶ draws 8 to 15 ──step──▶   a card takes as long for a small step as for a large one

Progress counts draws, so a stopped run can continue elsewhere. The mean of n gradients is less noisy than a single one,
so its step is longer by the root of n, as with several processes.

A draw sees half of an adapter's modules, a new half each time: the generator is as good, and a step takes two thirds of
the time. Of a large adapter it sees even fewer, so 40 million parameters take no longer than 1 million. Several draws
in a row then see the same adapter, because reading it takes longer than a step.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from icmlora.adapter.model import LoraModule
from icmlora.generator.initial_a.subspace import initial_subspace
from icmlora.generator.network.batch import Batch, PreparedAdapter, batched, prepare
from icmlora.generator.network.cvae import CVAE
from icmlora.generator.network.objective import Objective
from icmlora.generator.network.tokenizing import tokenize
from icmlora.generator.network.tokens import refuse_overflow
from icmlora.io.devices import moved
from icmlora.io.threads import ahead, one_thread
from icmlora.training.config import STACKED, STEP_PARAMETERS, TrainConfig
from icmlora.training.ranks import ALONE, Ranks
from icmlora.training.source import AdapterSource
from icmlora.training.state import TrainState

_GRADIENT_LIMIT = 1.0
_SUBSPACES = 4
# Cache of adapters for later steps. They never change, and reading one takes half as long as a step.
_CACHE_BYTES = 512 << 20
_WHOLE = 1 << 17  # parameters; a step sees a smaller adapter whole, as a part of it would not be faster
_KEPT = 8  # bytes cached per parameter: its token, and as much again for an initial A
_READ_EVERY = 10  # steps on a card between readings of the loss, as reading waits for the card
_PROBED = 8  # tasks whose adapters a probe measures


@dataclass(frozen=True)
class TrainStep:
    """Mean losses since the last record, in bits per parameter of the adapters seen."""

    step: int  # draws done, counted from 1
    steps: int
    task: int  # of the last draw
    bits: float  # the loss: the sum of the parts below and of a term that only trains the prior
    latent_bits: float
    norm_bits: float
    token_bits: float
    learning_rate: float


def fit(state: TrainState, fleet: AdapterSource, ranks: Ranks = ALONE) -> Iterator[TrainStep]:
    """Train for the configured number of draws; yields a record per step, on a card per ten steps."""
    # The caller may save `state` between any two records.
    net, config = state.net, state.config
    device = next(net.parameters()).device
    draws = draws_of(device)
    adapters, objective = _Adapters(fleet, net), Objective(net)

    def seen(step: int) -> tuple[int, Batch]:
        """Return the task of the last draw of a step, and its batch."""
        first, last = step + ranks.rank * draws, config.steps - 1
        numbers = range(first, min(first + draws, last + 1)) or [last]  # beyond the last, a draw counts for nothing
        tasks, drawn, vectors, noise = zip(*(_draw(config, fleet, adapters, number) for number in numbers), strict=True)
        return tasks[-1], moved(batched(net.config, drawn, vectors, noise), device)

    measured = list[torch.Tensor]()
    # A step's operations are too small to split among threads: two took up to twice as long. But another thread reads
    # the next step's input while one is computed.
    with one_thread():
        for task, batch in ahead(map(seen, range(state.step, config.steps, ranks.count * draws))):
            # Progress counts draws, and the mean of n gradients takes longer steps.
            rate = config.rate_at(state.step) * math.sqrt(ranks.count * draws)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            state.optimizer.zero_grad(set_to_none=True)
            bits = objective.bits(batch)
            parts = torch.stack([bits.total, bits.latent, bits.norms, bits.tokens])  # (4, B)
            means = (parts / batch.parameters).mean(1)  # in bits per parameter
            means[0].backward()  # type: ignore[no-untyped-call]
            left = config.steps - state.step
            done, means = ranks.average(net.parameters(), means.detach(), draws=draws, left=left)
            torch.nn.utils.clip_grad_norm_(net.parameters(), _GRADIENT_LIMIT)
            state.optimizer.step()
            state.step += done
            measured.append(means)
            if draws == 1 or len(measured) == _READ_EVERY or state.step == config.steps:
                loss, latent, norms, tokens = torch.stack(measured).mean(0).tolist()
                measured.clear()
                yield TrainStep(state.step, config.steps, task, loss, latent, norms, tokens, rate)


class Probe:
    """Measures the code length of the same adapters at any step, so a run's figures are comparable.

    Step losses are not: adapters differ by half in bits per parameter, and each step draws another one.
    """

    def __init__(self, state: TrainState, fleet: AdapterSource) -> None:
        device = next(state.net.parameters()).device
        adapters, tasks = _Adapters(fleet, state.net), fleet.tasks()
        self.count = min(tasks, _PROBED)
        self._objective = Objective(state.net)
        self._batches = list[Batch]()
        for task in (number * tasks // self.count for number in range(self.count)):
            vectors = fleet.vectors(task, 0) if fleet.support_sets(task) else {}
            adapter = adapters(task, None, random.Random(task))  # noqa: S311 - which modules, not secrets
            noise = torch.Generator().manual_seed(task)
            self._batches.append(moved(batched(state.net.config, [adapter], [vectors], [noise]), device))

    def bits(self) -> float:
        """Return the mean code length under the current network, in bits per parameter."""
        with one_thread(), torch.no_grad():
            each = [(self._objective.bits(batch), batch.parameters) for batch in self._batches]
            means = [((bits.latent + bits.norms + bits.tokens) / parameters).sum() for bits, parameters in each]
            return float(torch.stack(means).mean())


def draws_of(device: torch.device) -> int:
    """Return how many draws one step on a device sees."""
    return 1 if device.type == "cpu" else STACKED


def _draw(
    config: TrainConfig, fleet: AdapterSource, adapters: _Adapters, number: int
) -> tuple[int, PreparedAdapter, dict[str, torch.Tensor], torch.Generator]:
    """Return a draw's task, one of its adapters, vectors (hidden,) by view, and noise."""
    draw = random.Random(f"{config.seed}/{number}")  # noqa: S311 - training noise, not secrets
    noise = torch.Generator().manual_seed(draw.getrandbits(62))
    # All draws of a turn see the same adapter.
    turn = random.Random(f"{config.seed}/turn/{number // config.turn}")  # noqa: S311 - as above
    task, checkpoint = turn.randrange(fleet.tasks()), None
    if fleet.checkpoints(task) and turn.random() >= config.final_share:
        checkpoint = turn.randrange(fleet.checkpoints(task))
    sets = fleet.support_sets(task)
    vectors = dict(fleet.vectors(task, draw.randrange(sets))) if sets else {}
    if draw.random() < config.view_dropout:
        vectors.pop("adapted", None)
    return task, adapters(task, checkpoint, draw), vectors, noise


class _Adapters:
    """Reads adapters as tokens, and caches the latest."""

    def __init__(self, fleet: AdapterSource, net: CVAE) -> None:
        self._fleet, self._config = fleet, net.config
        self._sensitivity = sensitivity = net.sensitivity.to(torch.device("cpu"))
        # Tasks often share an initial A, and drawing it costs a part of a step's time.
        self._subspace = lru_cache(_SUBSPACES)(lambda initial: initial_subspace(initial, net.config, sensitivity))
        self._cache: OrderedDict[tuple[int, int | None], PreparedAdapter] = OrderedDict()
        self._bytes = 0

    def __call__(self, task: int, checkpoint: int | None, draw: random.Random) -> PreparedAdapter:
        """Return some modules of an adapter, or a very small one whole."""
        key = task, checkpoint
        found = self._cache.pop(key, None)
        if found is None:
            adapter = self._fleet.load(task, checkpoint)
            modules = some_modules(adapter.modules, draw)
            tokens = tokenize(replace(adapter, modules=modules), self._config, self._sensitivity)
            refuse_overflow(tokens, self._config)
            subspace = self._subspace(self._fleet.initial(task))
            found = prepare(tokens, subspace, self._sensitivity, self._config.tolerance)
            if len(modules) < len(adapter.modules):  # the next step sees others
                return found
            self._bytes += found.parameters * _KEPT
        self._cache[key] = found  # last: the first is evicted first
        while self._bytes > _CACHE_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= dropped.parameters * _KEPT
        if found.parameters <= _WHOLE:
            return found
        groups = []
        for group in found.tokens:  # half of the layers of each kind of module
            layers: list[int] = torch.unique(group.layer).tolist()
            chosen = torch.tensor(draw.sample(layers, (len(layers) + 1) // 2))
            groups.append(group[torch.isin(group.layer, chosen)])
        return replace(found, tokens=tuple(groups))


def some_modules(modules: Sequence[LoraModule], draw: random.Random) -> tuple[LoraModule, ...]:
    """Draw modules of an adapter, in its order: all of a small one, else as many as a step should see."""
    left, chosen = STEP_PARAMETERS, list[int]()
    if sum(module.shape.parameters for module in modules) <= left:
        return tuple(modules)
    for number in draw.sample(range(len(modules)), len(modules)):
        left -= modules[number].shape.parameters
        if left < 0 and chosen:
            break
        chosen.append(number)
    return tuple(modules[number] for number in sorted(chosen))
