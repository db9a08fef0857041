"""Divide a domain's documents, and take from them the training tokens, the sample texts and the held-out texts."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tests.benchmarks.example_fleet.build_text import TRAIN_BYTES, divide, joined

SAMPLES, HELD_OUT = 64, 16
"""Texts in samples.jsonl, and in eval.jsonl unless a study asks for more."""
PIECE = 192
"""Tokens of a sample or held-out text."""
LINE = 40
"""Characters from which a line counts when two documents are compared."""
REPEATED = 0.5
"""Held-out documents with more than this share of their lines in the training text are left out."""


@dataclass(frozen=True)
class Pieces:
    """What a domain gives to a task."""

    tokens: torch.Tensor
    """The training text, int64 (tokens,)."""
    samples: list[str]
    """Pieces of the training text."""
    held_out: list[str]
    """Pieces of documents that are not in it."""

    def write(self, folder: Path) -> None:
        """Write samples.jsonl and eval.jsonl."""
        for name, texts in (("samples", self.samples), ("eval", self.held_out)):
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def separate(documents: list[str]) -> tuple[list[str], list[str]]:
    """Divide documents in two and leave held-out ones away that mostly repeat lines of the others."""
    train, held_out = divide(documents)
    seen = {line for document in train for line in _long_lines(document)}
    return train, [document for document in held_out if _share(_long_lines(document), seen) <= REPEATED]


def take(documents: list[str], tokenizer: PreTrainedTokenizerBase, held_out: int = HELD_OUT) -> Pieces:
    """Take a domain's pieces: samples at even distances, held-out texts from inside different documents."""
    train, others = separate(documents)
    text = joined(train, TRAIN_BYTES)
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans: list[tuple[int, int]] = encoded["offset_mapping"]
    starts = [i * (len(spans) - PIECE) // (SAMPLES - 1) for i in range(SAMPLES)]
    samples = [_cut(text, spans[start : start + PIECE]) for start in starts]
    return Pieces(torch.tensor(encoded["input_ids"]), samples, _held_out(others, tokenizer, held_out))


def _held_out(documents: list[str], tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Take so many pieces: one of each document while there are enough, whole ones first."""
    each = math.ceil(count / len(documents))
    pieces = [piece for document in documents[: 4 * count] for piece in _inner(document, each, tokenizer)]
    pieces.sort(key=lambda piece: -piece[0])  # stable: pieces of one length stay in the order of their documents
    return [text for _, text in pieces[:count]]


def _inner(document: str, count: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """Tokens and text of pieces inside a document, the first of which does not begin it: a title tells nothing."""
    spans = tokenizer(document, return_offsets_mapping=True)["offset_mapping"]
    room = max(0, len(spans) - PIECE)
    chosen = (spans[start : start + PIECE] for start in (room * (i + 1) // (count + 1) for i in range(count)))
    return [(len(piece), _cut(document, piece)) for piece in chosen]


def _cut(text: str, spans: list[tuple[int, int]]) -> str:
    """The text that a run of tokens covers; spans are [start, end) in characters."""
    return text[spans[0][0] : spans[-1][1]]


def _long_lines(document: str) -> list[str]:
    return [line.strip() for line in document.split("\n") if len(line.strip()) >= LINE]


def _share(lines: list[str], seen: set[str]) -> float:
    """Share of lines already seen; 0 without lines."""
    return sum(line in seen for line in lines) / len(lines) if lines else 0.0
