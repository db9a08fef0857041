"""One fold: fit on what is not held out, then every row of every held-out task; results are kept as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import Example
from icmlora.base_models.kinds.likelihood import nll
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import added
from icmlora.fewshot.start import with_first_lengths
from icmlora.formats.discovery.folder import load_adapter, save_adapter
from tests.benchmarks.unseen import fitted, rows
from tests.benchmarks.unseen.fleet import StudyTask, reloaded

PROMPT_TOKENS = 96
"""Of each sample in a prompt: sixteen and the text fit into the base model's 2,048."""

_REFINED = (16, 64)
"""Numbers of samples from which gradient steps go on, and a LoRA from scratch is trained."""
_FRESH_STEPS = 60
"""Of a LoRA from scratch."""


class Results:
    """Losses by task, row and seed, in a file that grows line by line: a stopped run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[tuple[str, str, int], float] = {}
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                row = json.loads(line)
                self.values[row["task"], row["row"], row["seed"]] = row["nats"]

    def measure(self, task: StudyTask, row: str, seed: int, loss: Callable[[], float]) -> None:
        """Measure a row unless it was measured."""
        key = task.name, row, seed
        if key in self.values:
            return
        nats = self.values[key] = loss()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"task": task.name, "row": row, "seed": seed, "nats": nats}) + "\n")
        ends = [self.values.get((task.name, end, 0)) for end in ("base", "own")]
        gain = "" if None in ends else f"{(ends[0] - nats) / (ends[0] - ends[1]):.3f}"  # type: ignore[operator]
        print(f"{task.name} {row} {seed}: {nats:.4f} {gain}", flush=True)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    base_folder: Path
    work: Path
    seeds: int
    episodes: int
    many: int
    """Held-out tasks of each fold that are also adapted to with 64 samples."""
    refined: int
    """Held-out tasks of each fold that are also refined, beside a LoRA from scratch."""


class Fold:
    """One fold.

    Args:
        number: Its number.
        members: The tasks that are fitted to.
        held_out: The tasks that are not.
        base: The base model.
        options: What is measured.
        results: Where to.
    """

    def __init__(
        self,
        number: int,
        members: Sequence[StudyTask],
        held_out: Sequence[StudyTask],
        base: BaseModel,
        options: Options,
        results: Results,
    ) -> None:
        self._members, self._held_out, self._base = members, held_out, base
        self._options, self._results = options, results
        folder = options.work / f"fold-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        self._start = fitted.fit_start(base, members, options.episodes, number, folder / "start.icms")
        self._mean = fitted.fit_mean(members)
        self._multitask = fitted.fit_multitask(options.base_folder, base, members, number, folder / "multitask")
        vectors = {task.name: fitted.support_set_vectors(base, task.texts) for task in members}
        self._known = rows.Known({task.name: task for task in members}, vectors)
        self._texts = {task.name: task.held_out(base) for task in held_out}

    def run(self) -> None:
        """Measure everything, what matters most first."""
        for task in self._held_out:
            self._without_steps(task)
        for seed in range(self._options.seeds):
            for task in self._held_out:
                for count in (16, 4, 1):
                    self._generated(task, count, seed)
                self._random(task, seed)
        self._controls()
        for task in self._held_out:
            self._prompted(task)
        for task in self._held_out:
            self._unlearned(task)
        for task in self._held_out[: self._options.refined]:
            self._refined(task, 16, 20)
            self._fresh(task, 16)
        for task in self._held_out[: self._options.many]:
            self._generated(task, 64, 0)
        both = self._held_out[: min(self._options.many, self._options.refined)]
        for task in both:
            self._refined(task, 64, 20)
            self._fresh(task, 64)
        for task in both:
            self._refined(task, 64, _FRESH_STEPS)

    def _without_steps(self, task: StudyTask) -> None:
        self._measure(task, "base", 0, lambda: None)
        self._measure(task, "own", 0, task.adapter)
        self._measure(task, "start", 0, lambda: self._start.adapter)
        self._measure(task, "mean", 0, lambda: self._mean)
        self._measure(task, "multitask", 0, lambda: self._multitask)
        vector = fitted.support_set_vectors(self._base, [task.texts[i] for i in range(0, 64, 4)]).mean(axis=0)
        self._measure(task, "nearest", 0, lambda: self._known.nearest(vector))
        self._measure(task, "mixture", 0, lambda: self._known.mixture(vector))

    def _generated(self, task: StudyTask, count: int, seed: int) -> None:
        is_kept = count in _REFINED and seed == 0
        make = partial(self._kept, task, count) if is_kept else partial(self._made, task, count, seed)
        self._measure(task, f"icm-{count}", seed, make)

    def _made(self, task: StudyTask, count: int, seed: int) -> Adapter:
        return rows.generated(self._base, self._start, rows.support(task.samples(self._base), count, seed))

    def _unlearned(self, task: StudyTask) -> None:
        samples, start = rows.support(task.samples(self._base), 16, 0), with_first_lengths(self._start)
        self._measure(task, "first-16", 0, lambda: rows.generated(self._base, start, samples))

    def _kept(self, task: StudyTask, count: int = 16) -> Adapter:
        """Return what is generated from the first draw of samples; made once, several rows start from it."""
        folder = self._options.work / "generated" / str(count) / task.name
        if not folder.exists():
            save_adapter(self._made(task, count, 0), folder, dtype="float32", force=True)
        return load_adapter(folder)

    def _random(self, task: StudyTask, seed: int) -> None:
        self._measure(task, "random", seed, lambda: rows.random_steps(self._start, 16, seed))

    def _controls(self) -> None:
        mixed = [rows.support(task.samples(self._base), 1, 0)[0] for task in self._members]
        made: list[Adapter] = []

        def mean_vector() -> Adapter:
            if not made:
                made.append(rows.generated(self._base, self._start, mixed))
            return made[0]

        for task, other in rows.shuffled_pairs(self._held_out):
            self._measure(task, "shuffled", 0, partial(self._kept, other))
            self._measure(task, "mean-vector", 0, mean_vector)

    def _prompted(self, task: StudyTask) -> None:
        for count in (4, 16):
            prompt = rows.prompts(task.texts, rows.support(range(len(task.texts)), count, 0), self._base, PROMPT_TOKENS)
            examples = [Example(prompt, example.completion) for example in self._texts[task.name]]
            self._results.measure(task, f"prompt-{count}", 0, partial(self._nats, None, examples))

    def _refined(self, task: StudyTask, count: int, steps: int) -> None:
        samples = rows.support(task.samples(self._base), count, 0)

        def further() -> Adapter:
            return rows.refined(self._base, self._kept(task, count), samples, steps)

        self._measure(task, f"icm-{count}-refine-{steps}", 0, further)

    def _fresh(self, task: StudyTask, count: int) -> None:
        ids = [sample.ids for sample in rows.support(task.samples(self._base), count, 0)]
        folder = self._options.base_folder
        self._measure(task, f"fresh-{count}", 0, lambda: fitted.fit_fresh(folder, ids, _FRESH_STEPS, rows.RANK, 0))

    def _measure(self, task: StudyTask, row: str, seed: int, make: Callable[[], Adapter | None]) -> None:
        self._results.measure(task, row, seed, lambda: self._nats(make(), self._texts[task.name]))

    def _nats(self, adapter: Adapter | None, examples: Sequence[Example]) -> float:
        """Measure an adapter after it was written and read back."""
        with added(self._base.model, reloaded(adapter)):
            return nll(self._base.model, self._base.tokenizer, examples, max_tokens=2048).value
