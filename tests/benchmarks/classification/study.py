"""A fleet of classifiers through icm: ingest, train, write every adapter from its original and from its code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.benchmarks.classification.rows import Rows
from tests.benchmarks.classification.train import Classifier, accuracy
from tests.benchmarks.performance.commands import icm, process


@dataclass(frozen=True)
class TaskResult:
    """What one task keeps and takes."""

    task: str
    classes: int
    held_out: int
    """Rows that the accuracies are measured on."""
    head_alone: float
    """Accuracy of the trained head on the base model without the LoRA."""
    original: float
    """Accuracy of the adapter as `icm` writes it from its original."""
    code: float
    """Accuracy of the adapter as `icm` writes it from its code."""
    same_class: float
    """Share of held-out rows that original and code put into the same class."""
    head_is_exact: bool
    """Whether the head's bytes are those of the trained one, from either source."""
    relative_error: float
    """Of dW."""
    original_bytes: int
    """Files of the original."""
    code_bytes: int
    extras_bytes: int
    """The head as the store keeps it for a code."""


@dataclass(frozen=True)
class Study:
    """A fleet's results and its bill."""

    tasks: list[TaskResult]
    generator_bytes: int
    bill: dict[str, Any]


def run(fleet: Path, base: Path, data: Mapping[str, Rows], work: Path) -> Study:
    """Ingest the adapters of a folder, train on them, and measure each from disk."""
    store = work / "store"
    process(icm("ingest", str(fleet), "--no-vectors", store=store))
    process(icm("train", "--no-eval", "--refine", "0", store=store))
    bill = json.loads(process(icm("stats", "--json", store=store)))
    (listed,) = bill["fleets"]
    tasks = []
    for entry in listed["tasks"]:
        name = entry["task"]
        for source in ("original", "code"):
            output = str(work / source / name)
            process(icm("materialize", name, "--output", output, "--source", source, store=store))
        tasks.append(_measure(entry, fleet / name, base, data[name], work))
    return Study(tasks, listed["decoder_size"], bill)


def _measure(entry: Mapping[str, Any], trained: Path, base: Path, rows: Rows, work: Path) -> TaskResult:
    name, count = entry["task"], len(rows.classes)
    folders = work / "original" / name, work / "code" / name
    original, code = (Classifier(base, folder, count) for folder in folders)
    of_original, of_code = original.logits(rows.held_out), code.logits(rows.held_out)
    return TaskResult(
        task=name,
        classes=count,
        held_out=len(rows.held_out),
        head_alone=accuracy(original.logits_of_head(rows.held_out), rows.held_out),
        original=accuracy(of_original, rows.held_out),
        code=accuracy(of_code, rows.held_out),
        same_class=round((of_original.argmax(1) == of_code.argmax(1)).float().mean().item(), 4),
        head_is_exact=all(head(folder) == head(trained) for folder in folders),
        relative_error=entry["relative_error"],
        original_bytes=entry["original_size"],
        code_bytes=entry["code_size"],
        extras_bytes=entry["extras_bytes"],
    )


def head(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Return the tensors of an adapter that are no LoRA factors, as bytes."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        for name, tensor in tensors.items()
        if "lora_" not in name
    }


def table(study: Study) -> str:
    """Return a Markdown table: a row a task, then the fleet."""
    lines = [
        "| task | classes | head alone | original | code | same class | head exact | original, bytes | code | extras |",
        "|---|--:|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for task in study.tasks:
        scores = " | ".join(f"{score:.3f}" for score in (task.head_alone, task.original, task.code, task.same_class))
        sizes = " | ".join(f"{size:,}" for size in (task.original_bytes, task.code_bytes, task.extras_bytes))
        exact = "yes" if task.head_is_exact else "**no**"
        lines.append(f"| {task.task} | {task.classes} | {scores} | {exact} | {sizes} |")
    return "\n".join(lines)
