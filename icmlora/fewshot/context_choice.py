"""Choose the context of a task among its samples: how much of each, which, in what order, and how many.

    samples ──most──▶ candidates, before each of the others ──▶ loss of these ──▶ the candidate with the least
       └──a third, at most 6: the others

A candidate is the samples in a drawn order, as many as fit. First comes how much of each text is taken, then the draw,
then how many are needed: half of them are left out as long as that costs nothing, because they cost time at every
request. What is left of the limit goes to the samples that told which is best.
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
    from icmlora.base_models.modality import BaseModel

MOST_TOKENS = 1536
"""Of a context, unless the user says otherwise."""
SCORED_TOKENS = 128
"""Of each text, that are scored behind a context."""
_OTHERS, _LEAST_SHARE = 6, 3  # samples that tell which candidate is best: at most six, and one of three
_LENGTHS = (128, 64, 256)  # tokens of a text that are taken
_DRAWS = 3
_SHARE_OF_POSITIONS = 0.75  # of what a base model reads: the request has to fit too
_BLOCK = 32  # tokens; vLLM's blocks have 16 on a card, and a multiple of this on a CPU
_LONG = 16 * _BLOCK  # tokens of a context from which on a part of a block is little of it
_ATTEMPTS = 4  # at cutting a text to a length: what is left of it may have other tokens
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

    def nats(self, context: TaskContext | None, examples: Sequence[Any], tokens: int = SCORED_TOKENS) -> float:
        """Return the loss in nats per token; of the examples, not of what stands before them."""
        shown = examples if context is None else [context.before(example) for example in examples]
        read = self.base.modality.readable(self.base, shown, self.template)
        if not read.items:
            raise DataError(f"no sample can be read behind others: {read.reason}")
        return self.base.modality.measure(self.base, read.items, tokens).value

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
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> ChosenContext:
    """Choose a context with the adapter that is on the base model; `tell` gets the candidates done, and of how many.

    Raises:
        DataError: No sample fits.
    """
    most = prompted.limit(most_tokens)
    every = max(_LEAST_SHARE, -(-len(samples) // _OTHERS))
    others = samples[::every] if len(samples) >= 2 * _LEAST_SHARE else []
    pool = [sample for place, sample in enumerate(samples) if not others or place % every]
    first, length = prompted.fitting(pool, _LENGTHS[0], most), _LENGTHS[0]
    if not first:
        raise DataError(f"no sample is short enough for a context of {most} tokens", hint="allow more tokens")
    if not others:
        return prompted.context_of(first, length)
    lengths = _LENGTHS if all(isinstance(one, Example) and not one.prompt for one in pool) else _LENGTHS[:1]
    search = _Search(prompted, others, tell, len(lengths) + _DRAWS)
    drawn = [_shuffled(pool, seed) for seed in range(_DRAWS)]
    by_length = {length: prompted.fitting(drawn[0], length, most) for length in lengths}
    length = min(by_length, key=lambda length: search.nats(by_length[length]))
    best = min([by_length[length], *(prompted.fitting(order, length, most) for order in drawn[1:])], key=search.nats)
    fewer = search.fewer(best)
    chosen = replace(prompted.context_of(fewer, length), is_enough=len(fewer) < len(best))
    return prompted.filled(chosen, others, most)


class _Search:
    """Looks at candidates; each is read once."""

    def __init__(
        self, prompted: Prompted, others: Sequence[Example | Chat], tell: Callable[[int, int], None], count: int
    ) -> None:
        self._prompted, self._others, self._tell, self._count = prompted, others, tell, count
        self._known: dict[tuple[int, ...], tuple[Sequence[Any], float]] = {}

    def nats(self, candidate: Sequence[Example | Chat]) -> float:
        """Return the loss of the others behind a candidate; infinite where no sample fits."""
        if not candidate:
            return float("inf")
        key = tuple(map(id, candidate))
        if key not in self._known:
            context = self._prompted.context_of(candidate, 0).context
            self._known[key] = candidate, self._prompted.nats(context, self._others)
            self._tell(len(self._known), max(self._count, len(self._known)))
        return self._known[key][1]

    def fewer(self, candidate: Sequence[Example | Chat]) -> Sequence[Example | Chat]:
        """Leave out the first half, and again, as long as that costs nothing."""
        while len(candidate) > 1 and self.nats(half := candidate[len(candidate) // 2 :]) <= self.nats(candidate):
            candidate = half
        return candidate


def _shuffled(samples: Sequence[Example | Chat], seed: int) -> list[Example | Chat]:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[place] for place in order]
