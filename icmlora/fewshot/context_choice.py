"""Choose a task's context from its samples: how many, which, in what order, and how much of each.

    samples ──most──▶ candidates, before each held-out sample ──▶ losses of these ──▶ a better candidate
       └──a third, at most 12: held out

The first candidate has as many samples as fit, in file order, each cut to the length that lets all fit but to no less
than 80 tokens. Another candidate has to be better beyond the noise of a few texts: the candidate with the lowest loss
was often worse than the first (docs/results/LOG.md, 2026-11-30). Finally the held-out samples are added where they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from icmlora.base_models.examples.chats import Chat
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.examples.examples import Example
from icmlora.errors import DataError

if TYPE_CHECKING:
    from icmlora.base_models.examples.chat_template import Templates
    from icmlora.base_models.modality import BaseModel, Score

MAX_TOKENS = 1536
"""Default maximum length of a context."""
SCORED_TOKENS = 128
"""Tokens of each text that are scored after a context."""
_MAX_HELD_OUT, _MIN_STRIDE = 12, 3  # held-out samples: at most twelve, and at most every third
_MIN_LENGTH, _MAX_LENGTH, _BETWEEN = 80, 256, 2  # tokens taken of a text, and between two texts
_DRAWS = 2  # other orders to try where not all samples fit
_SURE = 2.0  # minimum lead of a better candidate, in standard errors
_HARDLY = 0.02  # share of a context's gain that fewer samples may cost
_SHARE_OF_POSITIONS = 0.75  # of the base model's positions: the request has to fit too
_BLOCK = 32  # tokens; vLLM's blocks have 16 on a card, and a multiple of this on a CPU
_LONG = 16 * _BLOCK  # tokens; in a longer context a partial block is a small part
_ATTEMPTS = 4  # at cutting a text to a length: the rest may be tokenised differently
_USUAL = 5  # candidates usually read
_OF_A_TURN = 8  # tokens that a chat template adds to a message, roughly


@dataclass(frozen=True)
class ChosenContext:
    """A context and the samples in it."""

    context: TaskContext
    samples: Sequence[Example | Chat]  # as they appear in it
    tokens: int
    length: int  # tokens taken of each text
    is_enough: bool = False  # whether more samples would not help


@dataclass(frozen=True, eq=False)
class ContextScorer:
    """Reads examples after a context, with the base model's current adapter."""

    base: BaseModel
    template: Templates | None = None  # the adapter's own

    def score(self, context: TaskContext | None, examples: Sequence[Any], tokens: int = SCORED_TOKENS) -> Score:
        """Return the loss of the examples, without the context, in nats per token."""
        shown = examples if context is None else [context.before(example) for example in examples]
        read = self.base.modality.readable(self.base, shown, self.template)
        if not read.items:
            raise DataError(f"no sample can be read after others: {read.reason}")
        return self.base.modality.measure(self.base, read.items, tokens)

    def usable(self, examples: Sequence[Any]) -> list[Any]:
        """Return the samples that the base model can read; without a chat template, chats as plain text."""
        read = self.base.modality.readable(self.base, examples, self.template)
        if read.skipped:
            parts = (self.usable([example]) for example in examples) if len(examples) > 1 else ()
            return [example for part in parts for example in part]
        return [item if isinstance(item, Example) else one for one, item in zip(examples, read.items, strict=True)]

    def context_of(self, samples: Sequence[Example | Chat], length: int) -> ChosenContext:
        """Make a context of samples, in order; a long one of plain texts fills whole token blocks."""
        context = TaskContext.of(self._in_blocks(samples))
        if not context.text:  # one of chats also has its text in the chat template, for use before plain text
            answers = [place for place, turn in enumerate(context.messages) if turn["role"] == "assistant"]
            chats = [Chat(context.messages, tuple(answers))]
            read = self.base.modality.readable(self.base, chats, self.template)
            context = replace(context, text=read.items[0].text) if read.items else context
        return self.chosen(context, samples, length)

    def chosen(self, context: TaskContext, samples: Sequence[Example | Chat] = (), length: int = 0) -> ChosenContext:
        """Count the tokens of a context."""
        return ChosenContext(context, samples, self._count(context.text), length)

    def filled(self, chosen: ChosenContext, more: Sequence[Example | Chat], most: int) -> ChosenContext:
        """Prepend as many further samples as fit; at the start they matter least."""
        if chosen.is_enough:
            return chosen
        fit = self.fitting(more, chosen.length, self.limit(most) - chosen.tokens)
        return self.context_of([*fit, *chosen.samples], chosen.length) if fit else chosen

    def limit(self, most: int) -> int:
        """Return the token limit, lowered where the base model has too few positions."""
        positions = self.base.positions
        return most if positions is None else min(most, int(positions * _SHARE_OF_POSITIONS))

    def fitting(self, samples: Sequence[Example | Chat], length: int, most: int) -> list[Example | Chat]:
        """Return the samples that together fit into `most` tokens, in order, each text cut to a length."""
        taken: list[Example | Chat] = []
        for sample in samples:
            one = self._cut(sample, length)
            if isinstance(one, Chat):  # roughly: rendering every chat would be slow
                used = sum(self._count(turn["content"]) + _OF_A_TURN for turn in one.messages)
            else:
                used = self._count(TaskContext.of([one]).text)
            if used <= most:
                taken.append(one)
                most -= used
        return taken

    def _in_blocks(self, samples: Sequence[Example | Chat]) -> Sequence[Example | Chat]:
        """Cut the start of the first text so that an engine's prefix cache holds the whole context.

        The cache keeps whole blocks of tokens only; the rest of a context is read again for each request.
        """
        first, tokenizer = samples[0], self.base.tokenizer
        if not all(isinstance(sample, Example) and not sample.prompt for sample in samples):
            return samples
        assert isinstance(first, Example)
        for _ in range(_ATTEMPTS):
            total = len(tokenizer(TaskContext.of([first, *samples[1:]]).text)["input_ids"])
            ids, over = tokenizer(first.completion, add_special_tokens=False)["input_ids"], total % _BLOCK
            if not over or len(ids) <= over or total < _LONG:
                break
            text = str(tokenizer.decode(ids[over:], clean_up_tokenization_spaces=False))
            first = replace(first, completion=text.lstrip("\N{REPLACEMENT CHARACTER}"))
        return [first, *samples[1:]]

    def _cut(self, sample: Example | Chat, length: int) -> Example | Chat:
        """Cut a plain text; prompts with answers and chats stay whole, as part of one is no sample."""
        if isinstance(sample, Chat) or sample.prompt:
            return sample
        ids = self.base.tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
        if len(ids) <= length:
            return sample
        text = str(self.base.tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False))
        return replace(sample, completion=text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a split character

    def _count(self, text: str) -> int:
        return len(self.base.tokenizer(text, add_special_tokens=False)["input_ids"])


def choose_context(
    scorer: ContextScorer,
    samples: Sequence[Example | Chat],
    most_tokens: int = MAX_TOKENS,
    *,
    total: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> ChosenContext:
    """Choose a context with the base model's current adapter.

    Args:
        scorer: Reads and scores the samples.
        samples: The samples.
        most_tokens: Limit of the context's length.
        total: Number of samples in the end, if further ones are to be filled in.
        on_progress: Called with the candidates read so far, and roughly how many there will be.

    Raises:
        DataError: No sample fits.
    """
    most, total = scorer.limit(most_tokens), total or len(samples)
    every = max(_MIN_STRIDE, -(-len(samples) // _MAX_HELD_OUT))
    held = samples[::every] if len(samples) >= 2 * _MIN_STRIDE else []
    pool = [sample for place, sample in enumerate(samples) if not held or place % every]
    length = min(_MAX_LENGTH, max(_MIN_LENGTH, most // total - _BETWEEN))
    # The pool's share of the limit, or a candidate would be longer than the context that it represents.
    room = max(most * len(pool) // total, min(most, _MAX_LENGTH))
    best = scorer.fitting(pool, length, room) or scorer.fitting(pool, length, most)
    if not best:
        raise DataError(f"no sample is short enough for a context of {most} tokens", hint="allow more tokens")
    if not held:
        return scorer.context_of(best, length)
    scores: dict[tuple[int, ...], tuple[Sequence[Any], torch.Tensor]] = {}

    def nats(chosen: Sequence[Example | Chat]) -> torch.Tensor:
        """Return the loss of each held-out sample after some samples, in nats per token."""
        key = tuple(map(id, chosen))
        if key not in scores:
            of_each = scorer.score(scorer.context_of(chosen, 0).context if chosen else None, held).of_each
            scores[key] = chosen, torch.tensor(of_each, dtype=torch.float64)
            on_progress(len(scores), max(_USUAL, len(scores)))
        return scores[key][1]

    def better(one: list[Example | Chat], other: list[Example | Chat]) -> list[Example | Chat]:
        mean, error = estimate(nats(one) - nats(other)) if other else (0.0, 0.0)
        return other if mean > _SURE * error else one

    # A clearly better candidate has longer, shorter or other texts.
    texts = all(isinstance(one, Example) and not one.prompt for one in pool)
    for other in (2 * length, length // 2) if texts else ():
        if (found := better(best, scorer.fitting(pool, other, room))) is not best:
            best, length = found, other
    for seed in range(_DRAWS) if len(best) < len(pool) else ():
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
        best = better(best, scorer.fitting([pool[place] for place in order], length, room))
    # Drop the first half repeatedly, as long as that clearly costs next to nothing.
    fewer, allowed = best, _HARDLY * max(0.0, float((nats(()) - nats(best)).mean()))
    while len(fewer) > 1:
        half = fewer[len(fewer) // 2 :]
        mean, error = estimate(nats(half) - nats(best))
        if mean + _SURE * error > allowed:
            break
        fewer = half
    chosen = replace(scorer.context_of(fewer, length), is_enough=len(fewer) < len(best))
    return scorer.filled(chosen, held, most)


def estimate(differences: torch.Tensor) -> tuple[float, float]:
    """Return the mean of some differences and its standard error, infinite for a single difference."""
    error = float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else float("inf")
    return float(differences.mean()), error
