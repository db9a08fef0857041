"""The ways to add new tasks to a generator. No earlier task is read.

    new tasks ─┬─ covered by a network of the file ─┬─ encode with it as it is ────────────────────────┬─▶ fewer bytes
               │                                    └─ tune its decoder on them: a version that holds ─┘
               │                                       only the differences
               └─ modules or ranks that no network covers ──▶ train a small network for them: one more version

Versions are only appended to the file, so every earlier code decodes to the same adapter as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from icmlora.fleet.context import Context
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.resources.adapter_source import StoreAdapterSource, layout_of
from icmlora.fleet.train.run import TrainingRun, TrainOptions, measured_sensitivity, schedule_of, train_network
from icmlora.generator.codec.code import generator_of
from icmlora.generator.codec.encoding import Encoded, encode_adapter
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.generator.codec.limits import Limits
from icmlora.generator.config import config_for
from icmlora.generator.files.file import append_version
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.generator.files.version_delta import differences_to_words
from icmlora.training.config import TrainConfig, steps_for, stretched
from icmlora.training.initialisation import fresh_network, tunable_network
from icmlora.training.loop import draws_of
from icmlora.training.state import TrainState, new_state
from registry.storage.blobs.content import digest_of

if TYPE_CHECKING:
    from registry.store import Store

_TUNING_STEPS = 50  # of the decoder, per new task
_TUNING_RATE = 2e-3
_COARSENESS = 2.0  # grid for rounding the differences of a tuned decoder, in units of their root mean square


@dataclass(frozen=True)
class Candidate:
    """A generator file with codes of new tasks; each code names the version of the file that decodes it."""

    data: bytes
    codes: Mapping[str, Encoded]

    def cost(self, before: bytes) -> int:
        """Return the bytes of the codes, plus the growth of the file since an earlier one."""
        return len(self.data) - len(before) + sum(len(code.data) for code in self.codes.values())


class UpdateCandidates:
    """Makes the candidates of one update."""

    def __init__(
        self,
        context: Context,
        store: Store,
        source: StoreAdapterSource,
        device: torch.device,
        run: TrainingRun | None,
        tolerance: float,
        options: TrainOptions,
    ) -> None:
        self._context, self._store, self._source, self._run = context, store, source, run
        self._tolerance, self._device = tolerance, device
        self._options = options
        self.steps = 0
        self.left_out = dict(source.left_out)
        self.added: Sequence[str] = ()  # networks that the best candidate appends: `tuned`, `fresh`
        self.kept_size: int | None = None  # bytes of the codes under the earlier networks; None if there are none
        self.tuned_size: int | None = None  # bytes of the codes under a tuned decoder, with that decoder

    def best(self, data: bytes) -> Candidate:
        """Return the candidate with the fewest bytes, with a network for the tasks that it cannot encode."""
        best = unchanged = self.unchanged(data)
        if unchanged.codes:
            tuned = self.tuned(unchanged)
            self.kept_size, self.tuned_size = unchanged.cost(data), tuned.cost(data)
            if self.tuned_size < self.kept_size:
                best, self.added = tuned, ["tuned"]
        uncovered = [name for name in self._source.names if name not in {*unchanged.codes, *self.left_out}]
        if uncovered:
            grown = self.with_new_network(best.data, uncovered)
            best, self.added = Candidate(grown.data, {**best.codes, **grown.codes}), [*self.added, "fresh"]
        return best

    def unchanged(self, data: bytes) -> Candidate:
        """Keep the file, and give each task the smallest code that one of the networks covering it makes."""
        return self._encoded(
            data, self._source, lambda file, task: file.covering(layout_of(self._source.task(task).final)), is_kept=True
        )

    def tuned(self, unchanged: Candidate) -> Candidate:
        """Tune the decoder that most codes of a candidate name, append it as differences, and encode its tasks."""
        file = GeneratorFile(unchanged.data)
        named = {name: generator_of(code.data) for name, code in unchanged.codes.items()}
        ((digest, _),) = Counter(named.values()).most_common(1)
        base = file.digests.index(digest)
        network = file.codec(base).net
        source = self._source.only([name for name in named if named[name] == digest])
        # Never more steps than a first training on these tasks has: a trained decoder starts nearer to its end.
        steps = min(_TUNING_STEPS * source.tasks(), steps_for(source.adapters(), source.parameters()))
        options = TrainConfig(
            steps=self._options.steps or stretched(steps, draws_of(self._device)),
            learning_rate=self._options.learning_rate or _TUNING_RATE,
            weight_decay=0.0,
            seed=self._options.seed,
        )
        # Only the decoder is tuned: the parts that read adapters and task vectors stay as they are.
        state = self._train(source, new_state(tunable_network(network).to(self._device), options))
        words = differences_to_words(network.state_dict(), state.net.state_dict(), _COARSENESS)
        # A run keeps one code of each adapter, which is the unchanged one.
        found = self._with_last_version(append_version(unchanged.data, words, base), source, is_kept=False)
        smaller = {name: _smaller(unchanged.codes[name], code) for name, code in found.codes.items()}
        return Candidate(found.data, {**unchanged.codes, **smaller})

    def with_new_network(self, data: bytes, names: Sequence[str]) -> Candidate:
        """Train a small network for some tasks, append it to a file, and encode the tasks."""
        source = self._source.only(names)
        config = config_for(
            source.base_model,
            source.layouts(),
            tasks=source.tasks(),
            # A few tasks do not show how adapters follow from task vectors.
            condition_size=0,
            quality=1,
            tolerance=self._tolerance,
        )
        options = schedule_of(source, self._device, self._options)
        sensitivity = measured_sensitivity(self._context, self._store, source, config, self._device)
        network = fresh_network(config, source, self._options.seed, sensitivity)
        state = self._train(source, new_state(network.to(self._device), options))
        return self._with_last_version(append_version(data, generator_to_bytes(state.net), None), source, is_kept=True)

    def _train(self, source: StoreAdapterSource, state: TrainState) -> TrainState:
        """Train to the last step, from the checkpoint of an interrupted training if it was this one."""
        run = self._run
        assert run is not None
        saved = None
        with suppress(*FAILURES):  # the checkpoint is damaged
            saved = run.state(self._device)
        if saved is not None and (saved.config, saved.net.config) == (state.config, state.net.config):
            for parameter, first in zip(saved.net.parameters(), state.net.parameters(), strict=True):
                parameter.requires_grad_(first.requires_grad)
            state = saved
        train_network(self._context, source, state, run)
        self.steps += state.step
        return state

    def _with_last_version(self, data: bytes, source: StoreAdapterSource, *, is_kept: bool) -> Candidate:
        return self._encoded(data, source, lambda file, task: [len(file.digests) - 1], is_kept=is_kept)

    def _encoded(
        self,
        data: bytes,
        source: StoreAdapterSource,
        versions: Callable[[GeneratorFile, int], Iterable[int]],
        *,
        is_kept: bool,
    ) -> Candidate:
        """Return for each task the smallest code that any of the given versions of a file makes.

        If `is_kept`, an interrupted update finds its codes again.
        """
        file, codes = GeneratorFile(data), dict[str, Encoded]()
        saved = self._run.codes(digest_of(data)) if is_kept and self._run is not None else nullcontext()
        with saved as run:
            for number, name in enumerate(source.names):
                task = source.task(number)
                found = None if run is None else run.get(task)
                code = None if found is None else found[0]
                if code is None:
                    for version in versions(file, number):
                        codec = file.codec(version)
                        try:
                            vectors, initial = source.mean_vectors(number), source.initial(number)
                            limits = Limits(tolerance=self._tolerance)
                            adapter = source.load(number, None)
                            made = encode_adapter(codec, adapter, vectors, initial, limits)
                        except FAILURES as error:
                            self.left_out[name] = as_error(error).message
                        else:
                            code = made if code is None else _smaller(code, made)
                    if code is not None and run is not None:
                        run.add(task, code, seed_is_known=False)
                if code is not None:
                    codes[name] = code
                self._context.progress(number + 1, source.tasks(), f"encoding {name}")
        return Candidate(data, codes)


def _smaller(earlier: Encoded, later: Encoded) -> Encoded:
    """Return the smaller of two codes; if they are equal, the earlier one."""
    return later if len(later.data) < len(earlier.data) else earlier
