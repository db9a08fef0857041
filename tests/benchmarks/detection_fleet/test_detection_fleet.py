"""The parts of the detection fleet that need no downloaded package."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.examples.forms import scene_of
from icmlora.base_models.examples.media_archive import read_examples
from tests.benchmarks.detection_fleet.__main__ import tasks_of
from tests.benchmarks.detection_fleet.images import CLASSES, SIZE, Stock, write_scenes
from tests.benchmarks.detection_fleet.loss import image_loss
from tests.benchmarks.detection_fleet.nanodet import BINS, best_of, boxes_of, overlaps, points_of

BOXES = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])


def test_boxes_overlap_by_their_shared_area() -> None:
    found = overlaps(BOXES, BOXES)
    assert found[0].tolist() == pytest.approx([1.0, 81 / 119, 0.0])


def test_of_boxes_that_overlap_the_best_stays() -> None:
    assert best_of(BOXES, torch.tensor([0.5, 0.9, 0.1]), overlap=0.6, most=10) == [1, 2]
    assert best_of(BOXES, torch.tensor([0.5, 0.9, 0.1]), overlap=0.6, most=1) == [1]
    assert best_of(BOXES[:0], torch.zeros(0), overlap=0.6, most=10) == []


def test_the_sides_of_a_box_are_counted_in_strides_from_its_point() -> None:
    points = points_of(32)
    sides = torch.full((1, len(points), 4, BINS), -100.0)
    sides[..., 1] = 100.0  # every side is one stride away
    boxes = boxes_of(sides.flatten(2), points)[0]
    assert len(points) == 16 + 4 + 1
    assert boxes[0].tolist() == pytest.approx([-4, -4, 12, 12])
    assert boxes[-1].tolist() == pytest.approx([-16, -16, 48, 48])


def test_the_loss_is_least_where_the_right_points_have_the_right_boxes() -> None:
    points, truth = points_of(64), torch.tensor([[10.0, 10, 40, 40]])
    inside = (points[:, 2] == 8) & ((points[:, :2] - 25).abs() < 12).all(dim=1)
    sure, right = torch.where(inside, 8.0, -8.0), truth.expand(len(points), 4)
    good = image_loss(sure, right, truth, points)
    assert good < image_loss(-sure, right, truth, points)
    assert good < image_loss(sure, right + 15, truth, points)
    assert image_loss(torch.full_like(sure, -8.0), right, truth[:0], points) < 1e-4


def write_stock(root: Path) -> tuple[Path, Path]:
    """Write two cut-outs and two photographs for each part."""
    for folders in CLASSES.values():
        (root / "stamps" / folders[0]).mkdir(parents=True)
        for number in range(4):
            stamp = Image.new("RGBA", (80, 60))
            stamp.paste((200, 40 * number, 0, 255), (5, 5, 70, 50))
            stamp.save(root / "stamps" / folders[0] / f"{number}.png")
    (root / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (400, 300), (0, 50 * number, 90)).save(root / "photos" / f"{number}.jpg")
    return root / "stamps", root / "photos"


def test_scenes_are_examples_and_equal_for_equal_seeds(tmp_path: Path) -> None:
    stamps, photos = write_stock(tmp_path)
    stock = Stock(stamps, photos, "train")
    for name in ("one", "two"):
        write_scenes(stock, "bird", tmp_path / name / "eval.jsonl", 3, "seed")
    found = parse_examples(read_examples(tmp_path / "one" / "eval.jsonl"), scene_of)
    assert (len(found), found.skipped) == (3, 0)
    assert all(1 <= len(scene.boxes) <= 3 and set(scene.labels) == {"bird"} for scene in found)
    assert read_examples(tmp_path / "one" / "eval.jsonl") == read_examples(tmp_path / "two" / "eval.jsonl")


def test_objects_do_not_overlap(tmp_path: Path) -> None:
    stock = Stock(*write_stock(tmp_path), "test")
    image, boxes = stock.scene("coin", random.Random(1))
    assert image.size == (SIZE, SIZE)
    found = overlaps(torch.tensor(boxes).float(), torch.tensor(boxes).float())
    assert float(found.sum()) == pytest.approx(len(boxes))


def test_tasks_have_names_of_their_own() -> None:
    names = [task.name for task in tasks_of(10)]
    assert len(set(names)) == len(names) == 14
    assert names[0] == "mammal-detection"
    assert json.dumps(names).count("-r") == 3
