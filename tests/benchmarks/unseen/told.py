"""What a base model says behind samples that do not come from the task: texts that it writes, answers to questions.

    half of the samples, then nothing    ──▶ a text like them ──┐
    half of the samples, then a question ──▶ an answer ─────────┴──▶ predictions of these, for a student without samples

Self-study on synthetic questions: Eyuboglu et al., arXiv 2506.06266; Charakorn et al., arXiv 2602.15902.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from icmlora.base_models.examples.context import SEPARATOR
from icmlora.base_models.kinds.continuations import sampled
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors, added
from icmlora.fewshot.adapt import JOINED
from icmlora.training.teacher import Teacher, target

QUESTIONS = (
    "What kind of texts are these?",
    "Which words and names occur in them?",
    "How are they written, and what do they have in common?",
    "What would the next one say?",
)
_HALVES = 4  # of the samples, drawn anew
_TEXTS, _ANSWERS = 8, 2  # written behind each half, and to each question
_TOKENS = 96  # of a text or an answer at most
_FEWEST = 8  # tokens of one at least


class Told(Teacher):
    """Predicts texts that stand behind others.

    Args:
        base: The base model.
        original: Factors that are on it meanwhile.
        texts: Each with the token ids before it.
    """

    def __init__(self, base: BaseModel, original: Factors, texts: Sequence[tuple[list[int], Scored]]) -> None:
        super().__init__(base, original, [item for _, item in texts])
        with torch.no_grad(), added(base.model, original):
            for number, (before, item) in enumerate(texts):
                (logits,) = base.modality.logits(base, [Scored([*before, *item.ids], 1)])
                self._targets[number] = target(base, item, logits[len(before) :])


def written(base: BaseModel, original: Factors, samples: Sequence[Scored]) -> Told:
    """Let the base model with these factors write texts behind samples."""
    return Told(base, original, list(_texts(base, original, samples, [""], _TEXTS)))


def answered(base: BaseModel, original: Factors, samples: Sequence[Scored]) -> Told:
    """Let the base model with these factors answer questions about samples."""
    asked = [f"Question: {question}\nAnswer:" for question in QUESTIONS]
    return Told(base, original, list(_texts(base, original, samples, asked, _ANSWERS)))


def _texts(
    base: BaseModel, original: Factors, samples: Sequence[Scored], prompts: Sequence[str], count: int
) -> Iterator[tuple[list[int], Scored]]:
    tokenizer = base.tokenizer
    with torch.random.fork_rng(), torch.inference_mode(), added(base.model, original):
        torch.manual_seed(0)
        for number in range(_HALVES):
            half = random.Random(number).sample(list(samples), len(samples) // 2)
            (text,) = base.modality.joined(base, half, JOINED)
            before = [*text.ids, *tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]]
            for prompt in prompts:
                asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                start = [*before, *asked]
                for row in sampled(base, [start] * count, len(start) + _TOKENS):
                    ids = row[len(before) :]
                    answers = frozenset(range(len(asked), len(ids))) if asked else frozenset()
                    if len(ids) - len(asked) >= _FEWEST:
                        yield before, Scored(ids, 1, answers=answers)
