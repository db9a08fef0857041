"""Right answers on tasks that were never ingested: by a generated adapter, by samples in the prompt, by both.

usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.answers.in_context --work W --fleet F [--rows 100] [--only A,B]

F is what `tests.benchmarks.answers.train` trained for the small base model. Each half of its tasks is left out once:
the few-shot start is learned on the other half. An adapter and its context come from 16 chats, by the code of
`icm generate`; the questions are held out. Answers are kept in W, so that a stopped study goes on.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.reading import examples_for
from icmlora.fewshot.context_choice import ContextScorer
from icmlora.fewshot.start import FewShotStart
from icmlora.formats.discovery.folder import save_adapter
from tests.benchmarks.answers.generate import Answerer
from tests.benchmarks.answers.intervals import mean, share
from tests.benchmarks.answers.rows import Row, read
from tests.benchmarks.answers.study import right
from tests.benchmarks.answers.tasks import TASKS
from tests.benchmarks.example_fleet.tasks import BASE_MODEL
from tests.benchmarks.realistic_fleet.bases import base_folder
from tests.benchmarks.unseen.fitted import fit_start
from tests.benchmarks.unseen.fleet import SAMPLE_TOKENS, StudyTask, load_study_base
from tests.benchmarks.unseen.making import Timed, context_of, made_of
from tests.benchmarks.unseen.rows import generated

COUNT = 16
"""Samples of each task."""
TOKENS = 1536
"""Of a context at most."""
Served = tuple[Adapter | Path | None, TaskContext | None]
"""What is served: an adapter or its folder, and a context."""
RESULTS = Path(__file__).parents[1] / "results" / "answers-in-context.json"


@dataclass(frozen=True)
class ChatTask(StudyTask):
    """A task whose samples are chats."""

    def samples(self, base: BaseModel) -> list[Scored]:
        """Return its samples as token ids; only answers are scored."""
        found = examples_for(base, (self.folder / "samples.jsonl").read_bytes())
        return base.modality.prepare(base, found.items, SAMPLE_TOKENS)


class Making:
    """What `icm generate` makes for one task.

    Args:
        base: The base model.
        start: A few-shot start that knows nothing of the task.
        task: The task.
        steps: Of distillation; 0 leaves it out.
    """

    def __init__(self, base: BaseModel, start: FewShotStart, task: ChatTask, steps: int) -> None:
        self._base, self._start, self.steps = base, start, steps
        self._lines = (task.folder / "samples.jsonl").read_text("utf-8").split("\n")[:COUNT]
        self._samples = task.samples(base)[:COUNT]

    @cached_property
    def both(self) -> Timed:
        """Its adapter and its context."""
        return self._made(0)

    @cached_property
    def context(self) -> TaskContext:
        """The context it keeps, or would keep if that were of use."""
        chosen = self.both.made.context
        return context_of(self._lines, ContextScorer(self._base), TOKENS) if chosen is None else chosen.context

    @cached_property
    def distilled(self) -> Timed:
        """An adapter that was distilled from the samples."""
        return self._made(self.steps)

    @cached_property
    def alone(self) -> Adapter:
        """An adapter that was made to stand alone."""
        return generated(self._base, self._start, self._samples)

    def _made(self, distil: int) -> Timed:
        # What is distilled keeps no context, and the guard would distil twice.
        return made_of(self._lines, self._samples, self._base, self._start, distil, 0 if distil else TOKENS)


class Asking:
    """Asks the questions of a task and keeps what was right."""

    def __init__(self, answerer: Answerer, task: ChatTask, count: int, kept: Path) -> None:
        self._answerer, self._task, self._kept = answerer, task, kept
        self._rows: list[Row] = read(task.folder / "eval.jsonl")[:count]

    def ask(self, row: str, make: Callable[[], Served], note: Callable[[], Any]) -> None:
        """Ask with an adapter and a context, unless that was done."""
        if any(line["task"] == self._task.name and line["row"] == row for line in lines_of(self._kept)):
            return
        adapter, context = make()
        before = [] if context is None else context.before_messages([])
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(adapter, Adapter):
                save_adapter(adapter, Path(folder) / "adapter", dtype="bfloat16")
                adapter = Path(folder) / "adapter"
            answers = self._answerer.answers(self._rows, adapter=adapter, before=before)
        found = right(answers, self._rows)
        line = {"task": self._task.name, "row": row, "right": sum(found), "rows": len(found), **note()}
        with self._kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self._task.name} {row}: {sum(found)} of {len(found)}", flush=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read what was kept."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def measure(asking: Asking, making: Making, task: ChatTask) -> None:
    """Ask with everything that the study compares."""
    nothing: Callable[[], dict[str, Any]] = dict

    def kept() -> TaskContext | None:
        return None if making.both.made.context is None else making.context

    asking.ask("base model", lambda: (None, None), nothing)
    asking.ask("own", lambda: (task.folder, None), nothing)
    asking.ask("prompt", lambda: (None, making.context), lambda: making.both.note())
    asking.ask("icm", lambda: (making.alone, None), nothing)
    asking.ask("icm and prompt", lambda: (making.alone, making.context), nothing)
    asking.ask("both", lambda: (making.both.made.adapter, kept()), lambda: making.both.note())
    asking.ask("own and prompt", lambda: (task.folder, making.context), nothing)
    if making.steps:
        noted = {"steps": making.steps}
        asking.ask("distilled", lambda: (making.distilled.made.adapter, None), lambda: making.distilled.note() | noted)


def document(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return accuracies by row: the mean over tasks with its 95 % interval, and each task."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        rows.setdefault(line["row"], {})[line["task"]] = {
            name: value for name, value in line.items() if name not in ("row", "task")
        }
    return {
        row: {"accuracy": asdict(mean([share(one["right"], one["rows"]) for one in tasks.values()])), "tasks": tasks}
        for row, tasks in rows.items()
    }


def main() -> None:
    """Learn two starts, make, ask, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of downloaded packages and what is kept")
    parser.add_argument("--fleet", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--rows", type=int, default=100, help="questions of each task (default 100)")
    parser.add_argument("--episodes", type=int, default=10, help="of meta-training (default 10)")
    parser.add_argument("--distil", type=int, default=150, help="steps of distillation (default 150, 0: none)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.work / "answers-in-context.jsonl"
    folders = [options.fleet / task.name for task in TASKS if task.base_model == BASE_MODEL]
    tasks = [ChatTask(folder, "", "") for folder in folders if folder.is_dir()]
    folder = base_folder(BASE_MODEL, options.work)
    base = load_study_base(folder)
    answerer = Answerer(folder, torch.float32)
    for half in range(2):
        members, held_out = tasks[1 - half :: 2], tasks[half::2]
        start = fit_start(base, members, options.episodes, half, options.work / f"answers-start-{half}.icms")
        for task in held_out:
            if options.only is None or task.name in options.only:
                measure(Asking(answerer, task, options.rows, kept), Making(base, start, task, options.distil), task)
    rows = document(lines_of(kept))
    result = {"base_model": BASE_MODEL, "samples": COUNT, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row, one in rows.items():
        print(f"{row}: {one['accuracy']['value']:.3f} ({one['accuracy']['low']:.3f} to {one['accuracy']['high']:.3f})")


if __name__ == "__main__":
    main()
