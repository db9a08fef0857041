"""Ways to take new tasks into a generator whose earlier tasks are not looked at.

    new tasks ─┬─ covered by an epoch ─┬─ encoded as it is ───────────────────────────┬─▶ fewer bytes
               │                       └─ decoder tuned on them: an epoch of differences ┘
               └─ with modules or ranks that none has ──▶ a small network of their own: one more epoch

An epoch is only ever appended, so every code made before decodes to the same adapter, whatever is chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import torch

from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.store_fleet import StoreFleet
from icm_cli.workflows.training import fit_all
from icm_cli.workflows.training_run import TrainRequest, measured_sensitivity
from icmlora.errors import GeneratorError
from icmlora.generator.code import generator_of
from icmlora.generator.codec import Codec
from icmlora.generator.config import config_for
from icmlora.generator.differences import differences_to_words
from icmlora.generator.epochs import append_epoch
from icmlora.generator.generator_file import generator_to_bytes
from icmlora.generator.lineage import Lineage
from icmlora.generator.step_search import Encoded
from icmlora.layout import ModuleShape
from icmlora.training.config import TrainConfig, steps_for
from icmlora.training.start import fresh_network, tunable_network
from icmlora.training.state import TrainState, new_state

if TYPE_CHECKING:
    from registry.store import Store

_TUNING_STEPS = 50
"""Of the decoder, per new task."""
_TUNING_RATE = 2e-3
_COARSENESS = 2.0
"""What the changes of tuning are rounded to, in terms of their root mean square."""


class Stopped(Exception):
    """The user stopped; nothing was written."""


@dataclass(frozen=True)
class Candidate:
    """A generator file, with codes of new tasks by name: each names an epoch of the file."""

    data: bytes
    codes: Mapping[str, Encoded] = field(default_factory=dict)

    def cost(self, before: bytes) -> int:
        """Return the bytes that its codes take, and its file beyond an earlier one."""
        return len(self.data) - len(before) + sum(len(code.data) for code in self.codes.values())


class Growth:
    """Takes new tasks in; reads no other task.

    Attributes:
        steps: How many were trained.
        left_out: Tasks that no code can have, with the reason.

    Args:
        store: The open store.
        fleet: The new tasks' final adapters.
        request: What was asked for.
        tolerance: What their codes may lose.
        device: Where to train.
        stop: Looked at between steps and between tasks.
    """

    def __init__(
        self,
        store: Store,
        fleet: StoreFleet,
        request: TrainRequest,
        tolerance: float,
        device: torch.device,
        stop: StopFlag,
    ) -> None:
        self._store, self._fleet, self._request = store, fleet, request
        self._tolerance, self._device, self._stop = tolerance, device, stop
        self.steps = 0
        self.left_out = dict(fleet.left_out)

    def kept(self, data: bytes) -> Generator[Event, None, Candidate]:
        """Encode the tasks that some epoch of a file covers, each under the one that gives the smallest code."""
        lineage, codes = Lineage(data), dict[str, Encoded]()
        for task, name in enumerate(self._fleet.names):
            epochs = lineage.covering([ModuleShape(*entry) for entry in self._fleet.final(task).layout])
            made = [self._encoded(lineage.codec(number), self._fleet, task) for number in epochs]
            found = [code for code in made if code is not None]
            if found:
                codes[name] = reduce(_smaller, found)
            yield Step(task + 1, self._fleet.tasks(), f"encoding {name}")
        return Candidate(data, codes)

    def tuned(self, kept: Candidate) -> Generator[Event, None, Candidate]:
        """Tune the decoder of the epoch that most codes of a candidate name, and encode their tasks under it.

        A task keeps the code that it has where that is not larger. Nothing that reads adapters or vectors is tuned.
        """
        lineage, named = Lineage(kept.data), {name: generator_of(code.data) for name, code in kept.codes.items()}
        ((digest, _),) = Counter(named.values()).most_common(1)
        base = lineage.digests.index(digest)
        net = lineage.codec(base).generator.net
        fleet = StoreFleet(self._store, self._fleet.base_model, [name for name in named if named[name] == digest])
        steps = self._request.steps or _TUNING_STEPS * fleet.tasks()
        rate = self._request.learning_rate or _TUNING_RATE
        options = TrainConfig(steps=steps, learning_rate=rate, weight_decay=0.0, seed=self._request.seed)
        state = yield from self._fit(fleet, new_state(tunable_network(net).to(self._device), options))
        words = differences_to_words(net.state_dict(), state.net.state_dict(), _COARSENESS)
        found = yield from self._under_last(append_epoch(kept.data, words, base), fleet)
        smaller = {name: _smaller(kept.codes[name], code) for name, code in found.codes.items()}
        return Candidate(found.data, {**kept.codes, **smaller})

    def fresh(self, data: bytes, names: list[str]) -> Generator[Event, None, Candidate]:
        """Fit a network of their own to some tasks, and encode them under it.

        It reads no task vectors: from so few tasks nobody learns how adapters follow from them.
        """
        fleet = StoreFleet(self._store, self._fleet.base_model, names)
        config = config_for(
            fleet.base_model,
            ([ModuleShape(*entry) for entry in row.layout] for row in fleet.rows()),
            tasks=fleet.tasks(),
            condition_size=0,
            quality=1,
            tolerance=self._tolerance,
        )
        rate = {} if self._request.learning_rate is None else {"learning_rate": self._request.learning_rate}
        options = TrainConfig(steps=self._request.steps or steps_for(len(names)), seed=self._request.seed, **rate)
        sensitivity = measured_sensitivity(self._store, fleet, config, None, self._device)
        net = fresh_network(config, fleet, self._request.seed, sensitivity)
        state = yield from self._fit(fleet, new_state(net.to(self._device), options))
        return (yield from self._under_last(append_epoch(data, generator_to_bytes(state.net), None), fleet))

    def _fit(self, fleet: StoreFleet, state: TrainState) -> Generator[Event, None, TrainState]:
        yield from fit_all(fleet, state, self._stop, lambda: None)
        self._look()
        self.steps += state.step
        return state

    def _under_last(self, data: bytes, fleet: StoreFleet) -> Generator[Event, None, Candidate]:
        lineage, codes = Lineage(data), dict[str, Encoded]()
        codec = lineage.codec(len(lineage.digests) - 1)
        for task, name in enumerate(fleet.names):
            if (code := self._encoded(codec, fleet, task)) is not None:
                codes[name] = code
            yield Step(task + 1, fleet.tasks(), f"encoding {name}")
        return Candidate(data, codes)

    def _encoded(self, codec: Codec, fleet: StoreFleet, task: int) -> Encoded | None:
        """Return the code of a task, or None where there is none; then the task is left out."""
        self._look()
        vectors = fleet.mean_vectors(task)
        try:
            return codec.encode(fleet.load(task, None), vectors, fleet.initial(task), tolerance=self._tolerance)
        except GeneratorError as error:
            self.left_out[fleet.names[task]] = str(error)
            return None

    def _look(self) -> None:
        if self._stop.requested:
            raise Stopped


def _smaller(earlier: Encoded, later: Encoded) -> Encoded:
    """Return the smaller of two codes; of equal ones that of the earlier epoch."""
    return later if len(later.data) < len(earlier.data) else earlier
