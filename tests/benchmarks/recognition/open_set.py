"""How often samples are given to the right task, and samples of an unknown task to none.

    python -m tests.benchmarks.recognition.open_set NAME=VECTORS.npz [NAME=VECTORS.npz:PART ...] [-o FILE.json]

VECTORS comes from `tests.benchmarks.recognition.vectors`. PART chooses tasks: `0-26` are the first 26, and `0-26/8x20`
makes twenty fleets of them with 8 tasks each, drawn at random. Each draw of held-out samples is read twice: among all
tasks of its fleet, and among all but its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icmlora.task_vectors.recognition import Recognizer

Vectors = NDArray[np.float32]
Fleet = tuple[dict[str, Vectors], dict[str, dict[str, Vectors]]]
"""The vectors of known tasks, and of each draw of their held-out samples."""


def main() -> None:
    """Measure the collections, print a line for each and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collections", nargs="+", metavar="NAME=VECTORS.npz[:PART]")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write, or to add to")
    given = parser.parse_args()
    document = json.loads(given.output.read_text()) if given.output and given.output.exists() else {}
    for collection in given.collections:
        name, _, place = collection.partition("=")
        path, _, part = place.partition(":")
        document[name] = counted([measured(*fleet) for fleet in fleets(Path(path), part)])
        shown = {key: value for key, value in document[name].items() if key != "missed"}
        sys.stdout.write(f"{name}: {json.dumps(shown)}\n")
        sys.stdout.flush()
        if given.output:
            given.output.write_text(json.dumps(document, indent=1) + "\n")


def fleets(path: Path, part: str = "") -> Iterator[Fleet]:
    """Yield one fleet of the tasks of a file, or several of some of them."""
    with np.load(path) as file:
        arrays = {name.rpartition("/"): file[name] for name in file.files}
    known = {task: vectors for (task, _, draw), vectors in arrays.items() if draw == "known"}
    names = list(known)
    for chosen in _parts(names, part):
        draws = {
            task: {draw: vectors for (name, _, draw), vectors in arrays.items() if name == task and draw != "known"}
            for task in chosen
        }
        yield {task: known[task] for task in chosen}, draws


def _parts(names: Sequence[str], part: str) -> Iterator[Sequence[str]]:
    span, _, drawn = part.partition("/")
    first, last = map(int, span.split("-")) if span else (0, len(names))
    names = names[first:last]
    if not drawn:
        yield names
        return
    size, count = map(int, drawn.split("x"))
    random = np.random.default_rng(0)
    for _ in range(count):
        yield [names[at] for at in sorted(random.choice(len(names), size, replace=False).tolist())]


def measured(known: dict[str, Vectors], draws: dict[str, dict[str, Vectors]]) -> list[dict[str, Any]]:
    """Return for every draw what it is taken for, among all tasks of a fleet and without its own."""
    rows: list[dict[str, Any]] = []
    among_all = Recognizer(known)
    for task in known:
        without = Recognizer({name: vectors for name, vectors in known.items() if name != task})
        for draw, vectors in draws[task].items():
            found, as_new = among_all.recognize(vectors), without.recognize(vectors)
            row = {"task": task, "draw": draw, "answer": found.task, "nearest": found.candidates[0].task}
            known_task = {one.task: one.probability for one in found.candidates}[task]
            rows.append(row | {"probability": known_task, "as_new": as_new.task, "new": as_new.new})
    return rows


def counted(groups: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Count answers; samples that `missed` are listed with what they were taken for."""
    rows = [row for group in groups for row in group]
    right = [row["answer"] == row["task"] for row in rows]
    new = [row["answer"] is None for row in rows]
    missed = [f"{row['task']}: {row['answer'] or 'none'}" for row in rows if row["answer"] != row["task"]]
    missed += [f"without {row['task']}: {row['as_new']}" for row in rows if row["as_new"] is not None]
    return {
        "fleets": len(groups),
        "tasks": len({row["task"] for row in rows}),
        "draws": len(rows),
        "right": sum(right),
        "taken_for_new": sum(new),
        "wrong": len(rows) - sum(right) - sum(new),
        "nearest_is_right": sum(row["nearest"] == row["task"] for row in rows),
        "called_new_when_unknown": sum(row["as_new"] is None for row in rows),
        # Mean of minus the logarithm of the probability of the true answer: less is better.
        "nats_known": round(float(np.mean([-np.log(max(row["probability"], 1e-9)) for row in rows])), 3),
        "nats_unknown": round(float(np.mean([-np.log(max(row["new"], 1e-9)) for row in rows])), 3),
        "missed": {name: missed.count(name) for name in sorted(set(missed))},
    }


if __name__ == "__main__":
    main()
