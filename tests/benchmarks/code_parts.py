"""What codes are made of: container, fields of the head, norms and vectors of rank slots; task vectors beside it.

    python -m tests.benchmarks.code_parts --store STORE [--store STORE]... [--task NAME]... [--out FILE.json]

A store is a trained one; it is only read. A field of the head counts by what the compressed head is longer with it, and
norms by their bits under the coder's scales. So the parts do not add up to the code, to the byte.
"""

from __future__ import annotations

import argparse
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from icmlora.fleet.context import Context
from icmlora.fleet.resources.loading import ModelCache
from icmlora.generator.codec.code import CodeHead, ParsedCode
from icmlora.generator.codec.codec import Codec
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.files.container import ABSENT, counts_to_bytes
from icmlora.generator.initial_a.draw import initial_to_bytes
from icmlora.generator.network.code_length import bin_bits


@dataclass(frozen=True)
class Parts:
    """The code of one task; all sizes are in bytes."""

    task: str
    keep: float | None  # share of the effect that was asked for
    effect: float | None  # and what it keeps on held samples
    bf16: int
    code: int
    container: int  # magic number, the generator's digest, length of the head, checksum
    head: int
    fields: dict[str, int]  # of the head
    norms: int
    vectors: int  # of rank slots: all words but the norms
    slots: int
    modules: int  # that have a slot
    task_vectors: int


def fields_of(head: CodeHead, config: GeneratorConfig) -> dict[str, bytes]:
    """Return the fields of a head as icmlora/generator/codec/code.py writes them."""
    return {
        "step": struct.pack("<h", head.step),
        "condition": head.condition.tobytes(),
        "latent": head.latent.tobytes(),
        "gains": head.gains.tobytes(),
        "strengths": head.strengths.tobytes(),
        "kept": counts_to_bytes(head.kept, config.count_bytes),
        "shifts": head.shifts.tobytes(),
        "boosts": head.boosts.tobytes(),
        "initial A": initial_to_bytes(head.initial, config),
        "type": (head.task_type or "").encode(),
    }


def _norm_bytes(codec: Codec, data: bytes) -> int:
    bits = 0.0
    opened = codec.open(data)
    for group in opened.groups:
        scales = torch.from_numpy(codec.quantizer.norm_scales(group.slots))
        residuals = codec.quantizer.norm_residuals(group.slots, int(opened.head.gains[group.slots.kind]), group.norms)
        bits += float(bin_bits(torch.from_numpy(residuals), torch.exp2(scales.float() / 8)).sum())
    return round(bits / 8)


def parts_of(folder: Path, tasks: list[str]) -> Iterator[Parts]:
    """Take the codes of a store apart."""
    context = Context(folder)
    with context.open(read_only=True) as store:
        models = ModelCache(store, torch.device("cpu"), context.cache)
        for task in store.named(tasks) or store.tasks():
            row = task.code
            if row is None:
                continue
            data = store.blobs.read(row.blob)
            codec = models.generator_file(row.generator).codec_of(data)
            code = ParsedCode.from_bytes(data, codec.config)
            fields = fields_of(code.head, codec.config)
            head = len(zlib.compress(b"".join(fields.values()), 9))
            without = {
                name: len(zlib.compress(b"".join(field for other, field in fields.items() if other != name), 9))
                for name in fields
            }
            counts = np.where(code.head.kept == ABSENT, 0, code.head.kept)
            norms = _norm_bytes(codec, data)
            yield Parts(
                task=task.name,
                keep=None if row.asked is None else row.asked.keep,
                effect=row.effect,
                bf16=2 * task.final.parameters,
                code=len(data),
                container=len(data) - len(code.words) - head,
                head=head,
                fields={name: head - size for name, size in without.items()},
                norms=norms,
                vectors=len(code.words) - norms,
                slots=int(counts.sum()),
                modules=int((counts > 0).sum()),
                task_vectors=sum(blob.size for blob in {one.blob for one in task.vectors}),
            )


def main() -> None:
    """Take all codes apart, print a line for each, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, action="append", required=True)
    parser.add_argument("--task", action="append", default=[], help="only this one; may be given again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "code-parts.json")
    options = parser.parse_args()
    stores = []
    for folder in options.store:
        rows = []
        for parts in parts_of(folder, options.task):
            rows.append(parts)
            print(json.dumps(asdict(parts)), flush=True)
        sizes = ("bf16", "code", "container", "head", "norms", "vectors", "slots", "modules", "task_vectors")
        means = {size: round(mean(getattr(row, size) for row in rows), 1) for size in sizes}
        stores.append({"means": means, "tasks": [asdict(row) for row in rows]})
    document = {"date": datetime.now(UTC).date().isoformat(), "stores": stores}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
