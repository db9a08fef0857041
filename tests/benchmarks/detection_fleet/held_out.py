"""mAP50 and mAP75 of adapters in memory on the held-out images of the tasks, without a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.examples.media_archive import read_examples
from icmlora.base_models.kinds.custom_model import CustomModality
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import added, factors_of
from tests.benchmarks.detection_fleet.loader import Detector, load
from tests.benchmarks.detection_fleet.nanodet import NAME

Score = dict[str, float]


class HeldOut:
    """The base model, and the held-out images of each task.

    Args:
        work: The folder of the fleet, with `base` and `loras`.
        most: Images of each task that are measured on; all by default.
    """

    def __init__(self, work: Path, most: int | None = None) -> None:
        self.detector: Detector = load(work / "base", torch.device("cpu"), torch.float32)
        self.detector.model.requires_grad_(False)
        modality = CustomModality("loader:load", self.detector)
        self.base = BaseModel(NAME, self.detector.model, None, "", modality, self.detector.hidden_size, layers=1)
        self._folders = {path.name: path for part in ("loras", "variants") for path in (work / part).glob("*")}
        self._most = most
        self._scenes: dict[str, list[Any]] = {}

    def scenes(self, task: str) -> Sequence[Any]:
        """Return the held-out images of a task, read once."""
        if task not in self._scenes:
            file = self._folders[task] / "eval.jsonl"
            self._scenes[task] = list(parse_examples(read_examples(file), self.detector.example))[: self._most]
        return self._scenes[task]

    def samples(self, task: str) -> list[Any]:
        """Return the samples of a task."""
        return list(parse_examples(read_examples(self._folders[task] / "samples.jsonl"), self.detector.example))

    @torch.no_grad()
    def score(self, task: str, adapter: Adapter | None) -> Score:
        """Measure an adapter, or the base model alone."""
        with added(self.detector.model, {} if adapter is None else factors_of(adapter)):
            value, others = self.detector.measure(self.scenes(task))
        return {"mAP50": value, "mAP75": others["mAP75"]}


def mean_of(scores: Sequence[Score]) -> Score:
    """Average scores over tasks."""
    return {name: sum(score[name] for score in scores) / len(scores) for name in ("mAP50", "mAP75")}
