"""Run everything that touches a device, compare the results with the CPU's, and measure time and memory.

    python -m tests.benchmarks.gpu_check [--device cuda] [--shape 8b|0.3b|tiny]
    python -m tests.benchmarks.gpu_check --fleet DIR --base DIR [--device cuda]

Writes a section of tests/benchmarks/results/cuda.json, under the name of the card and of what ran on it. Without a card
everything runs on the CPU, and the section says so: its figures are no figures of a card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from icmlora import Fleet
from icmlora.io.devices import resolve_device
from icmlora.task_vectors.file import vectors_from_bytes
from registry.store import Store
from tests.benchmarks.gpu_check.subject import LABEL, NEW_SAMPLES, SHAPES, write_base, write_fleet, write_texts
from tests.benchmarks.performance.machine import describe_machine

ROOT = Path(__file__).parents[3]
RESULT = Path(__file__).parents[1] / "results" / "cuda.json"
GOALS = {"vectors": ("seconds_each", 1.0), "encode": ("seconds_each", 20.0), "generate": ("seconds", 10.0)}
"""Stage -> figure and goal in seconds, for the 8B shapes on one card of the H100's class."""
DECODE_GOAL = 0.05
LEAST_COSINE, MOST_LOSS_DIFFERENCE = 0.99, 0.02
"""The tolerances: a task vector of the device and of the CPU; a loss in bfloat16 and in float32, as a share."""


def main() -> None:
    """Measure, compare, print, write the JSON."""
    options = _options()
    device = resolve_device(options.device)
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work or ROOT / "build") as folder:
        section = check(Path(folder), options)
    is_card = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if is_card else None
    section = {
        "date": datetime.now(UTC).date().isoformat(),
        "card": card,
        "note": "measured on a card" if is_card else "no card: everything ran on the CPU",
        "machine": describe_machine(),
        **section,
    }
    subject = "fleet" if options.fleet else options.shape
    document = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    document[f"{card or 'CPU'}, {subject}"] = section
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(report(section, with_goals=is_card and subject == "8b"))
    if not all(part["within"] for part in section["compared"].values()):
        sys.exit("the device's results differ from the CPU's by more than the tolerances")


def check(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all stages on the device, and those that are compared on the CPU too."""
    device, store = options.device, work / "store"
    fleet = Fleet(store)
    size: dict[str, Any] = {name: getattr(options, name) for name in ("steps", "refine", "episodes")}
    if options.fleet:
        fleet.ingest([options.fleet])
        label = fleet.base_models()[0].record.name
        fleet.add_base_model(label, options.base)
    else:
        shape = SHAPES[options.shape]
        size["base_parameters"] = write_base(work / "base", shape)
        fleet.add_base_model(LABEL, work / "base")
        write_fleet(work / "loras", shape)
        fleet.ingest([work / "loras"])
    tasks = fleet.task_names()
    size["tasks"] = len(tasks)
    write_texts(work / "new.jsonl", 999, NEW_SAMPLES)
    stages = {"vectors": stage("vectors", device, store)}
    shutil.copytree(store, work / "cpu-store")  # before any code: only vectors differ
    stages["train"] = stage("train", device, store, steps=options.steps)
    stages["encode"] = stage("encode", device, store, refine=options.refine)
    stages["few_shot"] = stage("few_shot", device, store, episodes=options.episodes)
    stages["generate"] = stage("generate", device, store, samples=str(work / "new.jsonl"))
    stages["evaluate"] = stage("evaluate", device, store, tasks=tasks)
    stages["decode"] = stage("decode", device, store, task=tasks[0])
    on_cpu = {
        "vectors": stage("vectors", "cpu", work / "cpu-store"),
        "evaluate": stage("evaluate", "cpu", store, tasks=tasks[:1]),
        "decode": stage("decode", "cpu", store, task=tasks[0]),
    }
    compared = {
        "least cosine of task vectors": _bounded(_least_cosine(store, work / "cpu-store"), LEAST_COSINE, least=True),
        "largest difference of losses, as a share": _bounded(
            _loss_difference(stages["evaluate"]["losses"], on_cpu["evaluate"]["losses"]), MOST_LOSS_DIFFERENCE
        ),
        "decoded bytes differ": _bounded(float(stages["decode"]["digest"] != on_cpu["decode"]["digest"]), 0.0),
    }
    return {**size, "stages": stages, "on_cpu": on_cpu, "compared": compared}


def stage(name: str, device: str, store: Path, **options: object) -> dict[str, Any]:
    """Run one stage in a process of its own; on the CPU it sees no card."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu_check.stage", name, device, str(store), json.dumps(options)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | hidden)
    if done.returncode:
        sys.exit(f"stage {name} on {device} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} on {device}: {found['seconds']} s", file=sys.stderr, flush=True)
    return found


