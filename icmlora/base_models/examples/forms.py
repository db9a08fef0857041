"""The forms of an example for kinds of base models that read more than text. Never imports torch.

    {"audio": FILE, "text": "..."}                                       speech recognisers
    {"image": FILE, "prompt": "...", "completion": "..."}                image-and-text models
    {"image": FILE, "label": NAME or NUMBER}                             image classifiers
    {"text": "...", "label": NAME or NUMBER}                             text classifiers
    {"image": FILE, "boxes": [[x, y, width, height]], "labels": [...]}   object detectors

Boxes use COCO's format (Lin et al., arXiv 1405.0312): pixels, x to the right and y down from the upper left corner.
Every reader of a row raises `DataError`, with a fact about the row, if the row has another form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from icmlora.base_models.examples.chats import Chat
from icmlora.base_models.examples.examples import Example, text_example
from icmlora.base_models.examples.media import Media, image_of, image_size, media_of
from icmlora.errors import DataError

Label = str | int
"""The name of a class, or its number."""
Box = tuple[float, float, float, float]
Shown = TypeVar("Shown", str, Media)
_SLACK = 1.0  # pixels that a box may extend beyond its image, because annotations are rounded


@dataclass(frozen=True)
class Utterance:
    """A recording and its transcript."""

    audio: Media
    text: str


@dataclass(frozen=True)
class ImagePrompt:
    """An image, a prompt, and the answer to them."""

    image: Media
    prompt: str
    completion: str


@dataclass(frozen=True)
class Labelled(Generic[Shown]):
    """A text or an image, and its class."""

    shown: Shown
    label: Label


@dataclass(frozen=True)
class Scene:
    """An image, the boxes of the objects in it, and their classes."""

    image: Media
    boxes: tuple[Box, ...]
    labels: tuple[Label, ...]


def utterance_of(row: Mapping[str, Any]) -> Utterance:
    """Read a recording and its transcript."""
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError("has no text for its recording")
    return Utterance(media_of(row, "audio"), text)


def image_prompt_of(row: Mapping[str, Any]) -> ImagePrompt:
    """Read an image, an optional prompt, and a completion."""
    prompt, completion = row.get("prompt", ""), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion.strip():
        raise DataError("has no prompt and completion for its image")
    return ImagePrompt(image_of(row), prompt, completion)


def labelled_image_of(row: Mapping[str, Any]) -> Labelled[Media]:
    """Read an image and its label."""
    return Labelled(image_of(row), _label(row.get("label")))


def labelled_text_of(row: Mapping[str, Any]) -> Labelled[str]:
    """Read a text and its label."""
    label, text = _label(row.get("label")), row.get("text")
    return Labelled(plain_text_of({"text": text} if isinstance(text, str) else row).text, label)


def plain_text_of(row: Mapping[str, Any]) -> Example:
    """Read a text, or prompt and completion; a chat needs a plain form."""
    example = text_example(row)
    if isinstance(example, Chat):
        if example.plain is None:
            raise DataError("is a chat, which masked language models do not read")
        return Example(*example.plain)
    return example


def scene_of(row: Mapping[str, Any]) -> Scene:
    """Read an image with boxes and one label per box; an image without objects is valid too."""
    boxes, labels = row.get("boxes"), row.get("labels")
    if not isinstance(boxes, list) or not isinstance(labels, list):
        raise DataError("has no list of boxes and labels")
    if len(boxes) != len(labels):
        raise DataError(f"has {len(boxes)} boxes, but {len(labels)} labels")
    named = tuple(map(_label, labels))
    scene = Scene(image_of(row), tuple(map(_box, boxes)), named)
    width, height = image_size(scene.image)
    for x, y, across, down in scene.boxes:
        if min(x, y) < -_SLACK or x + across > width + _SLACK or y + down > height + _SLACK:
            box = [round(side, 1) for side in (x, y, across, down)]
            raise DataError(f"has the box {box} outside its image, which is {width} x {height} pixels")
    return scene


def _label(label: Any) -> Label:
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError("has no label" if label is None else "has a label that is neither a name nor a number")
    return label


def _box(value: Any) -> Box:
    numbers = value if isinstance(value, list) else []
    is_box = len(numbers) == 4 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if not is_box or not all(map(math.isfinite, numbers)):
        raise DataError("has a box that is not four numbers: [x, y, width, height]")
    x, y, width, height = map(float, numbers)
    if width <= 0 or height <= 0:
        raise DataError(f"has a box without an area: {numbers}")
    return x, y, width, height


READERS: list[Callable[[Mapping[str, Any]], Any]] = [
    scene_of,
    labelled_image_of,
    utterance_of,
    image_prompt_of,
    labelled_text_of,
    plain_text_of,
    text_example,
]
"""The readers of all kinds of base models, the most general last."""
