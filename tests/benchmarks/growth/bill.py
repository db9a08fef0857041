"""The bill of a fleet: the generator once, and a code for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def per_task(result: Result, tasks: int | None = None) -> float:
    """Return all bytes divided by the tasks, those of the fleet or another number of tasks like them."""
    return float(result["generator_bytes"] / (tasks or result["tasks"]) + result["seen"]["code_bytes"])


def break_even(results: Sequence[Result]) -> list[Result]:
    """Say for each trained generator from how many tasks on it is smaller than an untrained one of the same quality.

    Both are of the default width and of the fleet's size where there is such an untrained one, else of the largest.
    None where its codes are no smaller.
    """
    plain = [result for result in results if not result["trained"]]
    found = []
    for result in results:
        like = [other for other in plain if other["quality"] == result["quality"]]
        if not result["trained"] or result["same_start"] is None or not like:
            continue
        other = min(like, key=lambda other: abs(other["tasks"] - result["tasks"]))
        gain = other["seen"]["code_bytes"] - result["seen"]["code_bytes"]
        more = result["generator_bytes"] - other["generator_bytes"]
        found.append(
            {
                **{key: result[key] for key in ("tasks", "width", "quality", "steps")},
                "saved_per_code": round(gain, 1),
                "cost_once": more,
                "tasks_to_pay": round(more / gain, 1) if gain > 0 else None,
            }
        )
    return found


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
