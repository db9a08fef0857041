"""Keep the table in the example fleet's README true: it is made from the adapter cards and the files.

usage: python -m tests.benchmarks.example_fleet.table FLEET
"""

import re
import sys
from pathlib import Path

from tests.benchmarks.example_fleet.tasks import TASKS, Task
from tests.benchmarks.example_fleet.texts import TEXTS

BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
HEAD = """| task | rank | alpha | targets | seed | base | with adapter | bytes | text | licence |
|---|--:|--:|---|--:|--:|--:|--:|---|---|
"""


def losses(card: str) -> tuple[str, str]:
    """Return what a card says: nats per token of the base model and of the adapter, as printed."""
    found = re.search(r"base ([\d.]+), with the adapter ([\d.]+)", card)
    if found is None:
        raise ValueError("the card has no line `base X, with the adapter Y`")
    return found[1], found[2]


def row(task: Task, fleet: Path) -> str:
    """Return the table row of one task."""
    folder = fleet / task.name
    before, after = losses((folder / "README.md").read_text("utf-8"))
    targets = ", ".join(name.removesuffix("_proj") for name in task.targets)
    alpha = f"{task.alpha} rsLoRA" if task.rslora else str(task.alpha)
    size = (folder / "adapter_model.safetensors").stat().st_size
    text = TEXTS[task.name]
    cells = (task.name, str(task.rank), alpha, targets, str(task.seed), before, after, f"{size:,}", text.source)
    return "| " + " | ".join((*cells, text.licence)) + " |\n"


def table(fleet: Path) -> str:
    """Return the whole table, ordered by name."""
    return HEAD + "".join(row(task, fleet) for task in sorted(TASKS, key=lambda task: task.name))


def main(fleet: Path) -> None:
    """Replace what stands between the two markers of the README by the current table."""
    path = fleet / "README.md"
    top, rest = path.read_text("utf-8").split(BEGIN)
    path.write_text(top + BEGIN + table(fleet) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
