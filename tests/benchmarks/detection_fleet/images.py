"""Composed images: real cut-outs pasted on real photographs, with the boxes of one class.

Cut-outs come from Debian's tuxpaint-stamps-default (GPL-2), photographs from budgie-backgrounds (CC0). Those for
training and those for testing are disjoint. The images are composed, not photographs: figures must say so.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageEnhance

Box = tuple[int, int, int, int]  # corners
CLASSES: Mapping[str, tuple[str, ...]] = {  # the ten kinds of things with the most cut-outs
    "mammal": ("animals/mammals", "animals/marsupials"),
    "letter": ("symbols/alphabets",),
    "fruit": ("food/fruit",),
    "bird": ("animals/birds",),
    "vehicle": (
        "vehicles/auto",
        "vehicles/construction",
        "vehicles/locomotive",
        "vehicles/emergency",
        "vehicles/masstransit",
        "vehicles/race",
        "vehicles/farming",
        "military/vehicles",
    ),
    "house": ("town/houses",),
    "coin": ("symbols/money",),
    "flower": ("plants/flowers",),
    "insect": ("animals/insects",),
    "roadsign": ("town/roadsigns",),
}
SIZE = 256  # side of an image in pixels
_LARGEST, _SMALLEST = 256, 16  # sides of a cut-out in pixels
_TRIES = 30  # to place one cut-out without overlap


class Stock:
    """Cut-outs by class and photographs, of one part: `train` or `test`."""

    def __init__(self, stamps: Path, photos: Path, part: str) -> None:
        images = sorted(photos.glob("*.jpg"))
        self._photos = [_photo(path) for number, path in enumerate(images) if (number % 4 == 0) == (part == "test")]
        self._cutouts = {name: _part(_cutouts(stamps, folders), part) for name, folders in CLASSES.items()}

    def count(self, name: str) -> int:
        """Return how many cut-outs a class has."""
        return len(self._cutouts[name])

    def scene(self, name: str, rng: random.Random) -> tuple[Image.Image, list[Box]]:
        """Return an image with one to three objects of a class and up to two of others, and the boxes of the former."""
        photo = rng.choice(self._photos)
        side = rng.randint(SIZE, min(photo.size))
        x, y = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        scene = photo.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        taken: list[Box] = []
        for _ in range(rng.randint(1, 3)):
            _place(scene, rng.choice(self._cutouts[name]), rng, taken)
        boxes = list(taken)
        for _ in range(rng.randint(0, 2)):
            other = rng.choice([known for known in self._cutouts if known != name])
            _place(scene, rng.choice(self._cutouts[other]), rng, taken)
        return scene, boxes


def write_scenes(stock: Stock, name: str, file: Path, count: int, seed: str) -> None:
    """Write images into the folder of a file of rows, and the rows: the image's name, COCO's boxes, labels."""
    folder = file.parent / f"{file.stem}-images"
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(seed), []
    for number in range(count):
        scene, boxes = stock.scene(name, rng)
        path = folder / f"{number:04}.jpg"
        scene.save(path, quality=88)
        sides = [[left, top, right - left, bottom - top] for left, top, right, bottom in boxes]
        rows.append({"image": f"{folder.name}/{path.name}", "boxes": sides, "labels": [name] * len(boxes)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _photo(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    image.thumbnail((1280, 1280))
    return image


def _cutouts(stamps: Path, folders: Sequence[str]) -> list[Image.Image]:
    """Return the cut-outs of a class, in an order fixed by their names."""
    paths = {path for folder in folders for path in (stamps / folder).rglob("*.png")}
    plain = [path for path in paths if "_mirror" not in path.name and not path.name.endswith("_flip.png")]
    plain.sort(key=lambda path: hashlib.sha256(str(path.relative_to(stamps)).encode()).hexdigest())
    found = []
    for path in plain:
        image = Image.open(path).convert("RGBA")
        box = image.getchannel("A").point(lambda alpha: 255 if alpha > 40 else 0).getbbox()
        if box and min(box[2] - box[0], box[3] - box[1]) > _SMALLEST:
            image = image.crop(box)
            image.thumbnail((_LARGEST, _LARGEST))
            found.append(image)
    return found


def _part(cutouts: list[Image.Image], part: str) -> list[Image.Image]:
    cut = max(2, len(cutouts) // 4)
    return cutouts[:cut] if part == "test" else cutouts[cut:]


def _place(scene: Image.Image, cutout: Image.Image, rng: random.Random, taken: list[Box]) -> None:
    """Paste a cut-out, scaled, perhaps mirrored and recoloured, where nothing is yet."""
    for _ in range(_TRIES):
        scale = rng.uniform(0.18, 0.5) * SIZE / max(cutout.size)
        width, height = max(8, int(cutout.width * scale)), max(8, int(cutout.height * scale))
        x, y = rng.randint(0, SIZE - width), rng.randint(0, SIZE - height)
        box = (x, y, x + width, y + height)
        if any(_cross(box, other) for other in taken):
            continue
        pasted = cutout.resize((width, height), Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            pasted = pasted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        coloured = ImageEnhance.Brightness(pasted.convert("RGB")).enhance(rng.uniform(0.75, 1.25))
        scene.paste(ImageEnhance.Color(coloured).enhance(rng.uniform(0.7, 1.3)), (x, y), pasted.getchannel("A"))
        taken.append(box)
        return


def _cross(one: Box, other: Box) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])
