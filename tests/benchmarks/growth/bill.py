"""The bill of a fleet: the generator once, and a code for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def per_task(result: Result, tasks: int | None = None) -> float:
    """Return all bytes divided by the tasks, those of the fleet or another number of tasks like them."""
    return float(result["generator_bytes"] / (tasks or result["tasks"]) + result["seen"]["code_bytes"])


def break_even(results: Sequence[Result]) -> list[Result]:
    """Say for each trained generator from how many tasks on it is smaller than an untrained one.

    The untrained one is of the same sort of fleet and quality and of the nearest size. None where codes are no smaller.
    """
    found = []
    for result in results:
        like = [each for each in results if not each["trained"] and _sort(each) == _sort(result)]
        if not result["trained"] or not like:
            continue
        plain = min(like, key=lambda each: abs(each["tasks"] - result["tasks"]))
        more = result["generator_bytes"] - plain["generator_bytes"]
        row = {key: result[key] for key in ("tasks", "same_start", "width", "quality", "steps")} | {"cost_once": more}
        for sample in ("seen", "unseen"):
            if result[sample]:
                saved = plain[sample]["code_bytes"] - result[sample]["code_bytes"]
                row[sample] = {
                    "saved_per_code": round(saved, 1),
                    "tasks_to_pay": round(max(more / saved, 0.0), 1) if saved > 0 else None,
                }
        found.append(row)
    return found


def _sort(result: Result) -> tuple[Any, ...]:
    return result["same_start"], result["quality"]


def table(results: Sequence[Result]) -> str:
    """Write settings as a Markdown table."""
    lines = [
        "| tasks | width | quality | steps | generator | code, seen | code, unseen | per task | training | peak |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        tasks = f"{result['tasks']}{' real' if result['same_start'] is None else ''}"
        unseen = f"{result['unseen']['code_bytes']:,.0f}" if result["unseen"] else ""
        sizes = f"{result['generator_bytes']:,} | {result['seen']['code_bytes']:,.0f} | {unseen}"
        cost = f"{result['training']['cpu_seconds']:.0f} s | {result['peak_training_bytes'] / 2**20:.0f} MiB"
        shape = f"{result['width']} | {result['quality']} | {result['steps']}"
        lines.append(f"| {tasks} | {shape} | {sizes} | {per_task(result):,.0f} | {cost} |")
    return "\n".join(lines)
