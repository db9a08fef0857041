"""A second modality, as small as one can be: a classifier of vectors. It proves that adding one takes one file.

{"vector": [8 numbers], "label": 0 to 2}
vector (8,) --encoder, tanh--> (16,) --mix, tanh--> hidden state (16,) --head--> logits (3,)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from icmlora.base_models.examples.chat_template import Templates
from icmlora.base_models.examples.examples import Examples
from icmlora.base_models.finding.fingerprint import fingerprint_base
from icmlora.base_models.finding.lookup import FoundBase, read_config
from icmlora.base_models.modality import BaseModel, Metric, Modality, Score
from icmlora.errors import DataError

INPUTS, HIDDEN, CLASSES = 8, 16, 3


@dataclass(frozen=True)
class Point:
    """One example; it is also what the model reads."""

    vector: tuple[float, ...]
    label: int
    count: int = 1
    size: int = 1


class Classifier(nn.Module):
    """The network."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(INPUTS, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def hidden(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return hidden states, (n, 16)."""
        hidden: torch.Tensor = self.mix(self.encoder(vectors).tanh()).tanh()
        return hidden

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return logits, (n, 3)."""
        logits: torch.Tensor = self.head(self.hidden(vectors))
        return logits


class VectorClassifier(Modality[Point, Point]):
    """Small classifiers of vectors."""

    name = "vector classifier"
    metric = Metric("accuracy", higher_is_better=True)

    def suits(self, found: FoundBase) -> bool:
        """Judge by the configuration."""
        return not found.is_gguf and read_config(found.path).get("model_type") == "toy-classifier"

    def load(
        self,
        found: FoundBase,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> BaseModel:
        """Load the network."""
        model = Classifier()
        model.load_state_dict(load_file(found.weights[0]))
        model.requires_grad_(False).train(False).to(device, dtype or torch.float32)
        return BaseModel(found.label, model, None, fingerprint or fingerprint_base(found), self, HIDDEN, 3)

    def example(self, row: Mapping[str, Any]) -> Point:
        """Read one labelled vector."""
        try:
            return Point(tuple(map(float, row["vector"])), int(row["label"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError("is not a labelled vector") from error

    def readable(self, base: BaseModel, examples: Sequence[Point], template: Templates | None = None) -> Examples:
        """Return the examples: there is nothing to render."""
        return Examples(tuple(examples))

    def prepare(self, base: BaseModel, examples: Sequence[Point], limit: int, *, whole: bool = False) -> list[Point]:
        """Return the examples: the model reads them as they are."""
        return list(examples)

    def states(self, base: BaseModel, examples: Sequence[Point], limit: int) -> torch.Tensor:
        """Return what the head reads."""
        with torch.no_grad():
            hidden: torch.Tensor = base.model.hidden(self._vectors(base, examples)).float()
        return hidden

    def logits(self, base: BaseModel, items: Sequence[Point], *, from_leaf: bool = False) -> list[torch.Tensor]:
        """Return one row of class logits for each example."""
        logits = base.model(self._vectors(base, items).requires_grad_(from_leaf))
        return list(logits[:, None])

    def wanted(self, item: Point) -> list[int]:
        """Return the label."""
        return [item.label]

    def counted(self, base: BaseModel, items: Sequence[Point]) -> torch.Tensor:
        """Return that every row is real."""
        return torch.ones(len(items), dtype=torch.bool, device=base.device)

    def measure(self, base: BaseModel, examples: Sequence[Point], limit: int) -> Score:
        """Return the accuracy."""
        with torch.no_grad():
            guesses = torch.cat(self.logits(base, examples)).argmax(dim=-1).tolist()
        right = sum(guess == example.label for guess, example in zip(guesses, examples, strict=True))
        return Score(right / len(examples), len(examples))

    def _vectors(self, base: BaseModel, examples: Sequence[Point]) -> torch.Tensor:
        dtype = next(base.model.parameters()).dtype
        return torch.tensor([example.vector for example in examples], device=base.device, dtype=dtype)


def write_classifier(folder: Path) -> Path:
    """Write a random network as a folder that icm finds."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_file(Classifier().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy-classifier", "architectures": ["Toy"]}))
    return folder


def points(task: int, count: int, seed: int = 0) -> bytes:
    """Return the examples of a task: which third of the numbers is largest, with the labels turned by the task."""
    random = torch.Generator().manual_seed(1000 * seed + task)
    lines = []
    for vector in torch.randn(count, INPUTS, generator=random):
        label = (int(vector[:CLASSES].argmax()) + task) % CLASSES
        lines.append(json.dumps({"vector": [round(float(value), 4) for value in vector], "label": label}))
    return "\n".join(lines).encode() + b"\n"
