"""The study of contexts: what adapter and samples are worth together, for tasks that were never ingested.

    python -m tests.benchmarks.unseen.in_context --fleet DIR --base DIR --work DIR [--folds 0,1,...] [--out FILE.json]

Fleet, folds and losses are those of `tests.benchmarks.unseen`. What `icm generate` does is done by its own code, with
its own choice of the context and its own guard. Rows, for K samples:

prompt-K    the context alone            icm-K           an adapter that was made to stand alone
both-K      adapter and context          icm-prompt-K    that adapter and the context
alone-K     the adapter of both-K alone  own-prompt-K    the task's own LoRA and the context
distil-16   --distil, without a prompt   sentence        made from a sentence; sentence-prompt: the sentence itself

A stopped run goes on where it was; several may run side by side on different folds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.examples.examples import Example
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import added
from icmlora.fewshot.context_choice import Prompted
from icmlora.fewshot.described import described_context, described_samples
from icmlora.fewshot.start import FewShotStart
from icmlora.fleet.context import Context
from icmlora.fleet.few_shot.from_samples import Made, Recipe, Source, make_from
from tests.benchmarks.example_fleet.tasks import BASE_MODEL
from tests.benchmarks.unseen import fitted, rows
from tests.benchmarks.unseen.fleet import SAMPLE_TOKENS, StudyTask, built_tasks, reloaded
from tests.benchmarks.unseen.folds import folds_of
from tests.benchmarks.unseen.options import numbers, study_parser
from tests.benchmarks.unseen.sentences import SENTENCES
from tests.benchmarks.unseen.study import Results
from tests.benchmarks.unseen.summary import summarise, table

COUNTS = {16: 1536, 4: 1536, 64: 2048}
"""Samples -> tokens of the context at most."""
_WRITTEN = 16  # samples that the base model writes from a sentence


class ContextFold:
    """The held-out tasks of one fold.

    Args:
        base: The base model.
        start: The few-shot start of the tasks that are not held out.
        work: Folder of what is kept.
        steps: Of distillation.
        results: Losses so far.
    """

    def __init__(self, base: BaseModel, start: FewShotStart, work: Path, steps: int, results: Results) -> None:
        self._base, self._start, self._work, self._steps, self._results = base, start, work, steps, results
        self._prompted = Prompted(base)

    def run(self, task: StudyTask, counts: list[int]) -> None:
        """Measure all rows of a task."""
        texts = task.held_out(self._base)
        measure = partial(self._measure, task, texts)
        measure("base", lambda: (None, None))
        measure("own", lambda: (task.adapter(), None))
        for count in counts:
            made = self._once(partial(self._made, task, count, 0))
            plain = self._once(partial(self._plain, task, count))
            measure(f"prompt-{count}", lambda made=made: (None, made().context.context))
            measure(f"icm-{count}", lambda plain=plain: (plain(), None))
            measure(f"both-{count}", lambda made=made: (made().adapter, made().context.context))
            measure(f"icm-prompt-{count}", lambda made=made, plain=plain: (plain(), made().context.context))
            measure(f"alone-{count}", lambda made=made: (made().adapter, None))
            measure(f"own-prompt-{count}", lambda made=made: (task.adapter(), made().context.context))
        if 16 in counts:
            measure("distil-16", lambda: (self._made(task, 16, self._steps).adapter, None))
        about = SENTENCES[task.name]
        measure("sentence-prompt", lambda: (None, described_context(about)))
        measure("sentence", lambda: (self._from_sentence(about), None))

    def _once(self, make: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that makes something when it is first asked for."""
        found: list[Any] = []

        def get() -> Any:
            if not found:
                found.append(make())
            return found[0]

        return get

    def _made(self, task: StudyTask, count: int, distil: int) -> Made:
        """Return what `icm generate` makes, and note what that cost and what the guard said."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.jsonl"
            numbers = torch.randperm(len(task.texts), generator=torch.Generator().manual_seed(0)).tolist()[:count]
            path.write_text("".join(json.dumps({"text": task.texts[number]}) + "\n" for number in numbers))
            source = Source.read(path, count, None, any_row=False)
            began = time.monotonic()
            samples = rows.support(task.samples(self._base), count, 0)
            recipe = Recipe(rows.RANK, 0, distil, COUNTS[count])
            made = make_from(Context(Path(folder)), self._base, self._start, source, samples, recipe)
        note = {
            "task": task.name,
            "row": f"distil-{count}" if distil else f"both-{count}",
            "seconds": round(time.monotonic() - began, 1),
            "tokens": 0 if made.context is None else made.context.tokens,
            "guard": None if made.guard is None else asdict(made.guard) | {"recommended": made.guard.recommended},
        }
        with (self._work / "notes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
        return made

    def _plain(self, task: StudyTask, count: int) -> Adapter:
        return rows.generated(self._base, self._start, rows.support(task.samples(self._base), count, 0))

    def _from_sentence(self, about: str) -> Adapter:
        texts = described_samples(self._base, about, _WRITTEN, SAMPLE_TOKENS)
        prepared = self._base.modality.prepare(self._base, [Example("", text) for text in texts], SAMPLE_TOKENS)
        return rows.generated(self._base, self._start, prepared)

    def _measure(
        self,
        task: StudyTask,
        texts: list[Example],
        row: str,
        make: Callable[[], tuple[Adapter | None, TaskContext | None]],
    ) -> None:
        self._results.measure(task, row, 0, lambda: self._nats(*make(), texts))

    def _nats(self, adapter: Adapter | None, context: TaskContext | None, texts: list[Example]) -> float:
        """Measure an adapter after it was written and read back."""
        with added(self._base.model, reloaded(adapter)):
            return self._prompted.score(context, texts).value


def main(arguments: list[str] | None = None) -> None:
    """Measure some folds, or summarise what was measured."""
    options = _options(arguments)
    torch.set_num_threads(1)
    tasks = built_tasks(options.fleet, options.most)
    folds = folds_of(tasks)
    options.work.mkdir(parents=True, exist_ok=True)
    found = inspect_base(BASE_MODEL, options.base)
    base = CausalLM().load(found, dtype=torch.bfloat16, fingerprint="study") if options.folds else None
    for number in options.folds:
        assert base is not None
        members = [task for task in tasks if task not in folds[number]]
        start = fitted.fit_start(base, members, options.episodes, number, options.work / f"start-{number}.icms")
        results = Results(options.work / f"results-{number}.jsonl")
        fold = ContextFold(base, start, options.work, options.distil, results)
        for task in folds[number]:
            fold.run(task, options.counts)
    if options.out is not None:
        options.out.write_text(json.dumps(_document(options.work, tasks, folds), indent=1) + "\n", encoding="utf-8")
        print(table(json.loads(options.out.read_text("utf-8"))))


def _document(work: Path, tasks: list[StudyTask], folds: list[list[StudyTask]]) -> dict[str, Any]:
    measured: dict[tuple[str, str, int], float] = {}
    for path in sorted(work.glob("results-*.jsonl")):
        measured |= Results(path).values
    noted = {}
    if (work / "notes.jsonl").exists():
        for line in (work / "notes.jsonl").read_text("utf-8").splitlines():
            note = json.loads(line)
            noted[note.pop("task"), note.pop("row")] = note
    notes = [{"task": task, "row": row, **note} for (task, row), note in sorted(noted.items())]
    return {**summarise(measured, tasks, folds), "notes": notes}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = study_parser("in_context", __doc__, most=40, episodes=10)
    parser.add_argument("--counts", type=numbers, default=list(COUNTS), help="numbers of samples (default 16,4,64)")
    parser.add_argument("--distil", type=int, default=150, help="steps of distillation (default 150)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
