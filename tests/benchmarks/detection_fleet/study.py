"""Measure what icm makes of the detection fleet: mAP50, mAP75 and bytes of each task, by each way to get an adapter.

usage: python -m tests.benchmarks.detection_fleet.study [--work FOLDER] [--steps N] [--quality N] [--only TASK,...]

Runs the user's lines on WORK/loras, then measures each class on its held-out images:

    base, original, code    as `icm eval` does
    recognised              the code of the task that `icm recognize` names for the held-out images
    nearest, mean           of the other tasks: no training, nothing of the class but its samples
    generated               what `icm generate` makes of 64 samples if the fleet does not know the class, with step
                            lengths that were not learned; for three classes

and adds WORK/variants, which are other ranks and another seed, with `icm train --update`. Each part is kept in
WORK/parts, so a stopped run goes on, and several may run side by side with --only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from icmlora import Adapter, Fleet, load_adapter
from icmlora.adapter.arithmetic import mean_adapter, truncated
from icmlora.fewshot.adapt import adapt
from icmlora.fewshot.start import RANK, untrained_fewshot_start, with_first_lengths
from icmlora.fleet.context import Context
from icmlora.fleet.resources.stored_vectors import comparable_vectors
from icmlora.task_vectors.distances import nearest
from tests.benchmarks.detection_fleet.held_out import HeldOut, mean_of
from tests.benchmarks.detection_fleet.nanodet import NAME, PACKAGE
from tests.benchmarks.performance.machine import describe_machine

LOADER = "tests.benchmarks.detection_fleet.loader:load"
ROOT = Path(__file__).parents[3]  # where the program finds the loader
RESULT = Path(__file__).parents[1] / "results" / "detection.json"
UNSEEN = ("letter-detection", "vehicle-detection", "flower-detection")  # every third of the classes
PAPER = {
    "model": "Florence-2-base-ft",
    "data": "PASCAL VOC 2012, class dog: photographs",
    "original": {"mAP50": 0.96, "mAP75": 0.89},
    "generated": {"mAP50": 0.96, "mAP75": 0.89},
}


class Icm:
    """The program, on one store, on the CPU."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._environment = os.environ | {"ICM_STORE": str(store.resolve()), "PYTHONPATH": str(ROOT)}
        self.seconds: dict[str, float] = {}

    def __call__(self, *words: object) -> str:
        """Run a command, print it with its output and return what it wrote to stdout."""
        line = [str(word) for word in words]
        print("$ icm", *line, flush=True)
        began = time.monotonic()
        command = [str(Path(sys.executable).with_name("icm")), *line]
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=self._environment)
        self.seconds[" ".join(line[:2])] = round(time.monotonic() - began, 1)
        print(done.stdout, flush=True)
        return done.stdout


