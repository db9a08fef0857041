"""The growth study as a table, and how far any task moved."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.growing.study import Stage


def drift(stages: Sequence[Stage]) -> float:
    """Return the largest difference between a task's gain when it was added and any later one."""
    first: dict[str, float] = {}
    largest = 0.0
    for stage in stages:
        for name, gain in stage.gains.items():
            largest = max(largest, abs(gain - first.setdefault(name, gain)))
    return largest


def table(stages: Sequence[Stage]) -> str:
    """Return a Markdown table: a row a task, a column a stage."""
    tasks = list(stages[-1].gains)
    lines = [
        "| task | " + " | ".join(f"{len(stage.gains)} tasks" for stage in stages) + " |",
        "|---|" + "--:|" * len(stages),
    ]
    for task in tasks:
        cells = [f"{stage.gains[task]:.4f}" if task in stage.gains else "" for stage in stages]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    lines.append("| **mean** | " + " | ".join(f"{_mean(stage):.4f}" for stage in stages) + " |")
    lines.append("| seconds | " + " | ".join(f"{stage.seconds:.0f}" for stage in stages) + " |")
    lines.append("| generator, bytes | " + " | ".join(f"{stage.generator_bytes:,}" for stage in stages) + " |")
    lines.append("| codes, bytes | " + " | ".join(f"{stage.code_bytes:,}" for stage in stages) + " |")
    return "\n".join(lines)


def _mean(stage: Stage) -> float:
    return sum(stage.gains.values()) / len(stage.gains)
