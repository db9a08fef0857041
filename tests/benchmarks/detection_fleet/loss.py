"""The training loss of one class: quality focal loss of its logits, and generalised IoU of assigned boxes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.benchmarks.detection_fleet.nanodet import overlaps

MEDIUM, LARGE = 48, 112  # longest side in pixels from which the level of stride 16 or 32 is responsible


def image_loss(logits: torch.Tensor, found: torch.Tensor, boxes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the loss of one image.

    Args:
        logits: Of the class, (points,).
        found: The box of each point, (points, 4).
        boxes: The boxes that are there, (n, 4).
        points: x, y and stride, (points, 3).
    """
    target = _assigned(boxes, points)
    wanted, score = (target >= 0).float(), logits.sigmoid()
    focal = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * (score - wanted).abs() ** 2
    loss = focal.sum() / wanted.sum().clamp_min(1)
    if (target >= 0).any():
        loss = loss + (1 - _generalised(found[target >= 0], boxes[target[target >= 0]])).mean()
    return loss


def _assigned(boxes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return for each point the number of its box, or -1: near the centre, inside, on the level for the box's size."""
    target = torch.full((len(points),), -1, device=boxes.device)
    x, y, stride = points.to(boxes).unbind(1)
    for number, (left, top, right, bottom) in enumerate(boxes.tolist()):
        longest = max(right - left, bottom - top)
        level = 8 if longest < MEDIUM else 16 if longest < LARGE else 32
        near = ((x - (left + right) / 2).abs() < 1.5 * level) & ((y - (top + bottom) / 2).abs() < 1.5 * level)
        inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        target[(stride == level) & near & inside] = number
    return target


def _generalised(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    shared = overlaps(boxes, others).diagonal()
    hull = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    areas = sum((some[:, 2:] - some[:, :2]).clamp_min(0).prod(-1) for some in (boxes, others))
    union = areas / (1 + shared)  # as shared = intersection / union, and areas = union + intersection
    whole = hull.prod(-1).clamp_min(1e-9)
    return shared - (whole - union) / whole
