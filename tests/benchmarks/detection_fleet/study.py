"""Measure what icm makes of the detection fleet: mAP50, mAP75 and bytes of each task, by each way to get an adapter.

usage: python -m tests.benchmarks.detection_fleet.study [--work FOLDER] [--steps N] [--quality N] [--out FILE.json]

Runs the user's lines on the folders that `make detection-fleet` makes, prints what they print, and writes the figures:

    classes      WORK/loras in one store: base model, original, code, what its held-out images are recognised as
    without own  nearest other task, mean of the other tasks: no training
    variants     WORK/variants, added to that store with `icm train --update`: other ranks, another seed
    unseen       classes 2, 5 and 8 are left out of a second store, and `icm generate` makes their adapters from samples

Each part is kept in WORK/parts, so a stopped run goes on with the next one.
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

from icmlora import Fleet, load_adapter
from icmlora.adapter.arithmetic import mean_adapter
from icmlora.fewshot.start import RANK
from icmlora.task_vectors.distances import nearest
from tests.benchmarks.detection_fleet.held_out import HeldOut, mean_of
from tests.benchmarks.detection_fleet.images import CLASSES
from tests.benchmarks.detection_fleet.nanodet import NAME, PACKAGE
from tests.benchmarks.performance.machine import describe_machine

LOADER = "tests.benchmarks.detection_fleet.loader:load"
RESULT = Path(__file__).parents[1] / "results" / "detection.json"
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
        self._environment = os.environ | {"ICM_STORE": str(store.resolve())}
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
        options: `--steps` and `--quality` of `icm train`, and `--episodes`.
    """

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self._work, self._options = work, options
        self._held_out = HeldOut(work, options.most)
        self._names = sorted(folder.name for folder in (work / "loras").iterdir())

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part of the result, made if it is not there."""
        file = self._work / "parts" / f"{name}.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(make(), indent=1))
        return json.loads(file.read_text())

    def classes(self) -> dict[str, Any]:
        """Take the classes into a store, and measure originals and codes."""
        icm = self._new("store")
        icm("ingest", self._work / "loras", "--device", "cpu")
        self._train(icm)
        shutil.rmtree(self._work / "out", ignore_errors=True)
        icm("materialize", self._names[0], "-o", self._work / "out", "--source", "code")
        tasks = measured(icm, self._names)
        return {"tasks": tasks, "generator": json.loads(icm("generators", "--json")), "seconds": icm.seconds}

    def recognised(self) -> dict[str, Any]:
        """Recognise the held-out images of each class, and measure the code of what they are recognised as."""
        fleet, found = Fleet(self._work / "store"), {}
        for name in self._names:
            report = fleet.recognize(self._work / "loras" / name / "eval.jsonl", device="cpu")
            adapter = None if report.task is None else fleet.load(report.task, source="code")
            candidates = [{"task": one.task, "probability": one.probability} for one in report.candidates[:3]]
            row = {"task": report.task, "new": report.new, "samples": report.samples, "candidates": candidates}
            found[name] = row | self._held_out.score(name, adapter)
            print(name, found[name], flush=True)
        return found

    def without_own(self) -> dict[str, Any]:
        """Measure, for each class, the nearest other task's adapter and the mean of all others."""
        found = {}
        originals = {name: load_adapter(self._work / "loras" / name) for name in self._names}
        vectors = {name: self._held_out.vectors(name) for name in self._names}
        for name in self._names:
            others = [original for other, original in originals.items() if other != name]
            known = {other: vectors[other] for other in self._names if other != name}
            near = nearest(vectors[name].mean(axis=0), known)[0].task
            found[name] = {
                "nearest": self._held_out.score(name, originals[near]) | {"task": near},
                "mean": self._held_out.score(name, mean_adapter(others, RANK)),
            }
            print(name, found[name], flush=True)
        return found

    def variants(self) -> dict[str, Any]:
        """Add other ranks and another seed of the first class, and measure them."""
        icm, folder = Icm(self._work / "store"), self._work / "variants"
        icm("ingest", folder, "--device", "cpu")
        icm("train", "--update", "--no-eval", "--device", "cpu")
        names = sorted(path.name for path in folder.iterdir())
        return {"tasks": measured(icm, names), "generator": json.loads(icm("generators", "--json"))}

    def unseen(self) -> dict[str, Any]:
        """Leave three classes out of a store, and generate their adapters from samples."""
        icm, out = self._new("store-without"), self._work / "generated"
        unseen = [f"{name}-detection" for name in list(CLASSES)[1:8:3]]
        known = [name for name in self._names if name not in unseen]
        icm("ingest", *(self._work / "loras" / name for name in known), "--device", "cpu")
        self._train(icm, "--objective", "both", "--episodes", self._options.episodes)
        found: dict[str, Any] = {"known": known, "tasks": {}}
        for name in unseen:
            rows = found["tasks"][name] = {}
            for label, steps in (("generated", 0), ("generated, 40 gradient steps", 40)):
                shutil.rmtree(out, ignore_errors=True)
                samples = self._work / "loras" / name / "samples.jsonl"
                icm("generate", name, "--samples", samples, "-o", out, "--refine", steps, "--device", "cpu")
                rows[label] = self._held_out.score(name, load_adapter(out))
            icm("ingest", self._work / "loras" / name, "--device", "cpu")
        evaluated = Fleet(icm.store).evaluate(unseen, sources=["network"], device="cpu")
        for task in evaluated.tasks:
            found["tasks"][task.task]["network"] = _score(task.sources["network"])
        return found | {"seconds": icm.seconds}

    def _new(self, store: str) -> Icm:
        shutil.rmtree(self._work / store, ignore_errors=True)
        icm = Icm(self._work / store)
        icm("base", "add", NAME, self._work / "base", "--loader", LOADER)
        return icm

    def _train(self, icm: Icm, *more: object) -> None:
        steps = ["--steps", self._options.steps] if self._options.steps else []
        icm("train", "--no-eval", "--device", "cpu", "--quality", self._options.quality, *steps, *more)


