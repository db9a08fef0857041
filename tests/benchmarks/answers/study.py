"""Every way to keep the adapters, on every task: bytes, right answers, and what is lost against the originals."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from icmlora.formats.discovery.folder import save_adapter
from icmlora.formats.peft.peft import WEIGHTS_NAME
from tests.benchmarks.answers.generate import Answerer
from tests.benchmarks.answers.intervals import Estimate, difference, mean, share
from tests.benchmarks.answers.rows import Row, read
from tests.benchmarks.baselines.catalogue import baseline_named
from tests.benchmarks.performance.commands import icm, process
from tests.benchmarks.rate_distortion.cache import Cache
from tests.benchmarks.rate_distortion.fleet import TEXTS, FleetFolder
from tests.benchmarks.rate_distortion.icm_store import IcmStore
from tests.benchmarks.rate_distortion.judging import weights_digest
from tests.benchmarks.rate_distortion.method import Naive
from tests.benchmarks.rate_distortion.points import NAIVE

EXAMPLES = 16
_FAMILIES = "fewer ranks and bits", "fewer ranks and bits, full strength"


@dataclass(frozen=True)
class Method:
    """A way to keep the adapters: how it writes one into a folder, and what it stores."""

    name: str
    write: Callable[[str, Path], None]
    sizes: Mapping[str, int]
    """Bytes of each task."""
    shared: int = 0
    """Bytes stored once for all of them."""

    @property
    def own(self) -> float:
        """Mean bytes of a task."""
        return sum(self.sizes.values()) / len(self.sizes)

    @property
    def total(self) -> float:
        """Mean bytes of a task and its share of what is stored once."""
        return self.own + self.shared / len(self.sizes)


@dataclass(frozen=True)
class TaskResult:
    """One task in one row of the table."""

    right: int
    accuracy: Estimate
    loss: Estimate
    """Accuracy of the original minus this one's."""
    same: float
    """Share of questions with the very answer that the original gives."""
    bytes: int | None
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One row of the table: the means over all tasks."""

    name: str
    own: float | None
    """Mean bytes of a task; None where no adapter is."""
    total: float | None
    """The same with a task's share of what is stored once."""
    accuracy: Estimate
    loss: Estimate
    same: float
    tasks: Mapping[str, TaskResult]


def originals(fleet: FleetFolder, store: Path) -> Method:
    """The adapters as `icm` gives them back from its originals."""
    sizes = {task: (fleet.folder(task) / WEIGHTS_NAME).stat().st_size for task in fleet}
    return Method("original", _materialized(store, "original"), sizes)


def codes(fleet: FleetFolder, store: Path, name: str) -> Method:
    """The adapters as `icm` writes them from the codes of a store."""
    coded = IcmStore(store).code(fleet, store)
    return Method(name, _materialized(store, "code"), coded.sizes, coded.shared)


def _materialized(store: Path, source: str) -> Callable[[str, Path], None]:
    def write(task: str, folder: Path) -> None:
        process(icm("--quiet", "materialize", task, "--output", str(folder), "--source", source, store=store))

    return write


def baseline(fleet: FleetFolder, name: str) -> Method:
    """The adapters as a baseline gives them back from its bytes."""
    coded = Naive(name).code(fleet, fleet.root)
    return Method(
        name,
        lambda task, folder: save_adapter(coded.decode(task), folder, dtype="bfloat16"),
        coded.sizes,
        coded.shared,
    )


def alternatives(fleet: FleetFolder, least: float) -> list[str]:
    """Return the smallest baseline of each family that takes at least so many bytes a task."""
    adapter = next(iter(fleet.values()))
    chosen = []
    for family in _FAMILIES:
        sizes = {name: len(baseline_named(name).encode(adapter, b"")) for name in NAIVE[family].split()}
        enough = {name: size for name, size in sizes.items() if size >= least} or sizes
        chosen.append(min(enough, key=lambda name: (enough[name], name)))
    return chosen


