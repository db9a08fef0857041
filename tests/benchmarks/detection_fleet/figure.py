"""Draw what the base model, the original and the decoded code find in held-out images.

usage: python -m tests.benchmarks.detection_fleet.figure [--work FOLDER] [--out FILE.jpg]

Reads the store that the study made. Of each class it draws the first held-out image, chosen before anything was run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from icmlora import Adapter, Fleet
from icmlora.base_models.examples.media import open_image
from icmlora.base_models.running.lora_hooks import added, factors_of
from tests.benchmarks.detection_fleet.held_out import HeldOut
from tests.benchmarks.detection_fleet.loader import SIZE, corners

PICTURE = Path(__file__).parents[3] / "docs" / "results" / "detection.jpg"
CLASSES = ("mammal", "fruit", "bird", "vehicle", "coin", "flower")
COLUMNS = ("labelled", "base model", "original", "code")
_SIDE, _GAP, _HEADING, _NAME = 216, 8, 30, 84  # pixels
_LEAST_SCORE = 0.3  # of a box that is drawn
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_COLOURS = ((255, 255, 255), (255, 176, 0), (0, 190, 255), (255, 60, 130))  # of the boxes of each column


def main() -> None:
    """Draw a row for each class and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/detection-fleet"))
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    held_out, fleet = HeldOut(options.work, most=1), Fleet(options.work / "store")
    width = _NAME + len(COLUMNS) * (_SIDE + _GAP)
    picture = Image.new("RGB", (width, _HEADING + len(CLASSES) * (_SIDE + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=17)
    for column, heading in enumerate(COLUMNS):
        x = _NAME + column * (_SIDE + _GAP) + _SIDE // 2
        draw.text((x, _HEADING // 2), heading, _INK, font, anchor="mm")
    for row, name in enumerate(CLASSES):
        y = _HEADING + row * (_SIDE + _GAP)
        draw.text((_NAME - 10, y + _SIDE // 2), name, _INK, font, anchor="rm")
        for column, panel in enumerate(panels(held_out, fleet, f"{name}-detection")):
            picture.paste(panel, (_NAME + column * (_SIDE + _GAP), y))
    picture.save(options.out, quality=82, optimize=True)
    print(f"wrote {options.out}, {options.out.stat().st_size:,} bytes")


def panels(held_out: HeldOut, fleet: Fleet, task: str) -> list[Image.Image]:
    """Return the first held-out image of a task with the boxes of each column."""
    (scene,) = held_out.scenes(task)
    image = open_image(scene.image).resize((SIZE, SIZE))
    adapters = [None, fleet.load(task, source="original"), fleet.load(task, source="code")]
    boxes = [(corners(scene), [""] * len(scene.boxes)), *(found(held_out, scene, adapter) for adapter in adapters)]
    return [boxed(image, *pair, colour) for pair, colour in zip(boxes, _COLOURS, strict=True)]


def found(held_out: HeldOut, scene: object, adapter: Adapter | None) -> tuple[torch.Tensor, list[str]]:
    """Return the boxes of a detector that are likely enough, (n, 4), and their scores as text."""
    with added(held_out.detector.model, {} if adapter is None else factors_of(adapter)):
        seen = held_out.detector.detect(scene)  # type: ignore[arg-type]
    likely = seen.scores > _LEAST_SCORE
    return seen.boxes[likely], [f"{score:.2f}" for score in seen.scores[likely].tolist()]


def boxed(image: Image.Image, boxes: torch.Tensor, texts: Sequence[str], colour: tuple[int, int, int]) -> Image.Image:
    """Return an image at the size of a panel, with boxes and what is written on them."""
    panel = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=12)
    for box, text in zip((boxes * (_SIDE / SIZE)).tolist(), texts, strict=True):
        left, top, right, bottom = (min(max(side, 1), _SIDE - 2) for side in box)
        draw.rectangle((left, top, right, bottom), outline=(0, 0, 0), width=4)
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=colour, width=2)
        if text:
            place = draw.textbbox((left + 4, top + 3), text, font)
            draw.rectangle((place[0] - 2, place[1] - 1, place[2] + 2, place[3] + 2), fill=colour)
            draw.text((left + 4, top + 3), text, (0, 0, 0), font)
    return panel


if __name__ == "__main__":
    main()
