"""Object detectors such as DETR, YOLOS and RT-DETR; measured by mean average precision at 0.5 IoU."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch

from icmlora.base_models.examples.forms import Scene, scene_of
from icmlora.base_models.examples.media import open_image
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs
from icmlora.base_models.kinds.classification import label_number
from icmlora.base_models.modality import BaseModel, Metric, Score


@dataclass(frozen=True, eq=False, kw_only=True)
class Detection(Inputs):
    """A scene as the model reads it."""

    # `class_labels` (boxes,) and `boxes` (boxes, 4): centre and size as shares of the image.
    wanted: Mapping[str, torch.Tensor]
    height: int  # image height in pixels
    width: int  # image width in pixels

    @property
    def count(self) -> int:
        return 1


class ObjectDetection(AutoModality):
    """Models that `transformers.AutoModelForObjectDetection` loads."""

    name = "object detector"
    reads = ("image",)
    metric = Metric("mAP50", higher_is_better=True)
    auto_class = "AutoModelForObjectDetection"
    processor_class = "AutoImageProcessor"

    def example(self, row: Mapping[str, Any]) -> Scene:
        return scene_of(row)

    def inputs(self, base: BaseModel, example: Scene, limit: int) -> Detection:
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
        return outputs.last_hidden_state.mean(dim=1)  # type: ignore[no-any-return]

    def loss(self, base: BaseModel, items: Sequence[Detection]) -> torch.Tensor:
        """Return the model's own training loss, summed over the images: a scalar with gradients."""
        losses, usual = [], base.model.loss_function

        def in_float32(*arguments: Any, **named: Any) -> Any:  # torch has no distances in bfloat16
            return usual(*map(_wide, arguments), **{name: _wide(value) for name, value in named.items()})

        base.model.loss_function = in_float32
        try:
            for item in items:
                pixels = item.tensors["pixel_values"].to(base.device, base.input_dtype)
                wanted = {name: value.to(base.device) for name, value in item.wanted.items()}
                losses.append(base.model(pixel_values=pixels.requires_grad_(), labels=[wanted]).loss)
        finally:
            base.model.loss_function = usual
        return torch.stack(losses).sum()

    def wanted(self, item: Inputs) -> None:
        """Return None: the loss needs boxes too."""

    def measure(self, base: BaseModel, examples: Sequence[Scene], limit: int) -> Score:
        labels, found = [], []
        for example in examples:
            item = self.inputs(base, example, limit)
            pixels = item.tensors["pixel_values"].to(base.device, base.input_dtype)
            with torch.inference_mode():
                outputs = base.model(pixel_values=pixels)
            size = [(item.height, item.width)]
            (seen,) = base.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size)
            found.append(Seen(**{name: value.float().cpu() for name, value in seen.items()}))
            labels.append(item.wanted["class_labels"].tolist())
        return mean_average_precision(examples, labels, found)


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

    there, seen = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, (scene, classes, one) in enumerate(zip(scenes, labels, found, strict=True)):
        there += [_annotation(number, box, label) for box, label in zip(scene.boxes, classes, strict=True)]
        boxes = torch.cat([one.boxes[:, :2], one.boxes[:, 2:] - one.boxes[:, :2]], dim=1)
        for box, score, label in zip(boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True):
            seen.append(_annotation(number, box, label) | {"score": score})
    if not there:
        return Score(0.0, len(scenes), others={"mAP75": 0.0})
    truth, guesses = COCO(), COCO()
    images = [{"id": number} for number in range(len(scenes))]
    categories = [{"id": number} for number in sorted({label for some in labels for label in some})]
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for table, rows in ((truth, there), (guesses, seen)):
            numbered = [row | {"id": place} for place, row in enumerate(rows, start=1)]
            table.dataset = {"images": images, "categories": categories, "annotations": numbered}
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


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
