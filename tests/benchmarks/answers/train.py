"""Train the adapters of the answers: supervised fine-tuning on chats, with the loss on the answers' tokens alone.

usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.answers.train --work W --fleet F [--only A,B]

Each folder of F gets a PEFT adapter, samples.jsonl (64 training chats) and eval.jsonl (up to 400 held-out chats). Tasks
that are there are skipped, and one that was stopped goes on from its last checkpoint.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.benchmarks.answers.rows import Row
from tests.benchmarks.answers.tasks import TASKS, AnswerTask
from tests.benchmarks.realistic_fleet.__main__ import build_all, train
from tests.benchmarks.realistic_fleet.bases import base_folder

IGNORED = -100  # a label that the loss leaves out


class Chats(Dataset[dict[str, list[int]]]):
    """Rows in the base model's chat template; the labels are the tokens of the answers."""

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
        self._rows, self._tokenizer = rows, tokenizer

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        messages = self._rows[index].chat["messages"]
        whole = tokens(self._tokenizer, messages)
        asked = len(tokens(self._tokenizer, messages[:-1], add_generation_prompt=True))
        return {"input_ids": whole, "labels": [IGNORED] * asked + whole[asked:]}


def tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Return a chat as the base model reads it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def batch(items: list[dict[str, list[int]]], padding: int) -> dict[str, Any]:
    """Pad chats on the left, so that all answers are at the end, where alone the model has to compute logits."""
    length = max(len(item["input_ids"]) for item in items)
    answered = 1 + max(sum(label != IGNORED for label in item["labels"]) for item in items)
    holes = [length - len(item["input_ids"]) for item in items]
    labels = torch.tensor([[IGNORED] * hole + item["labels"] for hole, item in zip(holes, items, strict=True)])
    return {
        "input_ids": torch.tensor(
            [[padding] * hole + item["input_ids"] for hole, item in zip(holes, items, strict=True)]
        ),
        "attention_mask": torch.tensor([[0] * hole + [1] * (length - hole) for hole in holes]),
        "labels": labels[:, -answered:],
        "logits_to_keep": answered,
    }


def build(task: AnswerTask, work: Path, fleet: Path) -> None:
    """Build one task; its folder gets its name when it is complete."""
    started = time.monotonic()
    base = base_folder(task.base_model, work)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    part = fleet / f".{task.name}.part"
    part.mkdir(parents=True, exist_ok=True)
    rows = task.rows(work)
    rows.write(part)
    train(task, base, Chats(rows.train, tokenizer), part, partial(batch, padding=tokenizer.pad_token_id))
    part.rename(fleet / task.name)
    seconds = time.monotonic() - started
    print(f"{task.name}: {len(rows.train)} rows, {len(rows.held_out)} held out, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    build_all(TASKS, build, __doc__)
