"""Every row of the study as its mean with its interval, and every task as a dot.

python -m tests.benchmarks.unseen.figure UNSEEN.json FIGURE.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_LOWEST_GAIN = -0.8
"""Dots below it lie on the edge."""
_NAMES = {
    "icm-64": "icm, 64 samples",
    "icm-16": "icm, 16 samples",
    "icm-4": "icm, 4 samples",
    "icm-1": "icm, 1 sample",
    "icm-16-refine-20": "icm, 16 samples, 20 gradient steps more",
    "first-16": "icm, 16 samples, lengths not learned",
    "prompt-16": "16 samples in the prompt",
    "prompt-4": "4 samples in the prompt",
    "icm-64-refine-20": "icm, 64 samples, 20 gradient steps more",
    "icm-64-refine-60": "icm, 64 samples, 60 gradient steps more",
    "fresh-16": "a new LoRA, 60 steps on 16 samples",
    "fresh-64": "a new LoRA, 60 steps on 64 samples",
    "multitask": "one LoRA for all known tasks",
    "mean": "the known adapters' mean",
    "mixture": "mixture of the three nearest",
    "nearest": "nearest by task vector",
    "random": "control: a random direction",
    "shuffled": "control: another task's samples",
    "mean-vector": "control: samples of all known tasks",
    "prompt-64": "64 samples, as many as fit into 2,048 tokens of the prompt",
    "both-64": "icm, adapter and context, 64 samples",
    "both-16": "icm, adapter and context, 16 samples",
    "both-4": "icm, adapter and context, 4 samples",
    "own-prompt-16": "the LoRA of the task, and 16 samples in the prompt",
    "distil-16": "icm, 16 samples, distilled, without a context",
    "sentence": "icm, from a sentence",
    "sentence-prompt": "the sentence in the prompt",
}
_GENERATED = ("icm", "both", "distil")
"""What names of rows begin with that `icm generate` makes from samples."""


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the figure; the same study gives the same bytes."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "icm"
    from matplotlib import pyplot

    rows = sorted((row for row in document["rows"] if row in _NAMES), key=lambda row: document["rows"][row]["mean"])
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(rows) + 1.2), layout="constrained")
    for height, row in enumerate(rows):
        found, colour = document["rows"][row], "black" if row.startswith(_GENERATED) else "C0"
        gains = [max(gain, _LOWEST_GAIN) for gain in document["gains"][row].values()]
        axes.plot(gains, [height] * len(gains), "|", color="C7", markersize=9, alpha=0.6)
        spread = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
        axes.errorbar(found["mean"], height, xerr=spread, fmt="o", color=colour, capsize=3, markersize=6)
    axes.axvline(0.0, color="C7", linewidth=1)
    axes.axvline(1.0, color="C7", linewidth=1)
    highest = max(gain for row in rows for gain in document["gains"][row].values())
    axes.set_xlim(_LOWEST_GAIN, max(highest, 1.0) + 0.05)
    axes.set_yticks(range(len(rows)), [f"{_NAMES[row]} ({document['rows'][row]['tasks']} tasks)" for row in rows])
    axes.set_xlabel("retained gain: 0 the base model, 1 the LoRA of the task")
    axes.grid(visible=True, axis="x", alpha=0.2)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
