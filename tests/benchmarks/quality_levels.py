"""What each `--quality` keeps: the bytes of codes, their errors, and how far the model's answers are off.

    python -m tests.benchmarks.quality_levels --store STORE [--tasks N] [--texts N] [--tokens N]

STORE is a trained store with its originals; it is only read. Each task is encoded at every level with the current
generator, decoded, written in the form of its original and put on the base model. The relative logit error compares
what the model then says on held-out text with what it says under the original:

    ||logits(code) - logits(original)|| / ||logits(original) - logits(base)||

So it is the share of the adapter's effect that is wrong. Writes tests/benchmarks/results/quality-levels.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import spread
from icmlora.base_models.modality import retained_gain
from icmlora.base_models.running.attach import adapted
from icmlora.fleet.context import Context
from icmlora.fleet.measure.measure import TaskLosses
from icmlora.fleet.resources.adapter_source import mean_vectors
from icmlora.fleet.resources.decoding import codec_of_task
from icmlora.fleet.resources.loading import ModelCache, read_original, read_runnable
from icmlora.fleet.resources.texts import own_text
from icmlora.formats.format import RunnableAdapter
from icmlora.generator.codec.encoding import Encoded, encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.config import tolerance_of
from icmlora.generator.initial_a.search import SeedSearch
from registry.manifests import Task
from registry.store import Store
from tests.benchmarks.performance.machine import describe_machine

LEVELS = range(1, 9)
RESULT = Path(__file__).parent / "results" / "quality-levels.json"


@dataclass(frozen=True)
class Level:
    """One task at one quality."""

    task: str
    quality: int
    code_bytes: int
    bf16_bytes: int
    relative_error: float
    weighted_error: float  # squared, as a plain quality limits it
    logit_error: float
    retained_gain: float


@dataclass(frozen=True)
class Answers:
    """What a model says on the texts of a task: logits of the scored tokens, (tokens, vocabulary), and its loss."""

    logits: torch.Tensor
    nats: float

    def distance(self, other: Answers) -> float:
        """Return the length of the difference between the logits."""
        return float(torch.linalg.norm(self.logits - other.logits))


class TaskLevels:
    """Measures one task at every quality."""

    def __init__(self, store: Store, models: ModelCache, task: Task, texts: int, tokens: int) -> None:
        self._store, self._models, self._task = store, models, task
        self._base = models.base(task.base_model)
        self._final = task.final
        text = own_text(store, task, self._base)
        self._losses = TaskLosses(models, task, text, tokens)
        self._items = self._base.modality.prepare(self._base, spread(text.examples, texts), tokens)

    def levels(self) -> Iterator[Level]:
        """Encode, decode and measure, from the smallest code to the most accurate one."""
        base, original = self._answers(None), self._answers(read_runnable(self._store, self._final))
        for quality, encoded, decoded in self._codes():
            code = self._answers(self._losses.written(decoded))
            gain = retained_gain(base.nats, original.nats, code.nats)
            assert gain is not None, f"the original of {self._task.name} is no better than the base model"
            yield Level(
                task=self._task.name,
                quality=quality,
                code_bytes=len(encoded.data),
                bf16_bytes=2 * self._final.parameters,
                relative_error=math.sqrt(encoded.squared_error),
                weighted_error=encoded.weighted_error,
                logit_error=code.distance(original) / original.distance(base),
                retained_gain=gain,
            )

    def _codes(self) -> Iterator[tuple[int, Encoded, Adapter]]:
        adapter: Adapter = read_original(self._store, self._final)
        generator = self._store.generator(self._task.base_model)
        assert generator is not None
        generator_file = self._models.generator_file(generator.blob)
        codec = codec_of_task(self._store, generator_file, self._task.code, adapter.layout)
        vectors = mean_vectors(self._store, self._task.vectors)
        initial = SeedSearch().find(adapter)
        for quality in LEVELS:
            limit = tolerance_of(quality)
            encoded = encode_adapter(codec, adapter, vectors, initial, limits=Limits(tolerance=limit))
            yield quality, encoded, codec.decode(encoded.data)

    def _answers(self, adapter: RunnableAdapter | None) -> Answers:
        modality = self._base.modality
        with nullcontext() if adapter is None else adapted(self._base, adapter), torch.inference_mode():
            rows = modality.logits(self._base, self._items)
            pairs = zip(rows, self._items, strict=True)
            logits = torch.cat([row[item.first - 1 : item.size - 1].float() for row, item in pairs])
            targets = torch.tensor([token for item in self._items for token in item.targets])
            return Answers(logits, float(functional.cross_entropy(logits, targets, reduction="sum")))


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a trained store with its originals")
    parser.add_argument("--tasks", type=int, default=4, help="how many tasks, spread over their names (default 4)")
    parser.add_argument("--texts", type=int, default=4, help="held-out texts of each (default 4)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each text (default 128)")
    options = parser.parse_args()
    levels: list[Level] = []
    context = Context(options.store)
    with context.open(read_only=True) as store:
        models = ModelCache(store, torch.device("cpu"), context.cache)
        for task in store.named(spread(store.names(), options.tasks)):
            for level in TaskLevels(store, models, task, options.texts, options.tokens).levels():
                levels.append(level)
                print(level, flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "texts": options.texts,
        "tokens": options.tokens,
        "levels": [asdict(level) for level in levels],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table([asdict(level) for level in levels]))


def table(levels: Sequence[dict[str, Any]]) -> str:
    """Write the means over the tasks as a Markdown table, one row for each quality."""
    lines = [
        "| quality | code, bytes | of bf16 | relative error | weighted error, squared | logit error | gain | worst |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for quality in LEVELS:
        rows = [level for level in levels if level["quality"] == quality]
        mean = {
            key: sum(row[key] for row in rows) / len(rows)
            for key in ("code_bytes", "bf16_bytes", "relative_error", "weighted_error", "logit_error", "retained_gain")
        }
        lines.append(
            f"| {quality} | {mean['code_bytes']:,.0f} | {100 * mean['code_bytes'] / mean['bf16_bytes']:.1f} % "
            f"| {mean['relative_error']:.2f} | {mean['weighted_error']:.3f} | {mean['logit_error']:.2f} "
            f"| {mean['retained_gain']:.3f} | {min(row['retained_gain'] for row in rows):.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
