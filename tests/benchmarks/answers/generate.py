"""Answers of a model, greedily, in batches that read what all their questions begin with only once."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, DynamicCache

from tests.benchmarks.answers.rows import Row, examples_that_fit, turns
from tests.benchmarks.answers.train import tokens
from tests.benchmarks.example_fleet.train import load_base

_BATCH = 32


class Answerer:
    """A base model that answers questions, with an adapter or examples or neither.

    Args:
        base: Its folder.
        dtype: What it computes in.
    """

    def __init__(self, base: Path, dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        self._model = load_base(base, dtype).eval()

    def answers(
        self, rows: Sequence[Row], *, adapter: Path | None = None, before: Sequence[Mapping[str, Any]] = ()
    ) -> list[str]:
        """Answer the questions of rows, with an adapter as PEFT loads it and behind the messages of a chat."""
        asked = self._asked(rows, before)
        if adapter is None:
            return self._answers(self._model, asked, self._longest(rows))
        with _adapted(self._model, adapter) as model:
            return self._answers(model, asked, self._longest(rows))

    def with_examples(self, examples: Sequence[Row], rows: Sequence[Row]) -> tuple[list[str], int]:
        """Answer them with examples in the prompt, as many as the context holds; returns how many that were too."""
        alone = max(len(ids) for ids in self._asked(rows, []))
        sizes = [len(tokens(self._tokenizer, turns([row]))) for row in examples]
        room = self._model.config.max_position_embeddings - alone - self._longest(rows)
        kept = examples_that_fit(examples, sizes, room)
        return self.answers(rows, before=turns(kept)), len(kept)

    def _asked(self, rows: Sequence[Row], before: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        chats = ([*before, *turns([], row.prompt)] for row in rows)
        return [tokens(self._tokenizer, chat, add_generation_prompt=True) for chat in chats]

    def _longest(self, rows: Sequence[Row]) -> int:
        """Return the tokens of the longest answer and one to end it, so that no answer is right for being cut."""
        return 1 + max(len(self._tokenizer(row.answer, add_special_tokens=False).input_ids) for row in rows)

    @torch.no_grad()
    def _answers(self, model: Any, asked: list[list[int]], most: int) -> list[str]:
        common = _beginning([*asked, asked[0][:-1]])  # at least one token is left to each question
        read = DynamicCache(config=self._model.config)
        model(input_ids=torch.tensor([common]), cache=read)
        found: dict[int, str] = {}
        by_length = sorted(range(len(asked)), key=lambda number: len(asked[number]))
        for start in range(0, len(asked), _BATCH):
            numbers = by_length[start : start + _BATCH]
            rests = [asked[number][len(common) :] for number in numbers]
            for number, ids in zip(numbers, self._batch(model, common, rests, read, most), strict=True):
                found[number] = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        return [found[number] for number in range(len(asked))]

    def _batch(
        self, model: Any, common: list[int], rests: list[list[int]], read: DynamicCache, most: int
    ) -> list[list[int]]:
        """Return what follows on each question: padding stands between what is common and what is not."""
        width = max(len(rest) for rest in rests)
        holes = [width - len(rest) for rest in rests]
        ending = self._tokenizer.eos_token_id
        cache = copy.deepcopy(read)
        cache.batch_repeat_interleave(len(rests))
        written = model.generate(
            input_ids=torch.tensor([common + [ending] * hole + rest for hole, rest in zip(holes, rests, strict=True)]),
            attention_mask=torch.tensor([[1] * len(common) + [0] * hole + [1] * (width - hole) for hole in holes]),
            cache=cache,
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=ending,
            pad_token_id=ending,
        )
        return written[:, len(common) + width :].tolist()


def _beginning(lists: Sequence[list[int]]) -> list[int]:
    """Return what all lists begin with."""
    first, last = min(lists), max(lists)
    differing = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differing, min(len(first), len(last)))]


@contextmanager
def _adapted(model: Any, folder: Path) -> Iterator[PeftModel]:
    adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True).eval()
    try:
        yield adapted
    finally:
        adapted.unload()
