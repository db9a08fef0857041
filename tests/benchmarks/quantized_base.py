"""Codes on a base model in few bits: the gain that they keep there, and the memory that it takes.

    python -m tests.benchmarks.quantized_base --base FOLDER --fleet FOLDER [--tasks NAME ...] [--store FOLDER]

A generator is trained on the whole fleet, once. The codes of some tasks are then refined twice at the default quality:
on the base model in full precision, and on the same base model in nf4. All of them, and the originals, are measured on
the base model in each precision, on the held-out text that `icm eval` reads. For memory, each precision has a process
of its own that loads the base model and measures one adapter. Writes tests/benchmarks/results/quantized-base.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from icmlora import Fleet
from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.modality import BaseModel, retained_gain
from icmlora.base_models.quantised import stored_bytes
from icmlora.base_models.reading import EvaluationData
from icmlora.base_models.running.attach import adapted
from registry.names import LOAD_IN
from tests.benchmarks.performance.machine import describe_machine, peak_memory

RESULT = Path(__file__).parent / "results" / "quantized-base.json"
PRECISIONS = ("float32", "bfloat16", "int8", "nf4")
TOKENS = 256  # of each text, as `icm eval` reads
LABEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CODES = {"code": "full", "code refined on nf4": "nf4"}  # by the name of the store that has them


def main() -> None:
    """Measure, print, write the JSON."""
    options = _options()
    if options.alone is not None:
        print(json.dumps(alone(options.base, options.alone, *options.one)))
        return
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        stores = make_stores(options, work)
        adapters = write_adapters(stores, options.tasks, work)
        figures = [row for precision in PRECISIONS for row in measure(options, precision, adapters)]
        one = [str(adapters[options.tasks[0], "original"]), str(options.fleet / options.tasks[0] / "eval.jsonl")]
        memory = {precision: _in_a_process(options.base, precision, one) for precision in PRECISIONS}
        sizes = {name: _code_sizes(stores[store], options.tasks) for name, store in CODES.items()}
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "bitsandbytes": version("bitsandbytes"),
        "base": LABEL,
        "tokens": TOKENS,
        "code_bytes": sizes,
        "memory": memory,
        "gains": figures,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document))


def make_stores(options: argparse.Namespace, work: Path) -> dict[str, Fleet]:
    """Train a generator on the fleet, unless a store has one, and refine codes on the base model in both ways."""
    trained = options.store or work / "trained"
    fleet = Fleet(trained)
    if not trained.exists():
        fleet.add_base_model(LABEL, options.base)
        fleet.ingest([options.fleet])
        fleet.train(device="cpu", refine=0, evaluate=False)
    stores = {}
    for name, load_in in (("full", None), ("nf4", "nf4")):
        stores[name] = Fleet(shutil.copytree(trained, work / name))
        stores[name].add_base_model(LABEL, options.base, load_in=load_in)  # type: ignore[arg-type]
        started = time.monotonic()
        report = stores[name].encode(options.tasks, again=True, device="cpu")
        assert not report.short, report.short
        print(f"refined in {name}: {time.monotonic() - started:.0f} s", flush=True)
    return stores


def write_adapters(stores: dict[str, Fleet], tasks: list[str], work: Path) -> dict[tuple[str, str], Path]:
    """Write originals and codes as `icm materialize` does; by task and source."""
    written = {}
    for task in tasks:
        sources = {"original": ("full", "original")} | {name: (store, "code") for name, store in CODES.items()}
        for name, (store, source) in sources.items():
            folder = work / "adapters" / task / name
            stores[store].materialize(task, folder, source=source)  # type: ignore[arg-type]
            written[task, name] = folder
    return written


def load(folder: Path, precision: str) -> BaseModel:
    """Load the base model in a precision."""
    found = inspect_base(LABEL, folder)
    if precision in LOAD_IN:
        found = replace(found, load_in=precision)  # type: ignore[arg-type]
    dtype = None if precision in LOAD_IN else getattr(torch, precision)
    return modality_of(found).load(found, device=torch.device("cpu"), dtype=dtype)


def nats(base: BaseModel, adapter: Path | None, text: EvaluationData) -> float:
    """Return the loss of the base model, or of an adapter on it, in nats per token."""
    with nullcontext() if adapter is None else adapted(base, adapter):
        return base.modality.measure(base, text.examples, TOKENS).value


def measure(options: argparse.Namespace, precision: str, adapters: dict[tuple[str, str], Path]) -> list[dict[str, Any]]:
    """Measure the base model, the originals and the codes of all tasks in one precision."""
    base, rows = load(options.base, precision), []
    for task in options.tasks:
        file = options.fleet / task / "eval.jsonl"
        text = EvaluationData.parse(file.read_bytes(), base=base, path=file)
        started = time.monotonic()
        losses = {"base": nats(base, None, text)}
        losses |= {name: nats(base, adapters[task, name], text) for name in ("original", *CODES)}
        gains = {name: retained_gain(losses["base"], losses["original"], losses[name]) for name in CODES}
        seconds = round(time.monotonic() - started, 1)
        rows.append({"precision": base.dtype, "task": task, "nats": losses, "gain": gains, "seconds": seconds})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def alone(folder: Path, precision: str, adapter: str, texts: str) -> dict[str, int]:
    """Load the base model and measure one adapter in this process; returns bytes."""
    before = peak_memory()
    base = load(folder, precision)
    file = Path(texts)
    nats(base, Path(adapter), EvaluationData.parse(file.read_bytes(), base=base, path=file))
    held = psutil.Process().memory_info().rss
    return {
        "weights": stored_bytes(base.model),
        "before_loading": before,
        "after_measuring": held,
        "peak": peak_memory(),
    }


def table(document: dict[str, Any]) -> str:
    """Write the figures as a Markdown table."""
    heading = "| base model in | task | base | original | gain of code | gain of code refined on nf4 |"
    lines = [heading, "|---|---|" + "--:|" * 4]
    for row in document["gains"]:
        losses = [f"{row['nats'][name]:.4f}" for name in ("base", "original")]
        gains = [f"{row['gain'][name]:.4f}" for name in CODES]
        lines.append("| " + " | ".join([row["precision"], row["task"], *losses, *gains]) + " |")
    lines += ["", "| base model in | weights | process before loading | after measuring | peak |", "|---|" + "--:|" * 4]
    for precision, found in document["memory"].items():
        cells = [f"{found[name] / 1e6:.1f} MB" for name in ("weights", "before_loading", "after_measuring", "peak")]
        lines.append("| " + " | ".join([precision, *cells]) + " |")
    return "\n".join(lines)


def _in_a_process(base: Path, precision: str, one: list[str]) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.benchmarks.quantized_base", "--base", str(base), "--alone", precision]
    done = subprocess.run([*command, "--one", *one], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _code_sizes(fleet: Fleet, tasks: list[str]) -> dict[str, int]:
    return {row.name: row.code_size for row in fleet.tasks() if row.code_size is not None and row.name in tasks}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--fleet", type=Path, default=Path())
    parser.add_argument("--tasks", nargs="+", default=["shakespeare", "sql", "wordnet-gloss"])
    parser.add_argument("--store", type=Path, help="a trained store of the fleet, which is only read")
    parser.add_argument("--alone", choices=PRECISIONS, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
