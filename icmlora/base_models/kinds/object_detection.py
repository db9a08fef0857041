"""Object detectors such as DETR, YOLOS and RT-DETR; measured by mean average precision at 0.5 IoU.

Boxes use COCO's format (Lin et al., arXiv 1405.0312): [x, y, width, height] in image pixels, x to the right and y down
from the upper left corner.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.media import Media, image_of, image_size, open_image
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs
from icmlora.base_models.kinds.text_classification import Label, label_number, label_of
from icmlora.base_models.modality import BaseModel, Metric, Score
from icmlora.errors import DataError

if TYPE_CHECKING:
    import torch

Box = tuple[float, float, float, float]
_SLACK = 1.0  # pixels that a box may extend beyond its image, because annotations are rounded


@dataclass(frozen=True)
class Scene:
    """An image, the boxes of the objects in it, and their classes."""

    image: Media
    boxes: tuple[Box, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True, eq=False)
class Detection(Inputs):
    """A scene as the model reads it.

    Attributes:
        wanted: `class_labels` (boxes,) and `boxes` (boxes, 4): centre and size as shares of the image.
        height: Image height in pixels.
        width: Image width in pixels.
    """

    wanted: Mapping[str, torch.Tensor] | None = None
    height: int = 1
    width: int = 1

    @property
    def count(self) -> int:
        """One image."""
        return 1


class ObjectDetection(AutoModality):
    """Models that `transformers.AutoModelForObjectDetection` loads."""

    name = "object detector"
    reads = ("image",)
    metric = Metric("mAP50", higher_is_better=True)
    auto_class = "AutoModelForObjectDetection"
    processor_class = "AutoImageProcessor"

    def example(self, row: Mapping[str, Any]) -> Scene:
        """Read an image with boxes and labels; an image without objects is valid too."""
        return scene_of(row)

    def inputs(self, base: BaseModel, example: Scene, limit: int) -> Detection:
        """Convert the image to pixels and the boxes to shares of the image size."""
        import torch

        image = open_image(example.image)
        pixels = base.processor(images=image, return_tensors="pt")["pixel_values"]
        labels = torch.tensor([label_number(base, label) for label in example.labels], dtype=torch.int64)
        corners = torch.tensor(example.boxes, dtype=torch.float32).reshape(-1, 4)
        centres = corners[:, :2] + corners[:, 2:] / 2
        size = torch.tensor([image.width, image.height], dtype=torch.float32)
        boxes = torch.cat([centres / size, corners[:, 2:] / size], dim=1)
        wanted = {"class_labels": labels, "boxes": boxes}
        return Detection({"pixel_values": pixels}, (), wanted=wanted, height=image.height, width=image.width)

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return the mean of the last hidden states of each image, (images, d)."""
        return outputs.last_hidden_state.mean(dim=1)  # type: ignore[no-any-return]

    def loss(self, base: BaseModel, items: Sequence[Inputs]) -> torch.Tensor:
        """Return the model's own training loss, summed over the images: a scalar with gradients."""
        import torch

        losses = []
        for item in items:
            assert isinstance(item, Detection)
            assert item.wanted is not None
            pixels = item.tensors["pixel_values"].to(base.device, base.input_dtype)
            wanted = {name: value.to(base.device) for name, value in item.wanted.items()}
            with _loss_in_float32(base.model):
                losses.append(base.model(pixel_values=pixels.requires_grad_(), labels=[wanted]).loss)
        return torch.stack(losses).sum()

    def wanted(self, item: Inputs) -> None:
        """Return None: the loss needs boxes too."""

    def measure(self, base: BaseModel, examples: Sequence[Scene], limit: int) -> Score:
        """Return mAP50, and mAP75 as an additional figure."""
        import torch

        found = []
        for example in examples:
            item = self.inputs(base, example, limit)
            pixels = item.tensors["pixel_values"].to(base.device, base.input_dtype)
            with torch.inference_mode():
                outputs = base.model(pixel_values=pixels)
            size = [(item.height, item.width)]
            (seen,) = base.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size)
            found.append(Seen(**{name: value.float().cpu() for name, value in seen.items()}))
        labels = [[label_number(base, label) for label in example.labels] for example in examples]
        return mean_average_precision(examples, labels, found)


