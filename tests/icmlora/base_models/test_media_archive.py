"""Rows and the files that they name become one archive; whatever is wrong with a row stays with that row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.examples.media_archive import has_media, read_examples
from icmlora.base_models.kinds.classification import ImageClassification
from tests.icmlora.base_models.tiny_kinds import image_file


def read(path: Path) -> tuple[int, int]:
    """Return how many rows of a file or folder can be used, and how many cannot."""
    found = parse_examples(read_examples(path), ImageClassification().example)
    return len(found), found.skipped


def write(folder: Path, name: str, lines: list[bytes]) -> Path:
    folder.mkdir()
    (folder / "1.png").write_bytes(image_file("1.png"))
    (folder / name).write_bytes(b"\n".join(lines))
    return folder


def row(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


ODD = [b"{", b"[1]", b'{"image": "1.png", "label": NaN}', b'{"image": "1.png", "label": "\\ud800"}', b"\xff\xfe{}"]


def test_odd_rows_are_skipped_and_the_others_are_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "given", "samples.jsonl", [row(image="1.png", label="cat"), *ODD])
    assert read(folder / "samples.jsonl") == (1, len(ODD))


def test_odd_rows_of_a_folder_of_images_are_skipped_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "samples", "metadata.jsonl", [row(file_name="1.png", label="cat"), b"{", b"[1]"])
    assert read(folder) == (1, 2)


def test_equal_rows_and_files_give_equal_bytes(tmp_path: Path) -> None:
    lines = [row(image="1.png", label="cat"), row(image="1.png", label="dog")]
    first, second = (write(tmp_path / name, "samples.jsonl", lines) / "samples.jsonl" for name in ("a", "b"))
    assert read_examples(first) == read_examples(second)


def test_a_file_that_cannot_be_opened_is_left_to_its_reader(tmp_path: Path) -> None:
    assert not has_media(tmp_path / "gone.jsonl")
