"""Run everything that touches a device, compare the results with the CPU's, and measure time and memory.

    python -m tests.benchmarks.gpu_check [--device cuda] [--shape 8b|0.3b|tiny]
    python -m tests.benchmarks.gpu_check --fleet DIR --base DIR [--device cuda]

It begins with a rehearsal, a minute or two: all stages on the smallest shapes, on the stand-in for a card
(`tests/device`), which refuses what a card refuses.

Then it writes a section of tests/benchmarks/results/cuda.json, under the name of the card and of what ran on it, after
each stage: until the last one its name ends with "unfinished", and it stays if a stage fails. Without a card everything
runs on the CPU, and the section says so: its figures are no figures of a card.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from icmlora import Fleet
from icmlora.io.devices import resolve_device
from icmlora.io.staging import writing_file
from icmlora.task_vectors.file import vectors_from_bytes
from registry.store import Store
from tests.benchmarks.gpu_check.child import ROOT, Run, StageFailed, in_child, no_stand_in, on_stand_in
from tests.benchmarks.gpu_check.subject import LABEL, NEW_SAMPLES, SHAPES, write_base, write_fleet, write_texts
from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parents[1] / "results" / "cuda.json"
GOALS = {"vectors": ("seconds_each", 1.0), "encode": ("seconds_each", 20.0), "generate": ("seconds", 10.0)}
"""Stage -> figure and goal in seconds, for the 8B shapes on one card of the H100's class."""
DECODE_GOAL = 0.05
DECODED = 8  # codes that are decoded to the device together
LEAST_COSINE, MOST_LOSS_DIFFERENCE = 0.99, 0.02
"""The tolerances: a task vector of the device and of the CPU; a loss in bfloat16 and in float32, as a share."""


def main() -> None:
    """Rehearse, measure, compare, print, and write the JSON after each stage."""
    options = _options()
    try:
        section = measure(options, rehearse(options))
    except StageFailed as error:
        sys.exit(str(error))
    is_large = options.fleet is None and options.shape == "8b"
    print(report(section, with_goals=section["card"] is not None and is_large))
    if not section_agrees(section):
        sys.exit("the device's results differ from the CPU's by more than the tolerances")


def rehearse(options: argparse.Namespace) -> str:
    """Run all stages on a stand-in for a card, so that the long run does not end with what a minute can tell.

    Returns:
        What is to be said of it: that it went well, or why there was none.

    Raises:
        StageFailed: A stage failed, or its results are not those of the CPU.
    """
    missing = no_stand_in()
    where = "on the stand-in for a card" if missing is None else f"none: {missing}"
    print(f"rehearsal of all stages on the smallest shapes: {where}", file=sys.stderr, flush=True)
    if missing is not None:
        return where
    small = argparse.Namespace(device="cuda", fleet=None, base=None, shape="tiny", steps=4, refine=2, episodes=1)
    with _folder(options) as folder:
        section = check(folder, small, on_stand_in)
    if not section_agrees(section):
        raise StageFailed(f"the rehearsal's results differ from the CPU's: {json.dumps(section['compared'])}")
    return where


def measure(options: argparse.Namespace, rehearsed: str, run: Run = in_child) -> dict[str, Any]:
    """Run all stages, and keep what is known in the results after each one."""
    device = resolve_device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "card": card,
        "note": "no card: everything ran on the CPU" if card is None else "measured on a card",
        "rehearsal": rehearsed,
        "machine": describe_machine(),
    }
    name = f"{card or 'CPU'}, {'fleet' if options.fleet else options.shape}"
    with _folder(options) as folder:
        section = about | check(folder, options, run, lambda part: keep(RESULT, f"{name}, unfinished", about | part))
    keep(RESULT, name, section, instead_of=f"{name}, unfinished")
    return section


def check(
    work: Path, options: argparse.Namespace, run: Run, tell: Callable[[dict[str, Any]], None] = lambda section: None
) -> dict[str, Any]:
    """Run all stages on the device, and those that are compared on the CPU too.

    Args:
        work: Folder for the base model, the adapters and the store.
        options: Device, sizes, and the adapters if they are not synthetic.
        run: Runs a stage.
        tell: Is told what is known after each stage.

    Raises:
        StageFailed: A stage failed.
    """
    device, store = options.device, work / "store"
    section: dict[str, Any] = {name: getattr(options, name) for name in ("steps", "refine", "episodes")}
    section |= _prepare(work, options) | {"stages": {}, "on_cpu": {}}
    tasks = [row.name for row in Fleet(store).tasks()]
    samples = work / "new.jsonl"
    write_texts(samples, 999, NEW_SAMPLES)

    def part(name: str, store: Path = store, *, on: str = "stages", **chosen: object) -> None:
        section[on][name] = run(name, "cpu" if on == "on_cpu" else device, store, **chosen)
        tell(section)

    part("vectors")
    shutil.copytree(store, work / "cpu-store")  # before any code: only vectors differ
    part("train", steps=options.steps)
    part("encode", refine=options.refine)
    part("few_shot", episodes=options.episodes)
    part("generate", samples=str(samples))
    part("evaluate", tasks=tasks)
    part("decode", tasks=tasks[:DECODED])
    part("vectors", work / "cpu-store", on="on_cpu")
    part("evaluate", on="on_cpu", tasks=tasks[:1])
    part("decode", on="on_cpu", tasks=tasks[:DECODED])
    stages, on_cpu = section["stages"], section["on_cpu"]
    section["compared"] = {
        "least cosine of task vectors": _bounded(_least_cosine(store, work / "cpu-store"), LEAST_COSINE, least=True),
        "largest difference of losses, as a share": _bounded(
            _loss_difference(stages["evaluate"]["losses"], on_cpu["evaluate"]["losses"]), MOST_LOSS_DIFFERENCE
        ),
        "decoded bytes differ": _bounded(float(stages["decode"]["digest"] != on_cpu["decode"]["digest"]), 0.0),
    }
    return section


def section_agrees(section: dict[str, Any]) -> bool:
    """Whether all that was compared is within its limit."""
    return all(part["within"] for part in section["compared"].values())


def keep(file: Path, name: str, section: dict[str, Any], *, instead_of: str | None = None) -> None:
    """Put a section into a file of results, as a whole or not at all, and drop the one that it replaces."""
    document = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    document.pop(instead_of, None)
    document[name] = section
    with writing_file(file, force=True) as stream:
        stream.write(f"{json.dumps(document, indent=1)}\n".encode())


def _prepare(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the base model and the adapters, or take those that are named; return what there is."""
    fleet, found = Fleet(work / "store"), dict[str, Any]()
    if options.fleet:
        fleet.ingest([options.fleet])
        fleet.add_base_model(fleet.base_models()[0].base.name, options.base)
    else:
        shape = SHAPES[options.shape]
        found["base_parameters"] = write_base(work / "base", shape)
        fleet.add_base_model(LABEL, work / "base")
        write_fleet(work / "loras", shape)
        fleet.ingest([work / "loras"])
    return {**found, "tasks": len(fleet.tasks())}


@contextmanager
def _folder(options: argparse.Namespace) -> Iterator[Path]:
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work or ROOT / "build") as folder:
        yield Path(folder)


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
    lines.append(
        f"decoding the first {DECODED} codes to the device: {section['stages']['decode']['to_device_seconds']} s"
    )
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
        rows = [(task.name, row) for task in store.tasks() for row in task.vectors]
        files = {row.blob: vectors_from_bytes(store.blobs.read(row.blob)) for _, row in rows}
        return {(name, row.view, row.support_set): files[row.blob][row.view][row.support_set] for name, row in rows}


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