@contextmanager
def _loss_in_float32(model: Any) -> Iterator[None]:
    """Compute a detector's training loss in float32 inside the block: torch has no distances in bfloat16."""
    usual = model.loss_function

    def loss(*arguments: Any, **named: Any) -> Any:
        return usual(*map(_wide, arguments), **{name: _wide(value) for name, value in named.items()})

    model.loss_function = loss
    try:
        yield
    finally:
        model.loss_function = usual


def _wide(value: Any) -> Any:
    import torch

    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def scene_of(row: Mapping[str, Any]) -> Scene:
    """Convert a row to a scene; raise `DataError` if it is not an image with valid boxes and one label per box."""
    boxes, labels = row.get("boxes"), row.get("labels")
    if not isinstance(boxes, list) or not isinstance(labels, list):
        raise DataError("has no list of boxes and labels")
    if len(boxes) != len(labels):
        raise DataError(f"has {len(boxes)} boxes, but {len(labels)} labels")
    named = tuple(label_of({"label": label}) for label in labels)
    scene = Scene(image_of(row), tuple(map(_box, boxes)), named)
    check_boxes(scene, *image_size(scene.image))
    return scene


def _box(value: Any) -> Box:
    numbers = value if isinstance(value, list) else []
    is_box = len(numbers) == 4 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if not is_box or not all(map(math.isfinite, numbers)):
        raise DataError("has a box that is not four numbers: [x, y, width, height]")
    x, y, width, height = map(float, numbers)
    if width <= 0 or height <= 0:
        raise DataError(f"has a box without an area: {numbers}")
    return x, y, width, height


def check_boxes(scene: Scene, width: int, height: int) -> None:
    """Raise `DataError` if a box extends beyond the image."""
    for x, y, across, down in scene.boxes:
        if min(x, y) < -_SLACK or x + across > width + _SLACK or y + down > height + _SLACK:
            box = [round(side, 1) for side in (x, y, across, down)]
            raise DataError(f"has the box {box} outside its image, which is {width} x {height} pixels")


@dataclass(frozen=True, eq=False)
class Seen:
    """The objects detected in one image: boxes (n, 4) as corners in pixels, scores (n,) and classes (n,)."""

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


def mean_average_precision(scenes: Sequence[Scene], labels: Sequence[Sequence[int]], found: Sequence[Seen]) -> Score:
    """Return COCO's mAP50, and mAP75 as an additional figure, for the hundred best detections per image.

    `scenes` contain the ground-truth boxes, and `labels` their class numbers.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, guesses = COCO(), COCO()
    images = [{"id": number} for number in range(len(scenes))]
    categories = [{"id": number} for number in sorted({label for some in labels for label in some})]
    there = [
        _annotation(number, box, label)
        for number, (scene, some) in enumerate(zip(scenes, labels, strict=True))
        for box, label in zip(scene.boxes, some, strict=True)
    ]
    if not there:
        return Score(0.0, len(scenes), others={"mAP75": 0.0})
    seen = []
    for number, one in enumerate(found):
        boxes = one.boxes.clone()
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, label in zip(boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True):
            seen.append(_annotation(number, box, label) | {"score": score})
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for table, rows in ((truth, there), (guesses, seen)):
            rows = [row | {"id": place} for place, row in enumerate(rows, start=1)]
            table.dataset = {"images": images, "categories": categories, "annotations": rows}
            table.createIndex()
        judge = COCOeval(truth, guesses, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    half, three_quarters = (max(0.0, float(value)) for value in judge.stats[1:3])
    return Score(half, len(scenes), others={"mAP75": three_quarters})


def _annotation(image: int, box: Sequence[float], label: int) -> dict[str, Any]:
    area = box[2] * box[3]
    return {"image_id": image, "bbox": list(box), "category_id": label, "area": area, "iscrowd": 0}
