"""What codes keep of the effect of their adapters on texts that nothing was fitted to, beside what they were made for.

    python -m tests.benchmarks.kept_effect --store STORE [--store STORE]... [--texts N] [--dtype D] [--out FILE.json]

A store is a trained one with its originals and base model; it is only read. For each task whose code was made for a
share of the effect: that share, the share on the samples that were held back, and the share on the task's own held-out
text, with the base model in float32 unless --dtype says otherwise. Bytes are those of the code and of the task's
vectors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import torch

from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fleet.context import Context
from icmlora.fleet.resources.decoding import decode_code
from icmlora.fleet.resources.loading import ModelCache, read_original
from icmlora.fleet.resources.texts import own_text
from icmlora.training.effect import Effect
from icmlora.training.teacher import Teacher
from tests.benchmarks.performance.machine import describe_machine

TOKENS = 256


@dataclass(frozen=True)
class Kept:
    """One task."""

    task: str
    asked: float
    on_held_samples: float
    on_other_text: float
    nats: float  # the adapter's whole effect there
    bytes: int
    bf16_bytes: int


def measured(folder: Path, texts: int, dtype: torch.dtype) -> Iterator[Kept]:
    """Measure the codes of a store."""
    context = Context(folder)
    with context.open(read_only=True) as store:
        models = ModelCache(store, torch.device("cpu"), context.cache)
        for task in store.tasks():
            code = task.code
            if code is None or code.effect is None or code.asked is None or not code.asked.keep:
                continue
            base = models.base(task.base_model, dtype)
            original = read_original(store, task.final)
            decoded = decode_code(store, models.generator_file(code.generator), code)
            items = base.modality.prepare(base, own_text(store, task, base).examples, TOKENS, whole=True)[:texts]
            effect = Effect(Teacher(base, factors_of(original), items))
            yield Kept(
                task=task.name,
                asked=code.asked.keep,
                on_held_samples=round(code.effect, 4),
                on_other_text=round(1 - effect.lost(factors_of(decoded)).counted, 4),
                nats=round(effect.whole, 4),
                bytes=code.size + sum(blob.size for blob in {vector.blob for vector in task.vectors}),
                bf16_bytes=2 * sum(shape.parameters for shape in original.layout),
            )


def main() -> None:
    """Measure all stores, print a line for each task, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, action="append", required=True)
    parser.add_argument("--texts", type=int, default=16, help="held-out texts of a task at most (default 16)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kept-effect.json")
    options = parser.parse_args()
    rows: list[Kept] = []
    for store in options.store:
        for kept in measured(store, options.texts, getattr(torch, options.dtype)):
            rows.append(kept)
            print(json.dumps(asdict(kept)), flush=True)
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "texts": options.texts,
        "dtype": options.dtype,
        "mean_on_other_text": round(mean(row.on_other_text for row in rows), 4),
        "furthest_from_asked": round(max(abs(row.on_other_text - row.asked) for row in rows), 4),
        "share_of_bf16": round(sum(row.bytes for row in rows) / sum(row.bf16_bytes for row in rows), 5),
        "tasks": [asdict(row) for row in rows],
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
