"""A folder of PEFT adapters with held-out text, one folder per task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from icmlora.adapter.model import Adapter
from icmlora.base_models.reading import EvaluationData
from icmlora.formats.discovery.folder import load_adapter
from icmlora.formats.peft.peft import CONFIG_NAME, WEIGHTS_NAME

BF16 = 2  # bytes a value
TEXTS = "eval.jsonl"


class FleetFolder(Mapping[str, Adapter]):
    """The final adapters under a folder, read whenever they are asked for.

    Args:
        root: The folder.
        tasks: Names of subfolders; all that hold an adapter and held-out text if none are given.
    """

    def __init__(self, root: Path, tasks: Sequence[str] = ()) -> None:
        found = sorted(folder.parent.name for folder in root.glob(f"*/{CONFIG_NAME}"))
        usable = [name for name in found if (root / name / TEXTS).is_file() and (root / name / WEIGHTS_NAME).is_file()]
        unknown = sorted(set(tasks) - set(usable))
        if unknown or not usable:
            raise SystemExit(f"no adapter with held-out text: {', '.join(unknown) or root}")
        self.root = root
        self._tasks = [name for name in usable if not tasks or name in tasks]

    def __getitem__(self, task: str) -> Adapter:
        if task not in self._tasks:
            raise KeyError(task)
        return load_adapter(self.folder(task))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def folder(self, task: str) -> Path:
        """Return a task's folder."""
        return self.root / task

    def texts(self, task: str) -> EvaluationData:
        """Return a task's held-out text."""
        path = self.folder(task) / TEXTS
        return EvaluationData.parse(path.read_bytes(), path=path)

    @cached_property
    def bf16_sizes(self) -> dict[str, int]:
        """Task to the bytes of its values in bfloat16, the denominator."""
        return {task: BF16 * sum(shape.parameters for shape in self[task].layout) for task in self}

    @cached_property
    def digest(self) -> str:
        """What names the fleet: the bytes of every configuration and tensor file."""
        total = hashlib.sha256()
        for task in self:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                content = (self.folder(task) / name).read_bytes()
                total.update(f"{task}/{name} {hashlib.sha256(content).hexdigest()}\n".encode())
        return total.hexdigest()