class Study:
    """Asks and counts; what was asked before is read from a cache.

    Args:
        fleet: The adapters, with samples and held-out rows.
        base: Folder of the base model.
        dtype: What it computes in.
        rows: Held-out rows of each task at most.
        cache: Where answers are kept.
    """

    def __init__(self, fleet: FleetFolder, base: Path, dtype: torch.dtype, rows: int, cache: Cache) -> None:
        self._fleet, self._base, self._dtype, self._cache = fleet, base, dtype, cache
        self._rows = {task: read(fleet.folder(task) / TEXTS)[:rows] for task in fleet}
        self._answerer: Answerer | None = None
        self._originals: dict[str, list[str]] = {}

    def run(self, methods: Sequence[Method]) -> Iterator[Result]:
        """Yield the row of each method; the first is what the others are compared with."""
        for method in methods:
            answers = {task: self._written(method, task) for task in self._fleet}
            self._originals = self._originals or answers
            yield self._result(method.name, answers, method=method)

    def without_adapters(self) -> Iterator[Result]:
        """Yield the rows of the base model alone, and with examples in its prompt."""
        for name, count in (("base model", 0), (f"{EXAMPLES} examples in the prompt", EXAMPLES)):
            found = {task: self._prompted(task, count) for task in self._fleet}
            answers = {task: answer for task, (answer, _) in found.items()}
            notes = {task: {"examples": kept} for task, (_, kept) in found.items()} if count else {}
            yield self._result(name, answers, notes=notes)

    def _written(self, method: Method, task: str) -> list[str]:
        rows = self._rows[task]
        with tempfile.TemporaryDirectory(prefix="answers-") as work:
            folder = Path(work) / "adapter"
            method.write(task, folder)
            weights = weights_digest(folder)
            answers = self._kept(task, weights)
            if answers is None:
                answers = self._keep(task, weights, self._model.answers(rows, adapter=folder))["answers"]
                print(f"{method.name}, {task}: {sum(right(answers, rows))} of {len(rows)}", flush=True)
        return answers

    def _prompted(self, task: str, count: int) -> tuple[list[str], int]:
        rows, name = self._rows[task], f"{count} examples"
        answers = self._kept(task, name)
        if answers is None:
            examples = read(self._fleet.folder(task) / "samples.jsonl")[:count]
            answers, kept = self._model.with_examples(examples, rows)
            self._keep(task, name, answers, examples=kept)
            print(f"{name}, {task}: {sum(right(answers, rows))} of {len(rows)}", flush=True)
        record = self._cache.get(task, name, self._how(task)) or {}
        return answers, record["examples"]

    def _kept(self, task: str, weights: str) -> list[str] | None:
        record = self._cache.get(task, weights, self._how(task))
        return None if record is None else list(record["answers"])

    def _keep(self, task: str, weights: str, answers: list[str], **notes: int) -> dict[str, Any]:
        return self._cache.add(task, weights, self._how(task), answers=answers, **notes)

    def _how(self, task: str) -> str:
        """Return what names the questions and how they are asked."""
        asked = [self._base.name, str(self._dtype), *(row.prompt for row in self._rows[task])]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    @property
    def _model(self) -> Answerer:
        self._answerer = self._answerer or Answerer(self._base, self._dtype)
        return self._answerer

    def _result(
        self,
        name: str,
        answers: Mapping[str, list[str]],
        *,
        method: Method | None = None,
        notes: Mapping[str, Mapping[str, int]] = {},
    ) -> Result:
        sizes = {} if method is None else method.sizes
        tasks = {
            task: compared(given, self._originals[task], self._rows[task], sizes.get(task), notes.get(task, {}))
            for task, given in answers.items()
        }
        return Result(
            name,
            None if method is None else method.own,
            None if method is None else method.total,
            mean([task.accuracy for task in tasks.values()]),
            mean([task.loss for task in tasks.values()]),
            sum(task.same for task in tasks.values()) / len(tasks),
            tasks,
        )


def right(answers: Sequence[str], rows: Sequence[Row]) -> list[bool]:
    """Say of each answer whether it is exactly the row's, but for spaces around it."""
    return [answer.strip() == row.answer.strip() for answer, row in zip(answers, rows, strict=True)]


def compared(
    answers: Sequence[str], original: Sequence[str], rows: Sequence[Row], size: int | None, notes: Mapping[str, int]
) -> TaskResult:
    """Count the right answers to a task's questions, beside those of the original."""
    own, of_original = right(answers, rows), right(original, rows)
    same = sum(one == other for one, other in zip(answers, original, strict=True)) / len(rows)
    return TaskResult(sum(own), share(sum(own), len(rows)), difference(of_original, own), same, size, notes)


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table: a row a method, means over the tasks with their 95 % intervals."""
    lines = [
        "| | bytes a task | with its share of the rest | accuracy | lost against the originals | same answers |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        sizes = " | ".join("" if size is None else f"{size:,.0f}" for size in (result.own, result.total))
        accuracy, loss = (_shown(value) for value in (result.accuracy, result.loss))
        lines.append(f"| {result.name} | {sizes} | {accuracy} | {loss} | {result.same:.3f} |")
    return "\n".join(lines)


def table_of_tasks(results: Sequence[Result]) -> str:
    """Return a Markdown table of accuracies: a row a task, a column a method."""
    lines = ["| | " + " | ".join(result.name for result in results) + " |", "|---" + "|--:" * len(results) + "|"]
    for task in results[0].tasks:
        shares = " | ".join(f"{result.tasks[task].accuracy.value:.3f}" for result in results)
        lines.append(f"| {task} | {shares} |")
    return "\n".join(lines)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def document(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows as JSON has them, with numbers of six digits."""
    return [_rounded(asdict(result)) for result in results]


def _rounded(value: Any) -> Any:
    match value:
        case dict():
            return {name: _rounded(inner) for name, inner in value.items()}
        case float():
            return round(value, 6)
    return value
