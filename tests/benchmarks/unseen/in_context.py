"""The study of contexts: what adapter and samples are worth together, for tasks that were never ingested.

    python -m tests.benchmarks.unseen.in_context --fleet DIR --base DIR --work DIR [--folds 0,1,...] [--out FILE.json]

Fleet, folds and losses are those of `tests.benchmarks.unseen`. What `icm generate` does is done by its own code, with
its own choice of the context and its own guard. Rows, for K samples:

prompt-K    the context alone            icm-K           an adapter that was made to stand alone
both-K      adapter and kept context     icm-prompt-K    that adapter and the context
alone-K     the adapter of both-K alone  own-prompt-K    the task's own LoRA and the context
distil-16   --distil, without a prompt   sentence        made from a sentence; sentence-prompt: the sentence itself
prompt-16-of-96              16 samples in the prompt as `tests.benchmarks.unseen` puts them there
prompt-16-of-96-first-token  as it scores them, with the first token, which has no loss without a prompt

A stopped run goes on where it was; several may run side by side on different folds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.examples.examples import Example
from icmlora.base_models.kinds.likelihood import nll
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import added
from icmlora.fewshot.context_choice import ContextScorer
from icmlora.fewshot.described import described_context, described_samples
from icmlora.fewshot.guard import AblationReport
from icmlora.fewshot.start import FewShotStart
from icmlora.fleet.few_shot.from_samples import Made
from tests.benchmarks.unseen import fitted, rows
from tests.benchmarks.unseen.fleet import SAMPLE_TOKENS, StudyTask, built_tasks, load_study_base, reloaded
from tests.benchmarks.unseen.folds import folds_of
from tests.benchmarks.unseen.making import context_of, made_of
from tests.benchmarks.unseen.options import numbers, study_parser
from tests.benchmarks.unseen.sentences import SENTENCES
from tests.benchmarks.unseen.study import PROMPT_TOKENS, Results
from tests.benchmarks.unseen.summary import summarise

COUNTS = {16: 1536, 4: 1536, 64: 2048}
"""Samples -> tokens of the context at most."""
WORSE = 0.05
"""Of the gain, by which both have to be worse than the better one for that to matter."""
DISTILLED = 16
"""Samples of the row that is distilled."""
_WRITTEN = 16  # samples that the base model writes from a sentence

Making = Callable[[], tuple[Adapter | None, TaskContext | None]]
"""Makes the adapter and the context of a row."""


class ContextFold:
    """The held-out tasks of one fold.

    Args:
        base: The base model.
        start: The few-shot start of the tasks that are not held out.
        work: Folder of what is kept.
        steps: Of distillation; 0 leaves it out.
        results: Losses so far.
    """

    def __init__(self, base: BaseModel, start: FewShotStart, work: Path, steps: int, results: Results) -> None:
        self._base, self._start, self._work, self._steps, self._results = base, start, work, steps, results
        self._prompted = ContextScorer(base)

    def run(self, task: StudyTask, counts: list[int]) -> None:
        """Measure all rows of a task."""
        texts = task.held_out(self._base)
        measure = partial(self._measure, task, texts)
        measure("base", lambda: (None, None))
        measure("own", lambda: (task.adapter(), None))
        for count in counts:
            self._of_samples(task, count, measure)
        if DISTILLED in counts:
            self._as_in_unseen(task, texts)
        about = SENTENCES[task.name]
        measure("sentence-prompt", lambda: (None, described_context(about)))
        measure("sentence", lambda: (self._from_sentence(about), None))

    def _of_samples(self, task: StudyTask, count: int, measure: Callable[[str, Making], None]) -> None:
        made, plain = cache(partial(self._made, task, count, 0)), cache(partial(self._plain, task, count))

        def kept() -> TaskContext | None:
            chosen = made().context
            return None if chosen is None else chosen.context

        @cache
        def context() -> TaskContext:
            return kept() or context_of(self._lines(task, count), self._prompted, COUNTS[count])

        measure(f"prompt-{count}", lambda: (None, context()))
        measure(f"icm-{count}", lambda: (plain(), None))
        measure(f"both-{count}", lambda: (made().adapter, kept()))
        measure(f"icm-prompt-{count}", lambda: (plain(), context()))
        measure(f"alone-{count}", lambda: (made().adapter, None))
        measure(f"own-prompt-{count}", lambda: (task.adapter(), context()))
        if self._steps and count == DISTILLED:
            measure(f"distil-{count}", lambda: (self._made(task, count, self._steps).adapter, None))

    def _as_in_unseen(self, task: StudyTask, texts: list[Example]) -> None:
        """Measure the prompt of `tests.benchmarks.unseen`, which scored a token that has no loss without a prompt."""
        prompt = rows.prompts(task.texts, rows.support(range(len(task.texts)), 16, 0), self._base, PROMPT_TOKENS)
        examples = [Example(prompt, text.completion) for text in texts]
        model, tokenizer = self._base.model, self._base.tokenizer
        self._measure(task, texts, "prompt-16-of-96", lambda: (None, TaskContext(prompt)))
        measure = partial(nll, model, tokenizer, examples, max_tokens=2048)
        self._results.measure(task, "prompt-16-of-96-first-token", 0, lambda: measure().value)

    def _made(self, task: StudyTask, count: int, distil: int) -> Made:
        """Return what `icm generate` makes, and note what that cost and what the guard said."""
        samples = rows.support(task.samples(self._base), count, 0)
        tokens = 0 if distil else COUNTS[count]  # what is distilled keeps no context, and the guard would distil twice
        timed = made_of(self._lines(task, count), samples, self._base, self._start, distil, tokens)
        row = f"distil-{count}" if distil else f"both-{count}"
        with (self._work / "notes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"task": task.name, "row": row, **timed.note()}) + "\n")
        return timed.made

    def _lines(self, task: StudyTask, count: int) -> list[str]:
        return [json.dumps({"text": text}) for text in rows.support(task.texts, count, 0)]

    def _plain(self, task: StudyTask, count: int) -> Adapter:
        return rows.generated(self._base, self._start, rows.support(task.samples(self._base), count, 0))

    def _from_sentence(self, about: str) -> Adapter:
        texts = described_samples(self._base, about, _WRITTEN, SAMPLE_TOKENS)
        prepared = self._base.modality.prepare(self._base, [Example("", text) for text in texts], SAMPLE_TOKENS)
        return rows.generated(self._base, self._start, prepared)

    def _measure(self, task: StudyTask, texts: list[Example], row: str, make: Making) -> None:
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
    base = load_study_base(options.base) if options.folds else None
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
        print(by_count(json.loads(options.out.read_text("utf-8"))))


def _document(work: Path, tasks: list[StudyTask], folds: list[list[StudyTask]]) -> dict[str, Any]:
    measured: dict[tuple[str, str, int], float] = {}
    for path in sorted(work.glob("results-*.jsonl")):
        measured |= Results(path).values
    noted: dict[tuple[str, str], dict[str, Any]] = {}
    if (work / "notes.jsonl").exists():
        for line in (work / "notes.jsonl").read_text("utf-8").splitlines():
            note = json.loads(line)
            noted[note.pop("row"), note.pop("task")] = note
    found = summarise(measured, tasks, folds)
    costs: dict[str, dict[str, dict[str, Any]]] = {}
    for (row, task), note in sorted(noted.items()):
        costs.setdefault(row, {})[task] = note
    return {
        **found,
        "costs": costs,
        "guards": {
            row: _guarded(found["gains"], row, notes)
            for row, notes in costs.items()
            if row in found["gains"] and any(note["guard"] for note in notes.values())
        },
    }


def by_count(document: Mapping[str, Any]) -> str:
    """Return a Markdown table with a column for each number of samples: mean with its interval, and worst task."""
    counts = sorted(COUNTS)
    lines = ["| row |" + "".join(f" {count} samples | worst |" for count in counts), "|---|" + "--:|--:|" * len(counts)]
    for name in ("prompt", "icm", "alone", "icm-prompt", "both", "distil", "own-prompt"):
        cells = [document["rows"].get(f"{name}-{count}") for count in counts]
        shown = ("| |" if one is None else _shown(one) for one in cells)
        lines.append(f"| {name} |" + "".join(shown))
    lines += [f"| {name} |" + _shown(document["rows"][name]) for name in ("sentence-prompt", "sentence")]
    for row, notes in document["costs"].items():
        tokens, seconds = (mean(note[key] for note in notes.values()) for key in ("tokens", "seconds"))
        lines.append(f"{row}: {tokens:.0f} tokens, {seconds:.0f} seconds, {len(notes)} tasks")
    return "\n".join(lines)


def _shown(row: Mapping[str, Any]) -> str:
    return f" {row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {row['worst']:.3f} |"


def _guarded(gains: Mapping[str, Mapping[str, float]], row: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return how often the guard recommended what, what that gains, and where both do worse than one of them."""
    count = row.rpartition("-")[2]
    guards = {task: dict(note["guard"]) for task, note in notes.items() if note["guard"] is not None}
    said: dict[str, str] = {}
    for task, losses in guards.items():  # as it is today, of losses that were measured earlier
        losses.pop("recommended")
        said[task] = AblationReport(**losses).recommended
    better = {
        task: max(gains[f"prompt-{count}"][task], gains[f"icm-{count}"][task]) - gains[row][task]
        for task in said
        if task in gains.get(row, {}) and task in gains.get(f"icm-{count}", {})
    }
    of_advice = {"neither": "base", "context": f"prompt-{count}", "adapter": f"alone-{count}", "both": f"both-{count}"}
    served = {task: gains[of_advice[advice]] for task, advice in said.items()}
    taken = [of[task] for task, of in served.items() if task in of]
    return {
        "recommended": dict(Counter(said.values())),
        "gain_as_recommended": mean(taken) if taken else None,
        "worse_than_one": {task: {"by": by, "said": said[task]} for task, by in better.items() if by > WORSE},
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = study_parser("in_context", __doc__, most=40, episodes=10)
    parser.add_argument("--counts", type=numbers, default=list(COUNTS), help="numbers of samples (default 16,4,64)")
    parser.add_argument("--distil", type=int, default=150, help="steps of distillation (default 150, 0: none)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
