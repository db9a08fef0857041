"""NanoDet-g for icm: `icm base add nanodet-g PATH --loader tests.benchmarks.detection_fleet.loader:load`.

An adapter finds one class, in the channel of COCO's first one. So the base model's own score is that of its persons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from icmlora import CustomModel, Metric, base_model_loader
from icmlora.base_models.examples.forms import Scene, scene_of
from icmlora.base_models.examples.media import open_image
from icmlora.base_models.kinds.object_detection import Seen, mean_average_precision
from tests.benchmarks.detection_fleet.loss import image_loss
from tests.benchmarks.detection_fleet.nanodet import (
    BINS,
    NanoDet,
    best_of,
    boxes_of,
    load_network,
    pixels_of,
    points_of,
)

SIZE = 256  # pixels
POINTS = points_of(SIZE)
CHANNEL = 0
_LEAST_SCORE = 0.02
_NEVER = -1e4  # logit of a bin that a prediction of no or yes does not have


class Detector(CustomModel):
    """NanoDet-g with one class."""

    metric = Metric("mAP50", higher_is_better=True)

    def __init__(self, network: NanoDet, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self._options = network, {"device": device, "dtype": dtype}
        self.hidden_size = network.conv25.out_channels

    def example(self, row: Mapping[str, Any]) -> Scene:
        """Read an image with boxes."""
        return scene_of(row)

    def states(self, examples: Sequence[Scene]) -> torch.Tensor:
        """Return the mean features at the points inside the boxes; of the whole image if there are none."""
        levels = self.model.levels(self._pixels(examples))
        features = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        found = []
        for some, example in zip(features, examples, strict=True):
            inside = _inside(example)
            found.append(some[inside if inside.any() else slice(None)].mean(dim=0))
        return torch.stack(found)

    def predictions(self, examples: Sequence[Scene]) -> list[torch.Tensor]:
        """Return logits (predictions, 11): no or yes at each point, and the bins of each side at points in boxes."""
        found = []
        for logits, sides, example in zip(*self._heads(examples), examples, strict=True):
            there = torch.stack([torch.zeros_like(logits), logits], dim=-1)
            there = torch.nn.functional.pad(there, (0, BINS - 2), value=_NEVER)
            found.append(torch.cat([there, sides[_inside(example)].reshape(-1, BINS)]))
        return found

    def loss(self, examples: Sequence[Scene]) -> torch.Tensor:
        """Return the loss that adapters are trained with."""
        logits, sides = self._heads(examples)
        found = boxes_of(sides, POINTS)
        points = POINTS.to(found)
        losses = [
            image_loss(logits[number], found[number], corners(example).to(found), points)
            for number, example in enumerate(examples)
        ]
        return torch.stack(losses).sum()

    def measure(self, examples: Sequence[Scene]) -> tuple[float, Mapping[str, float]]:
        """Return mAP50, with mAP75 and mAP."""
        found = [self.detect(example) for example in examples]
        scenes = [Scene(one.image, tuple(map(tuple, _sized(one))), one.labels) for one in examples]
        score = mean_average_precision(scenes, [[CHANNEL] * len(one.boxes) for one in examples], found)
        return score.value, score.others

    @torch.no_grad()
    def detect(self, example: Scene) -> Seen:
        """Return what the model sees in an image, in pixels of the network's input."""
        logits, sides = self._heads([example])
        scores, boxes = logits[0].sigmoid(), boxes_of(sides, POINTS)[0]
        likely = scores > _LEAST_SCORE
        scores, boxes = scores[likely], boxes[likely]
        best = best_of(boxes, scores, overlap=0.6, most=100)
        return Seen(boxes[best].cpu(), scores[best].cpu(), torch.full((len(best),), CHANNEL))

    def _heads(self, examples: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of the class, (n, points), and sides, (n, points, 44), in float32."""
        logits, sides = self.model(self._pixels(examples))
        return logits[..., CHANNEL].float(), sides.float()

    def _pixels(self, examples: Sequence[Scene]) -> torch.Tensor:
        return torch.stack([pixels_of(open_image(example.image), SIZE) for example in examples]).to(**self._options)


def corners(scene: Scene) -> torch.Tensor:
    """Return the boxes of a scene as corners in pixels of the network's input, (n, 4)."""
    boxes = torch.tensor(_sized(scene)).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def _inside(scene: Scene) -> torch.Tensor:
    """Say which points are inside a box, (points,)."""
    left, top, right, bottom = corners(scene).unbind(1)
    x, y = POINTS[:, 0, None], POINTS[:, 1, None]
    return ((x > left) & (x < right) & (y > top) & (y < bottom)).any(dim=1)


def _sized(scene: Scene) -> list[list[float]]:
    image = open_image(scene.image)
    across, down = SIZE / image.width, SIZE / image.height
    return [[x * across, y * down, w * across, h * down] for x, y, w, h in scene.boxes]


@base_model_loader
def load(path: Path, device: torch.device, dtype: torch.dtype) -> Detector:
    """Load NanoDet-g from a folder that `nanodet.convert` wrote."""
    return Detector(load_network(path).to(device, dtype), device, dtype)
