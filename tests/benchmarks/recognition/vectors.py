"""Make the context vectors that recognition is studied on: of known tasks, and of draws of held-out samples of each.

    python -m tests.benchmarks.recognition.vectors --base B --domains WORK -o VECTORS.npz      # the 52 text domains
    python -m tests.benchmarks.recognition.vectors --base B --fleet FOLDER -o VECTORS.npz      # a folder of adapters

Recognition reads no adapters, so none is trained or loaded. The known part is what `icm ingest` reads of samples.jsonl;
a draw is 16 held-out samples: for a fleet the first ones of eval.jsonl, or the first N with --samples N, and for a
domain pieces of documents that are not in its known part. About 10 seconds a domain on one core, and packages of 300 MB
in WORK. What is in the output is skipped, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.examples.examples import plain
from icmlora.base_models.examples.media_archive import read_examples
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.reading import examples_for
from icmlora.fleet.vectors.extraction import VECTOR_DTYPE
from icmlora.task_vectors.extraction import extract_context
from tests.benchmarks.domain_fleet.domains import DOMAINS
from tests.benchmarks.domain_fleet.pieces import take
from tests.benchmarks.domain_fleet.tasks import TASKS
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.tasks import BASE_MODEL

DRAWS, DRAWN = 2, 16
"""Draws of a domain, and samples of a draw."""
Draws = list[Sequence[Any]]


def main() -> None:
    """Make what is missing, and write after each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--loader", help="MODULE:FUNCTION of what loads it, where transformers does not")
    parser.add_argument("--domains", type=Path, metavar="WORK", help="folder of downloaded packages")
    parser.add_argument("--fleet", type=Path, help="folder of adapters with samples.jsonl and eval.jsonl")
    parser.add_argument("--samples", type=int, default=DRAWN, help="held-out samples of each task of a fleet")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the vectors go")
    given = parser.parse_args()
    found = inspect_base(BASE_MODEL, given.base, given.loader)
    base = modality_of(found).load(found, device=torch.device("cpu"), dtype=VECTOR_DTYPE, fingerprint="study")
    vectors = dict(np.load(given.output)) if given.output.exists() else {}
    done = {name.partition("/")[0] for name in vectors}
    tasks = of_fleet(base, given.fleet, given.samples, done) if given.fleet else of_domains(base, given.domains, done)
    for name, samples, draws in tasks:
        vectors[f"{name}/known"] = _vectors(base, samples)
        for number, draw in enumerate(draws):
            vectors[f"{name}/{number}"] = _vectors(base, draw)
        with given.output.open("wb") as file:
            np.savez(file, **vectors)
        sys.stdout.write(f"{name}: {len(draws)} draws\n")
        sys.stdout.flush()


def of_domains(base: BaseModel, work: Path, done: set[str]) -> Iterator[tuple[str, Sequence[Any], Draws]]:
    """Yield the samples and the draws of each text domain."""
    for task in TASKS:
        if task.name not in done:
            documents = DOMAINS[task.name].documents(Packages(work))
            pieces = take(documents, base.tokenizer, DRAWS * DRAWN)
            dealt = [plain(pieces.held_out[number::DRAWS]) for number in range(DRAWS)]  # neighbours are of one document
            yield task.name, plain(pieces.samples), [draw for draw in dealt if len(draw) == DRAWN]


def of_fleet(base: BaseModel, fleet: Path, count: int, done: set[str]) -> Iterator[tuple[str, Sequence[Any], Draws]]:
    """Yield the samples of each task of a fleet, and one draw of as many held-out ones as `count` says."""
    for folder in sorted(path.parent for path in fleet.glob("*/eval.jsonl")):
        if folder.name not in done:
            samples, held_out = (
                examples_for(base, read_examples(folder / file), path=folder / file).items
                for file in ("samples.jsonl", "eval.jsonl")
            )
            yield folder.name, samples, [held_out[:count]]


def _vectors(base: BaseModel, samples: Sequence[Any]) -> NDArray[np.float32]:
    """Return the context vectors of the support sets of some samples, (sets, d)."""
    stacked = torch.stack([vector.values for vector in extract_context(base, samples)])
    values: NDArray[np.float32] = stacked.numpy()
    return values


if __name__ == "__main__":
    main()
