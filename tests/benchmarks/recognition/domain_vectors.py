"""Make the context vectors of the 52 domains of the domain fleet, and of several draws of held-out samples of each.

    python -m tests.benchmarks.recognition.domain_vectors --work W -o VECTORS.npz [--base B]

Recognition reads no adapters, so none is trained. The known part of a domain is what `icm ingest` would read of the
samples.jsonl of the domain fleet; a draw is 16 pieces of documents that are not in it. About 20 seconds a domain on one
core, and packages of 300 MB in W. Domains that are in the output are skipped, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.base_models.causal_lm import CausalLM
from icmlora.base_models.examples import plain
from icmlora.base_models.lookup import inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.fleet.vectors import VECTOR_DTYPE
from icmlora.task_vectors.extraction import extract_context
from tests.benchmarks.domain_fleet.domains import DOMAINS
from tests.benchmarks.domain_fleet.pieces import take
from tests.benchmarks.domain_fleet.tasks import TASKS
from tests.benchmarks.example_fleet.__main__ import make_base
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.tasks import BASE_MODEL

DRAWS, DRAWN = 4, 16
"""Draws of a domain, and samples of a draw."""


def main() -> None:
    """Make what is missing, and write after each domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of downloaded packages")
    parser.add_argument("--base", type=Path, help="Hugging Face folder of the base model (default: made in WORK)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the vectors go")
    given = parser.parse_args()
    found = inspect_base(BASE_MODEL, given.base or make_base(given.work))
    base = CausalLM().load(found, dtype=VECTOR_DTYPE, fingerprint="study")
    vectors = dict(np.load(given.output)) if given.output.exists() else {}
    for task in TASKS:
        if f"{task.name}/known" in vectors:
            continue
        pieces = take(DOMAINS[task.name].documents(Packages(given.work)), base.tokenizer, DRAWS * DRAWN)
        vectors[f"{task.name}/known"] = _vectors(base, pieces.samples)
        draws = [pieces.held_out[number::DRAWS] for number in range(DRAWS)]  # pieces of one document are neighbours
        vectors[f"{task.name}/held-out"] = np.stack([_vectors(base, draw) for draw in draws if len(draw) == DRAWN])
        with given.output.open("wb") as file:
            np.savez(file, **vectors)
        sys.stdout.write(f"{task.name}: {len(vectors[f'{task.name}/held-out'])} draws\n")
        sys.stdout.flush()


def _vectors(base: BaseModel, texts: list[str]) -> NDArray[np.float32]:
    """Return the context vectors of the support sets of some texts, (sets, d)."""
    stacked = torch.stack([vector.values for vector in extract_context(base, plain(texts))])
    values: NDArray[np.float32] = stacked.numpy()
    return values


if __name__ == "__main__":
    main()
