"""Labelled documents -> rows to train on and rows held out, as many of each class."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

TRAIN, HELD_OUT = 800, 200
"""Rows of a task, over all its classes."""
CHARACTERS = 240
"""Of a row at most: what about 48 tokens hold."""
_SEED = 0


@dataclass(frozen=True)
class Row:
    """A text and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class Rows:
    """The data of one task."""

    classes: tuple[str, ...]
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


def cut(
    documents: Mapping[str, list[str]], counts: tuple[int, int] = (TRAIN, HELD_OUT), characters: int = CHARACTERS
) -> Rows:
    """Cut documents into rows; every fifth document, in the order of their hashes, is held out.

    Args:
        documents: Those of each class.
        counts: Rows to train on and rows held out, over all classes.
        characters: Of a row at most.
    """
    draw = random.Random(_SEED)
    train: list[Row] = []
    held_out: list[Row] = []
    for label, texts in enumerate(documents.values()):
        ordered = sorted({text.strip() for text in texts if text.strip()}, key=_hash)
        parts = [text for number, text in enumerate(ordered) if number % 5], ordered[::5]
        for rows, part, count in zip((train, held_out), parts, counts, strict=True):
            wanted = range(count // len(documents))
            rows += [Row(_piece(part[number % len(part)], draw, characters), label) for number in wanted]
    draw.shuffle(train)
    return Rows(tuple(documents), tuple(train), tuple(held_out))


def _piece(text: str, draw: random.Random, characters: int) -> str:
    """Return a window of a text that begins at a word."""
    start = draw.randrange(max(1, len(text) - characters))
    begin = start if start == 0 else text.find(" ", start) + 1
    return text[begin : begin + characters]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
