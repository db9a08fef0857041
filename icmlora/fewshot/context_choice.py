"""Choose the context of a task among its samples: how much of each, which, in what order, and how many.

    samples ──most──▶ candidates, before each of the others ──▶ losses of these ──▶ a better candidate
       └──a third, at most 12: the others

The first candidate has as many samples as fit, in their order, and of each text as much as lets all fit: at least 80
tokens. What differs from it has to be better beyond the noise of a few texts: measured, the candidate with the least
loss was often worse than the first (docs/results/LOG.md, 2026-11-30). In the end the others take part too.
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

MOST_TOKENS = 1536
"""Of a context, unless the user says otherwise."""
SCORED_TOKENS = 128
"""Of each text, that are scored behind a context."""
_OTHERS, _LEAST_SHARE = 12, 3  # samples that tell which candidate is best: at most twelve, and one of three
_SHORTEST, _LONGEST, _BETWEEN = 80, 256, 2  # tokens of a text that are taken, and between two
_DRAWS = 2  # other orders that are tried, where not all samples fit
_SURE = 2.0  # standard errors by which a candidate has to be better
_HARDLY = 0.02  # share of what a context brings that fewer samples may cost
_SHARE_OF_POSITIONS = 0.75  # of what a base model reads: the request has to fit too
_BLOCK = 32  # tokens; vLLM's blocks have 16 on a card, and a multiple of this on a CPU
_LONG = 16 * _BLOCK  # tokens of a context from which on a part of a block is little of it
_ATTEMPTS = 4  # at cutting a text to a length: what is left of it may have other tokens
_USUAL = 5  # candidates that are read
_OF_A_TURN = 8  # tokens that a chat template writes around a message, about


@dataclass(frozen=True)
class ChosenContext:
    """A context, and what it is made of."""

    context: TaskContext
    samples: Sequence[Example | Chat]  # as they stand in it
    tokens: int
    length: int  # tokens that were taken of each text
    is_enough: bool = False  # whether more samples would do nothing


@dataclass(frozen=True, eq=False)
class Prompted:
    """Reads examples behind a context, with the adapter that is on the base model at that moment."""

    base: BaseModel
    template: Templates | None = None  # that came with the adapter

    def score(self, context: TaskContext | None, examples: Sequence[Any], tokens: int = SCORED_TOKENS) -> Score:
        """Return the loss in nats per token; of the examples, not of what stands before them."""
        shown = examples if context is None else [context.before(example) for example in examples]
        read = self.base.modality.readable(self.base, shown, self.template)
        if not read.items:
            raise DataError(f"no sample can be read after others: {read.reason}")
        return self.base.modality.measure(self.base, read.items, tokens)

    def usable(self, examples: Sequence[Any]) -> list[Any]:
        """Return the chats that the base model's template takes; where it has none, those with a plain form as that."""
        read = self.base.modality.readable(self.base, examples, self.template)
        if read.skipped:
            parts = (self.usable([example]) for example in examples) if len(examples) > 1 else ()
            return [example for part in parts for example in part]
        return [item if isinstance(item, Example) else one for one, item in zip(examples, read.items, strict=True)]

    def written(self, context: TaskContext) -> TaskContext:
        """Give a context of chats the text that stands before plain text, as the chat template writes it."""
        if context.text:
            return context
        answers = [place for place, turn in enumerate(context.messages) if turn["role"] == "assistant"]
        read = self.base.modality.readable(self.base, [Chat(context.messages, tuple(answers))], self.template)
        return replace(context, text=read.items[0].text) if read.items else context

    def context_of(self, samples: Sequence[Example | Chat], length: int) -> ChosenContext:
        """Make the context of some samples, in their order; a long one of texts has whole blocks of tokens."""
        return self.chosen(self.written(TaskContext.of(self._in_blocks(samples))), samples, length)

    def chosen(self, context: TaskContext, samples: Sequence[Example | Chat] = (), length: int = 0) -> ChosenContext:
        """Count the tokens of a context."""
        return ChosenContext(context, samples, self._count(context.text), length)

    def filled(self, chosen: ChosenContext, more: Sequence[Example | Chat], most: int) -> ChosenContext:
        """Put further samples before those of a context, as many as fit: there they matter least."""
        if chosen.is_enough:
            return chosen
        fit = self.fitting(more, chosen.length, self.limit(most) - chosen.tokens)
        return self.context_of([*fit, *chosen.samples], chosen.length) if fit else chosen

    def limit(self, most: int) -> int:
        """Return at most so many tokens, or fewer where the base model reads too few."""
        positions = self.base.positions
        return most if positions is None else min(most, int(positions * _SHARE_OF_POSITIONS))

    def fitting(self, samples: Sequence[Example | Chat], length: int, most: int) -> list[Example | Chat]:
        """Return samples that fit into so many tokens together, each text cut to a length, from the first one on."""
        taken: list[Example | Chat] = []
        for sample in samples:
            one = self._cut(sample, length)
            used = self._size(one)
            if used <= most:
                taken.append(one)
                most -= used
        return taken

    def _in_blocks(self, samples: Sequence[Example | Chat]) -> Sequence[Example | Chat]:
        """Cut the beginning of the first of some texts, so that an engine's prefix cache holds all of the context.

        It keeps whole blocks of tokens only, and reads the rest of a context again for each request.
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
        """Cut a plain text; a question without its answer, or a chat without its end, would be no sample."""
        if isinstance(sample, Chat) or sample.prompt:
            return sample
        ids = self.base.tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
        if len(ids) <= length:
            return sample
        text = str(self.base.tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False))
        return replace(sample, completion=text.rstrip("\N{REPLACEMENT CHARACTER}"))  # half of a character

    def _size(self, sample: Example | Chat) -> int:
        """Return about how many tokens a sample takes: rendering every chat by itself would take long."""
        if isinstance(sample, Chat):
            return sum(self._count(turn["content"]) + _OF_A_TURN for turn in sample.messages)
        return self._count(TaskContext.of([sample]).text)

    def _count(self, text: str) -> int:
        return len(self.base.tokenizer(text, add_special_tokens=False)["input_ids"])


def choose_context(
    prompted: Prompted,
    samples: Sequence[Example | Chat],
    most_tokens: int = MOST_TOKENS,
    *,
    total: int | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> ChosenContext:
    """Choose a context with the adapter that is on the base model.

    Args:
        prompted: What reads them.
        samples: The samples.
        most_tokens: Of the context.
        total: How many samples there will be in the end, if others are to be filled in.
        tell: Gets how many candidates were read, and of about how many.

    Raises:
        DataError: No sample fits.
    """
    most, total = prompted.limit(most_tokens), total or len(samples)
    every = max(_LEAST_SHARE, -(-len(samples) // _OTHERS))
    others = samples[::every] if len(samples) >= 2 * _LEAST_SHARE else []
    pool = [sample for place, sample in enumerate(samples) if not others or place % every]
    length = min(_LONGEST, max(_SHORTEST, most // total - _BETWEEN))
    # As much of the limit as the pool is of all samples, or a candidate would be longer than what it stands for.
    room = max(most * len(pool) // total, min(most, _LONGEST))
    first = prompted.fitting(pool, length, room) or prompted.fitting(pool, length, most)
    if not first:
        raise DataError(f"no sample is short enough for a context of {most} tokens", hint="allow more tokens")
    if not others:
        return prompted.context_of(first, length)
    search = _Search(prompted, others, tell)
    best = search.best(first, length, pool, room)
    fewer = search.fewer(best.samples)
    is_enough = len(fewer) < len(best.samples)
    chosen = replace(prompted.context_of(fewer, best.length), is_enough=is_enough)
    return prompted.filled(chosen, others, most)


@dataclass(frozen=True)
class _Candidate:
    samples: Sequence[Example | Chat]
    length: int


class _Search:
    """Looks at candidates; each is read once."""

    def __init__(self, prompted: Prompted, others: Sequence[Example | Chat], tell: Callable[[int, int], None]) -> None:
        self._prompted, self._others, self._tell = prompted, others, tell
        self._known: dict[tuple[int, ...], tuple[Sequence[Any], torch.Tensor]] = {}

    def best(
        self, first: Sequence[Example | Chat], length: int, pool: Sequence[Example | Chat], room: int
    ) -> _Candidate:
        """Return the first candidate, or one that is better for sure: with longer or shorter texts, or other ones."""
        found = _Candidate(first, length)
        fit = self._prompted.fitting
        if all(isinstance(one, Example) and not one.prompt for one in pool):
            for other in (2 * length, length // 2):
                found = self._better(found, _Candidate(fit(pool, other, room), other))
        if len(found.samples) < len(pool):
            for seed in range(_DRAWS):
                found = self._better(found, _Candidate(fit(_shuffled(pool, seed), found.length, room), found.length))
        return found

    def fewer(self, samples: Sequence[Example | Chat]) -> Sequence[Example | Chat]:
        """Leave out the first half, and again, as long as that costs hardly anything for sure."""
        allowed = _HARDLY * max(0.0, float((self._nats(()) - self._nats(samples)).mean()))
        all_of_them = samples
        while len(samples) > 1:
            half = samples[len(samples) // 2 :]
            mean, error = estimate(self._nats(half) - self._nats(all_of_them))
            if mean + _SURE * error > allowed:
                break
            samples = half
        return samples

    def _better(self, one: _Candidate, other: _Candidate) -> _Candidate:
        if not other.samples:
            return one
        mean, error = estimate(self._nats(one.samples) - self._nats(other.samples))
        return other if mean > _SURE * error else one

    def _nats(self, samples: Sequence[Example | Chat]) -> torch.Tensor:
        """Return the loss of each of the others behind some samples, in nats per token."""
        key = tuple(map(id, samples))
        if key not in self._known:
            context = self._prompted.context_of(samples, 0).context if samples else None
            of_each = self._prompted.score(context, self._others).of_each
            self._known[key] = samples, torch.tensor(of_each, dtype=torch.float64)
            self._tell(len(self._known), max(_USUAL, len(self._known)))
        return self._known[key][1]


def estimate(differences: torch.Tensor) -> tuple[float, float]:
    """Return the mean of some differences, and its standard error: of a single one, infinite."""
    error = float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else float("inf")
    return float(differences.mean()), error


def _shuffled(samples: Sequence[Example | Chat], seed: int) -> list[Example | Chat]:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[place] for place in order]