def report(section: dict[str, Any], *, with_goals: bool) -> str:
    """Return the figures as lines for people."""
    lines = [f"{section['card'] or 'CPU'}: {section['note']}"]
    for name, found in section["stages"].items():
        each = "" if found["seconds_each"] is None else f", {found['seconds_each']} s each"
        goal = f" (goal {GOALS[name][1]} s: {found[GOALS[name][0]]} s)" if with_goals and name in GOALS else ""
        memory = f"host {found['host_bytes'] / 2**30:.2f} GiB"
        if "device_bytes" in found:
            memory += f", device {found['device_bytes'] / 2**30:.2f} GiB"
        lines.append(f"{name:10} {found['seconds']:8.2f} s{each}; {memory}{goal}")
    decoding = min(section["stages"]["decode"]["decode_seconds"])
    goal = f" (goal {DECODE_GOAL} s)" if with_goals else ""
    lines.append(f"decoding one code, always on the CPU: {decoding} s{goal}")
    for name, part in section["compared"].items():
        lines.append(f"{name}: {part['value']:.6g} (limit {part['limit']}): {'kept' if part['within'] else 'MISSED'}")
    return "\n".join(lines)


def _bounded(value: float, limit: float, *, least: bool = False) -> dict[str, Any]:
    return {"value": value, "limit": limit, "within": value >= limit if least else value <= limit}


def _loss_difference(found: dict[str, float], expected: dict[str, float]) -> float:
    return max(abs(found[name] / loss - 1) for name, loss in expected.items())


def _least_cosine(store: Path, other: Path) -> float:
    """Return the least cosine of any task vector of one store and the same one of another."""
    first, second = (_all_vectors(folder) for folder in (store, other))
    if first.keys() != second.keys():
        sys.exit("the device and the CPU made different task vectors")
    return min(float(torch.cosine_similarity(first[key], second[key], dim=0)) for key in first)


def _all_vectors(folder: Path) -> dict[tuple[str, str, int], torch.Tensor]:
    with Store.open(folder, read_only=True) as store:
        rows = store.vectors.all()
        files = {row.blob: vectors_from_bytes(store.blobs.read(row.blob)) for row in rows}
        return {(row.task, row.view, row.support_set): files[row.blob][row.view][row.support_set] for row in rows}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--shape", choices=SHAPES, help="sizes of the random base (default 8b on a card, else 0.3b)")
    parser.add_argument("--fleet", type=Path, help="folder of adapters to use instead of synthetic ones")
    parser.add_argument("--base", type=Path, help="folder of their base model")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default 40)")
    parser.add_argument("--refine", type=int, default=40, help="steps of refinement (default 40)")
    parser.add_argument("--episodes", type=int, default=4, help="episodes of the few-shot start (default 4)")
    parser.add_argument("--work", type=Path, help="folder for the files; needs 17 GB for 8b (default build/)")
    options = parser.parse_args()
    if (options.fleet is None) != (options.base is None):
        parser.error("--fleet and --base go together")
    options.shape = options.shape or ("8b" if resolve_device(options.device).type == "cuda" else "0.3b")
    return options


if __name__ == "__main__":
    main()
