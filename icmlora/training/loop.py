"""The training loop: one adapter a step, each step drawn from its own stream of random numbers.

A step sees half of an adapter's modules, drawn anew each time: the generator is as good, and a step takes two thirds of
the time. Of a large adapter it sees still fewer, so a step takes as long for 40 million parameters as for 1 million.
Several steps in a row then see the same adapter, because reading it takes longer than a step.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.cvae import CVAE
from icmlora.generator.decoder import one_thread
from icmlora.generator.initial_a.subspace import initial_subspace
from icmlora.generator.objective import Bits, Prepared, adapter_bits, prepare
from icmlora.generator.tokens import refuse_overflow, tokenize
from icmlora.io.threads import ahead
from icmlora.training.config import STEP_PARAMETERS
from icmlora.training.ranks import ALONE, Ranks
from icmlora.training.source import AdapterSource
from icmlora.training.state import TrainState

_GRADIENT_LIMIT = 1.0
_SUBSPACES = 4
# Of adapters that are kept for later steps. They never change, and reading one takes half as long as a step.
_CACHE_BYTES = 512 << 20
_WHOLE = 1 << 17  # parameters of an adapter that a step sees whole: fewer of them would not make it faster
_KEPT = 8  # bytes for each parameter: its token, and as much again for an initial A


@dataclass(frozen=True)
class TrainStep:
    """What one step measured, in bits per parameter of the adapter it saw; with several processes, their means."""

    step: int  # steps done, counted from 1; a step of n processes counts n
    steps: int
    task: int
    bits: float  # the loss: the sum of the parts below and of what only trains the prior
    latent_bits: float
    norm_bits: float
    token_bits: float
    learning_rate: float


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one step sees."""

    task: int
    adapter: Prepared
    vectors: dict[str, torch.Tensor]  # by view, each (hidden,)
    noise: torch.Generator


def fit(state: TrainState, fleet: AdapterSource, ranks: Ranks = ALONE) -> Iterator[TrainStep]:
    """Train until the configured number of steps is done; yields one record per step."""
    # The caller saves `state` whenever it likes between steps.
    device = next(state.net.parameters()).device
    adapters = _Adapters(fleet, state.net, device)

    def seen(step: int) -> _Seen:
        number = min(step + ranks.rank, state.config.steps - 1)
        draw = random.Random(f"{state.config.seed}/{number}")  # noqa: S311 - training noise, not secrets
        noise = torch.Generator().manual_seed(draw.getrandbits(62))
        task, checkpoint = _turn(state, fleet, number)
        vectors = {view: vector.to(device) for view, vector in _vectors(state, fleet, task, draw).items()}
        return _Seen(task, adapters(task, checkpoint, draw), vectors, noise)

    # Operations of a step are too small to share them among threads: two took up to twice as long. But while one step
    # is computed, another thread reads what the next one sees.
    with one_thread():
        for now in ahead(map(seen, range(state.step, state.config.steps, ranks.count))):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                bits = adapter_bits(state.net, now.adapter, now.vectors, now.noise)
            yield _advance(state, bits, now.adapter.parameters, now.task, ranks)


def _turn(state: TrainState, fleet: AdapterSource, number: int) -> tuple[int, int | None]:
    """Draw the task whose turn it is, and one of its adapters."""
    draw = random.Random(f"{state.config.seed}/turn/{number // state.config.turn}")  # noqa: S311 - as above
    task, checkpoint = draw.randrange(fleet.tasks()), None
    if fleet.checkpoints(task) and draw.random() >= state.config.final_share:
        checkpoint = draw.randrange(fleet.checkpoints(task))
    return task, checkpoint


def _vectors(state: TrainState, fleet: AdapterSource, task: int, draw: random.Random) -> dict[str, torch.Tensor]:
    """Draw one of the support sets of a task, perhaps without one view."""
    vectors: dict[str, torch.Tensor] = {}
    if fleet.support_sets(task):
        vectors = dict(fleet.vectors(task, draw.randrange(fleet.support_sets(task))))
    if draw.random() < state.config.view_dropout:
        vectors.pop("adapted", None)
    return vectors


class _Adapters:
    """Reads adapters as tokens on the network's device, and keeps the latest ones."""

    def __init__(self, fleet: AdapterSource, net: CVAE, device: torch.device) -> None:
        self._fleet, self._config, self._device = fleet, net.config, device
        on_cpu = net.sensitivity.to(torch.device("cpu"))
        self._sensitivity, self._weights = on_cpu, on_cpu.to(device)
        # Tasks often share an initial A, and drawing it takes as long as a part of a step.
        self._subspace = lru_cache(_SUBSPACES)(lambda initial: initial_subspace(initial, net.config, on_cpu).to(device))
        self._cache: OrderedDict[tuple[int, int | None], Prepared] = OrderedDict()
        self._bytes = 0

    def __call__(self, task: int, checkpoint: int | None, draw: random.Random) -> Prepared:
        """Return some modules of an adapter, or a very small one whole."""
        key = task, checkpoint
        found = self._cache.pop(key, None)
        if found is None:
            adapter = self._fleet.load(task, checkpoint)
            modules = some_modules(adapter.modules, draw)
            found = self._prepare(task, replace(adapter, modules=modules))
            if len(modules) < len(adapter.modules):  # the next step sees others
                return found
            self._bytes += found.parameters * _KEPT
        self._cache[key] = found  # last: the first is dropped first
        while self._bytes > _CACHE_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= dropped.parameters * _KEPT
        return found if found.parameters <= _WHOLE else _half(found, draw)

    def _prepare(self, task: int, adapter: Adapter) -> Prepared:
        tokens = tokenize(adapter, self._config, self._sensitivity)
        refuse_overflow(tokens, self._config)
        on_device = tuple(group.to(self._device) for group in tokens)
        subspace = self._subspace(self._fleet.initial(task))
        return prepare(on_device, subspace, self._weights, self._config.tolerance)


def _half(adapter: Prepared, draw: random.Random) -> Prepared:
    """Draw half of the layers of each kind of modules."""
    groups = []
    for group in adapter.tokens:
        layers: list[int] = torch.unique(group.layer).tolist()
        chosen = torch.tensor(draw.sample(layers, (len(layers) + 1) // 2), device=group.layer.device)
        groups.append(group[torch.isin(group.layer, chosen)])
    return replace(adapter, tokens=tuple(groups))


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


def _advance(state: TrainState, bits: Bits, parameters: int, task: int, ranks: Ranks) -> TrainStep:
    rate = state.config.rate_at(state.step) * ranks.rate_factor
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    (bits.total / parameters).backward()  # type: ignore[no-untyped-call]
    parts = [float(part.detach()) / parameters for part in (bits.total, bits.latent, bits.norms, bits.tokens)]
    draws, (total, latent, norms, tokens) = ranks.average(
        state.net.parameters(), parts, state.config.steps - state.step
    )
    torch.nn.utils.clip_grad_norm_(state.net.parameters(), _GRADIENT_LIMIT, foreach=True)
    state.optimizer.step()
    state.step += draws
    return TrainStep(
        step=state.step,
        steps=state.config.steps,
        task=task,
        bits=total,
        latent_bits=latent,
        norm_bits=norms,
        token_bits=tokens,
        learning_rate=rate,
    )