class Study:
    """All parts.

    Args:
        work: The folder of the fleet.
        options: `--steps` and `--quality` of `icm train`.
    """

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self._work, self._options = work, options
        self._icm, self._held_out = Icm(work / "store"), HeldOut(work)
        self.names = sorted(folder.name for folder in (work / "loras").iterdir())

    def prepare(self) -> None:
        """Take the classes into a store, unless they are there."""
        icm, out = self._icm, self._work / "out"
        if icm.store.exists():
            return
        icm("base", "add", NAME, self._work / "base", "--loader", LOADER)
        icm("ingest", self._work / "loras", "--device", "cpu")
        quality, steps = self._options.quality, self._options.steps
        icm("train", "--no-eval", "--device", "cpu", "--quality", quality, "--steps", steps)
        shutil.rmtree(out, ignore_errors=True)
        icm("materialize", self.names[0], "-o", out, "--source", "code")

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part of the result, made if it is not there."""
        file = self._work / "parts" / f"{name}.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(make(), indent=1))
        return json.loads(file.read_text())

    def of_class(self, name: str) -> dict[str, Any]:
        """Return all figures of a class."""
        coded = self.part(f"{name}-coded", lambda: measured(self._icm, [name])[name])
        row = coded | {"recognised": self.part(f"{name}-recognised", lambda: self._recognised(name))}
        row |= self.part(f"{name}-without-own", lambda: self._without_own(name))
        if name in UNSEEN:
            row["generated"] = self.part(f"{name}-generated", lambda: self._generated(name))
        return row

    def variants(self) -> dict[str, Any]:
        """Add other ranks and another seed of the first class to a copy of the store, and measure them."""
        folder, icm = self._work / "variants", Icm(self._work / "store-variants")
        shutil.rmtree(icm.store, ignore_errors=True)
        shutil.copytree(self._icm.store, icm.store)
        icm("ingest", folder, "--no-vectors")
        icm("train", "--update", "--no-eval", "--device", "cpu", "--steps", 30)
        sizes = {task["name"]: task for task in json.loads(icm("ls", "--json"))}
        found = {}
        for path in sorted(folder.iterdir()):
            size, code = sizes[path.name], Fleet(icm.store).load(path.name, source="code")
            found[path.name] = {
                "rank": size["rank"],
                "code_bytes": size["code_size"],
                "bf16_bytes": 2 * size["parameters"],
                "original": self._held_out.score(path.name, load_adapter(path)),
                "code": self._held_out.score(path.name, code),
            }
        return found

    def generator(self) -> Any:
        """Return what `icm generators` says before the variants are added."""
        return json.loads(self._icm("generators", "--json"))

    def _recognised(self, name: str) -> dict[str, Any]:
        fleet = Fleet(self._icm.store)
        report = fleet.recognize(self._work / "loras" / name / "eval.jsonl", device="cpu")
        candidates = [{"task": one.task, "probability": one.probability} for one in report.candidates[:3]]
        row = {"task": report.task, "new": report.new, "samples": report.samples, "candidates": candidates}
        adapter = None if report.task is None else fleet.load(report.task, source="code")
        return row | self._held_out.score(name, adapter)

    def _without_own(self, name: str) -> dict[str, Any]:
        """Measure the adapter of the nearest other class, and the mean of all others."""
        with Context(self._icm.store).open(read_only=True) as store:
            vectors = dict(comparable_vectors(store, store.named(self.names), "context").vectors)
        own = vectors.pop(name)
        near = nearest(own.mean(axis=0), vectors)[0].task
        return {
            "nearest": self._held_out.score(name, self._original(near)) | {"task": near},
            "mean": self._held_out.score(name, mean_adapter(self._others(name), RANK)),
        }

    def _generated(self, name: str) -> dict[str, Any]:
        """Take the steps of `icm generate` from the mean of the other classes."""
        base = self._held_out.base
        samples = base.modality.prepare(base, self._held_out.samples(name), 1)
        adapter = None
        for step in adapt(base, with_first_lengths(untrained_fewshot_start(self._others(name))), samples):
            adapter = step.adapter
        assert adapter is not None
        return self._held_out.score(name, truncated(adapter, RANK)) | {"samples": len(samples)}

    def _original(self, name: str) -> Adapter:
        return load_adapter(self._work / "loras" / name)

    def _others(self, name: str) -> list[Adapter]:
        return [self._original(other) for other in self.names if other != name]


def measured(icm: Icm, names: Sequence[str]) -> dict[str, Any]:
    """Return mAP50 and mAP75 of base model, original and code of each task, the gain that the code keeps, and bytes."""
    report = Fleet(icm.store).evaluate(names, sources=["code"], device="cpu")
    sizes = {task["name"]: task for task in json.loads(icm("ls", "--json"))}
    found = {}
    for task in report.done:
        row: dict[str, Any] = {source: _score(result) for source, result in task.sources.items()}
        size = sizes[task.task]
        row |= {"retained_gain": task.sources["code"].retained_gain, "rank": size["rank"]}
        row |= {"code_bytes": size["code_size"], "bf16_bytes": 2 * size["parameters"]}
        found[task.task] = row | {"relative_error": size["relative_error"]}
        print(task.task, found[task.task], flush=True)
    return found


def summary(tasks: dict[str, Any], generator_bytes: int) -> dict[str, Any]:
    """Return means over the classes, and shares of bfloat16 with and without the generator."""
    ways = ("base", "original", "code", "recognised", "nearest", "mean")
    codes = sum(task["code_bytes"] for task in tasks.values())
    plain = sum(task["bf16_bytes"] for task in tasks.values())
    unseen = [tasks[name] for name in UNSEEN if name in tasks]
    return {
        "all_classes": {way: mean_of([task[way] for task in tasks.values()]) for way in ways},
        "unseen_classes": {way: mean_of([task[way] for task in unseen]) for way in (*ways, "generated")},
        "code_bytes": codes / len(tasks),
        "bf16_bytes": plain / len(tasks),
        "share_of_codes": codes / plain,
        "share_with_generator": (codes + generator_bytes) / plain,
        "recognised_rightly": sum(name == task["recognised"]["task"] for name, task in tasks.items()),
    }


def _score(result: Any) -> dict[str, float]:
    return {"mAP50": result.score.value, "mAP75": result.score.others["mAP75"]}


def main() -> None:
    """Run the parts, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/detection-fleet"))
    parser.add_argument("--steps", default="60", help="of `icm train`")
    parser.add_argument("--quality", default="7", help="of `icm train`")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="measure only these tasks, and write no result"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    study = Study(options.work, options)
    study.prepare()
    tasks = {name: study.of_class(name) for name in options.only or study.names}
    if options.only:
        return
    generators = study.part("generators", study.generator)
    result = {
        "base_model": {"name": NAME, "package": "npm:" + "@".join(PACKAGE)},
        "images": "composed: cut-outs of tuxpaint-stamps-default on photographs of budgie-backgrounds",
        "quality": int(options.quality),
        "mean": summary(tasks, generators[0]["size"]),
        "tasks": tasks,
        "variants": study.part("variants", study.variants),
        "generators": generators,
        "paper": PAPER,
        "machine": describe_machine(),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