def measured(icm: Icm, names: Sequence[str]) -> dict[str, Any]:
    """Return mAP50 and mAP75 of base model, original and code of each task, the gain that the code keeps, and bytes."""
    report = Fleet(icm.store).evaluate(names, sources=["code"], device="cpu")
    sizes = {task["name"]: task for task in json.loads(icm("ls", "--json"))}
    found = {}
    for task in report.tasks:
        row: dict[str, Any] = {source: _score(result) for source, result in task.sources.items()}
        size = sizes[task.task]
        row |= {"retained_gain": task.sources["code"].retained_gain, "rank": size["rank"]}
        row |= {"code_bytes": size["code_size"], "bf16_bytes": 2 * size["parameters"]}
        found[task.task] = row | {"relative_error": size["relative_error"]}
        print(task.task, found[task.task], flush=True)
    return found


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return means over the classes, and shares of bfloat16 with and without the generator."""
    tasks = result["tasks"]
    rows = {source: mean_of([task[source] for task in tasks.values()]) for source in ("base", "original", "code")}
    rows["recognised"] = mean_of(list(result["recognised"].values()))
    for way in ("nearest", "mean"):
        rows[way] = mean_of([found[way] for found in result["without_own"].values()])
    codes = sum(task["code_bytes"] for task in tasks.values())
    plain = sum(task["bf16_bytes"] for task in tasks.values())
    generator = result["generator"][0]["size"]
    unseen = result["unseen"]["tasks"]
    return {
        "all_classes": rows,
        "unseen_classes": {
            **{way: mean_of([row[way] for row in unseen.values()]) for way in next(iter(unseen.values()))},
            **{source: mean_of([tasks[name][source] for name in unseen]) for source in ("base", "original", "code")},
            **{way: mean_of([result["without_own"][name][way] for name in unseen]) for way in ("nearest", "mean")},
        },
        "share_of_codes": codes / plain,
        "share_with_generator": (codes + generator) / plain,
        "recognised_rightly": sum(name == row["task"] for name, row in result["recognised"].items()),
    }


def _score(result: Any) -> dict[str, float]:
    return {"mAP50": result.score.value, "mAP75": result.score.others["mAP75"]}


def main() -> None:
    """Run the parts, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/detection-fleet"))
    parser.add_argument("--steps", help="steps of `icm train`")
    parser.add_argument("--quality", default="5", help="of `icm train`")
    parser.add_argument("--episodes", default="12", help="of training for `icm generate`")
    parser.add_argument("--most", type=int, help="held-out images a class, fewer than all")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(Path.cwd()))
    study = Study(options.work, options)
    result = {
        "base_model": {"name": NAME, "package": "npm:" + "@".join(PACKAGE)},
        "images": "composed: cut-outs of tuxpaint-stamps-default on photographs of budgie-backgrounds",
        "quality": int(options.quality),
        **study.part("classes", study.classes),
        "recognised": study.part("recognised", study.recognised),
        "without_own": study.part("without_own", study.without_own),
        "variants": study.part("variants", study.variants),
        "unseen": study.part("unseen", study.unseen),
        "paper": PAPER,
        "machine": describe_machine(),
    }
    result["mean"] = summary(result)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
