"""How well a causal language model predicts text.

    text -> tokens t0 t1 ... tn -> sum of -log p(t_i | t_0 .. t_i-1) over the scored tokens = nats

Losses are sums over predicted tokens, so that texts of different length count by their length.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

from icmlora.base_models.examples.chat_template import Rendered, scored_tokens
from icmlora.base_models.examples.context import SEPARATOR
from icmlora.base_models.examples.examples import Example
from icmlora.base_models.modality import IGNORED, BaseModel, Score
from icmlora.errors import DataError
from icmlora.io.devices import round_length, uploaded

_SPECIAL = {"add_special_tokens": False}
_FEWEST = 2  # tokens of a text: one is predicted from the other
_PLAIN_ATTENTION = 128  # tokens; of longer texts plain attention takes longer, and memory with their square
_CACHES = ("cache", "past_key_values")  # what a model calls what it keeps of earlier tokens; transformers renamed it


@dataclass(frozen=True)
class Scored:
    """Token ids of one example, and which of them are scored.

    Attributes:
        ids: The tokens.
        first: Index of the first that is scored, at least 1.
        unscored: Indices after it of tokens that are not: the user's turns of a longer chat.
        answers: Indices of the tokens that answer a prompt, of an example that is scored as a whole.
        context: How many tokens at the beginning are of the context that stands before the example.
        is_chat: Whether a chat template wrote it.
    """

    ids: list[int]
    first: int
    unscored: frozenset[int] = frozenset()
    answers: frozenset[int] = frozenset()
    context: int = 0
    is_chat: bool = False

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first - len(self.unscored)

    @property
    def targets(self) -> list[int]:
        """What is to be predicted from the first scored token on; torch's loss passes over the others."""
        rest = self.ids[self.first :]
        return [IGNORED if place in self.unscored else token for place, token in enumerate(rest, self.first)]

    @property
    def size(self) -> int:
        """How many tokens are read."""
        return len(self.ids)


def nll(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example | Rendered],
    *,
    max_tokens: int = 256,
    batch_size: int = 1,
    device: torch.device | None = None,
    positions: int | None = None,
) -> Score:
    """Score examples by teacher forcing; only completions and the assistant's turns, where there are such."""
    # Of a prompt the last tokens that fit are read. A batch size above 1 pays on accelerators only. `device` is where
    # inputs go, if weights are elsewhere too; `positions` is how much the model can read.
    scored = tokenized(tokenizer, examples, max_tokens, positions=positions)
    # Summed in input order, whatever the batches were.
    starts = range(0, len(scored), batch_size)
    reader = _Reader(model, device or model.device)
    batches = (scored[start : start + batch_size] for start in starts)
    nats = [value for batch in batches for value in reader.nats(batch)]
    spelled = (tokenizer.decode(run, clean_up_tokenization_spaces=False) for item in scored for run in _runs(item))
    # A character that a limit cuts counts as three bytes.
    count, utf8_bytes = sum(item.count for item in scored), sum(len(str(text).encode()) for text in spelled)
    of_each = tuple(value / item.count for value, item in zip(nats, scored, strict=True))
    return Score(math.fsum(nats) / count, count, max(1, utf8_bytes), of_each=of_each)


def _runs(item: Scored) -> list[list[int]]:
    """Return the scored tokens, each run of them together."""
    runs: list[list[int]] = [[]]
    for token in item.targets:
        if token != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return runs


def tokenized(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example | Rendered],
    limit: int,
    *,
    whole: bool = False,
    positions: int | None = None,
) -> list[Scored]:
    """Turn examples into at most `limit` token ids each, without empty ones; raise `DataError` if none is left.

    A context that stands before an example is read in addition to them, if all that fits into so many positions.
    """
    contexts = cache(lambda text: list(tokenizer(text)["input_ids"]) if text else [])  # most are the same
    scored: list[Scored] = []
    for example in examples:
        if isinstance(example, Rendered):
            chat = _marked_tokens(tokenizer, example)
            context = chat.ids[: chat.context]
            item = _chat_tokens(tokenizer, chat, _room(limit, context, positions), whole=whole)
        else:
            context = contexts(example.context)
            item = _tokenize(tokenizer, example, _room(limit, context, positions), whole=whole)
        if item is not None:
            scored.append(_after(tokenizer, context, item) if context else item)
    if not scored:
        raise DataError("no example is long enough to predict a token", hint="use longer texts")
    return scored


def _room(limit: int, context: list[int], positions: int | None) -> int:
    """Return how many tokens may be read beside a context."""
    room = limit if positions is None else min(limit, positions - len(context))
    if context and room < _FEWEST:
        fact = f"the context has {len(context)} tokens, but the base model reads only {positions}"
        raise DataError(fact, hint="run `icm context` to make a shorter one")
    return room


def _after(tokenizer: PreTrainedTokenizerBase, context: list[int], item: Scored) -> Scored:
    """Put a context before an item, which begins no text of its own then."""
    own = item.ids[len(_start(tokenizer, item.ids)) :]
    shift = len(context) + len(own) - len(item.ids)
    unscored, answers = (frozenset(place + shift for place in some) for some in (item.unscored, item.answers))
    return Scored(context + own, item.first + shift, unscored, answers, len(context))


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, example: Example, limit: int, *, whole: bool = False
) -> Scored | None:
    if not example.prompt:
        ids = list(tokenizer(example.completion, truncation=True, max_length=limit)["input_ids"])
        first = 1
    elif whole:
        prompt, ids = (list(tokenizer(text)["input_ids"]) for text in (example.prompt, example.text))
        return _whole(tokenizer, ids, range(len(prompt), len(ids)), limit)
    else:
        prompt = list(tokenizer(example.prompt)["input_ids"])
        # Without special tokens, or the tokenizer would start a second text between prompt and completion.
        options = {"add_special_tokens": False, "truncation": True, "max_length": limit - 1}
        answer = list(tokenizer(example.completion, **options)["input_ids"])
        # Cut the prompt at its beginning: the tokens next to the answer say most about it.
        prompt = prompt[-(limit - len(answer)) :]
        ids, first = prompt + answer, max(1, len(prompt))
    return Scored(ids, first) if len(ids) > first else None


def _chat_tokens(
    tokenizer: PreTrainedTokenizerBase, chat: _Marked, limit: int, *, whole: bool = False
) -> Scored | None:
    ids, marks = chat.ids[chat.context :], chat.marks[chat.context :]
    places = [place for place, is_scored in enumerate(marks) if is_scored and place > 0]
    if whole:
        return _whole(tokenizer, ids, places, limit)
    if not places:
        return None
    # As for a prompt: what is far from the first answer is cut, at most to the token before it.
    end = min(places[-1] + 1, max(limit, places[0] + limit - 1))
    start = max(0, min(end - limit, places[0] - 1))
    kept = marks[start:end]
    first = places[0] - start
    unscored = frozenset(place for place in range(first, len(kept)) if not kept[place])
    return Scored(ids[start:end], first, unscored, is_chat=True)


def joined(tokenizer: PreTrainedTokenizerBase, items: Sequence[Scored], limit: int) -> list[Scored]:
    """Put items one after the other, as samples stand in a context; of each the same tokens are scored as before.

    They come back as a few texts of at most `limit` tokens, about as many items in each, if none is longer itself.
    """
    between = list(tokenizer(SEPARATOR, **_SPECIAL)["input_ids"])
    longest = max(item.size for item in items) + len(between)
    count = math.ceil(len(items) / max(1, limit // longest))
    bounds = (number * len(items) // count for number in range(count + 1))
    return [_one_text(tokenizer, items[first:end], between) for first, end in itertools.pairwise(bounds)]


def _one_text(tokenizer: PreTrainedTokenizerBase, items: Sequence[Scored], between: list[int]) -> Scored:
    ids, scored = list[int](), list[int]()
    for item in items:
        if ids and not item.is_chat:
            ids += between
        start = len(_start(tokenizer, item.ids)) if ids else 0
        shift = len(ids) - start
        scored += [place + shift for place in range(item.first, item.size) if place not in item.unscored]
        ids += item.ids[start:]
    return Scored(ids, scored[0], frozenset(range(scored[0], len(ids))) - frozenset(scored))


def pieces(tokenizer: PreTrainedTokenizerBase, item: Scored, limit: int) -> list[Scored]:
    """Return an example that is scored as a whole in pieces of at most `limit` tokens, all about as long.

    Of one with an answer only the piece around its beginning is returned.
    """
    if item.answers:
        around = _whole(tokenizer, item.ids, item.answers, limit)
        return [] if around is None else [around]
    start = _start(tokenizer, item.ids)
    rest = item.ids[len(start) :]
    count = math.ceil(len(rest) / max(1, limit - len(start)))
    bounds = (number * len(rest) // count for number in range(count + 1))
    found = ([*start, *rest[first:end]] for first, end in itertools.pairwise(bounds))
    return [Scored(ids, 1) for ids in found if len(ids) > 1]


def _whole(tokenizer: PreTrainedTokenizerBase, ids: list[int], answers: Collection[int], limit: int) -> Scored | None:
    """Return an example that is scored as a whole; of a longer one, what is on either side of where its answer begins.

    Half of that at most are the prompt's, unless the answer is short.
    """
    begin = min(answers, default=0)
    start = _start(tokenizer, ids) if len(ids) > limit else []
    limit -= len(start)
    before = min(begin, max(limit - (len(ids) - begin), limit // 2))
    first = begin - before
    read = ids[first : first + limit]
    if first:
        read, first = [*start, *read], first - len(start)
    places = frozenset(place - first for place in answers if place - first < len(read))
    return Scored(read, 1, answers=places) if len(read) > 1 else None


def _start(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return the token that begins every text, if there is one: all later ones attend to it."""
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


@dataclass(frozen=True)
class _Marked:
    """The tokens of a chat, which of them are scored, and how many at the beginning are of the context."""

    ids: list[int]
    marks: list[bool]
    context: int


def _marked_tokens(tokenizer: PreTrainedTokenizerBase, chat: Rendered) -> _Marked:
    """Return the tokens of a chat; its special tokens are spelled in its text already."""
    if tokenizer.is_fast:
        tokens = tokenizer(chat.text, return_offsets_mapping=True, **_SPECIAL)
        offsets = tokens["offset_mapping"]
        context = sum(end <= chat.context for _, end in offsets) if chat.context else 0
        return _Marked(list(tokens["input_ids"]), scored_tokens(chat, offsets), context)
    ids = list(tokenizer(chat.text[: chat.context], **_SPECIAL)["input_ids"]) if chat.context else []
    context = len(ids)
    marks = [False] * context
    edges = [chat.context, *(edge for span in chat.scored for edge in span), len(chat.text)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        piece = list(tokenizer(chat.text[start:end], **_SPECIAL)["input_ids"]) if start < end else []
        ids += piece
        marks += [number % 2 == 1] * len(piece)
    return _Marked(ids, marks, context)


class _Reader:
    """Reads batches of texts with a model; a context that all of them have is read once."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._takes = inspect.signature(model.forward).parameters
        self._context: list[int] = []
        self._cache: Any = None  # keys and values of all its tokens but the last

    @torch.inference_mode()
    def nats(self, batch: Sequence[Scored]) -> list[float]:
        """Return the loss of each text, summed over its scored tokens."""
        logits, start = self._logits(batch)
        losses = [_row_losses(row, item, start) for row, item in zip(logits, batch, strict=True)]
        # float64: a sum over thousands of tokens would lose digits that a retained gain needs. On the CPU, as Apple's
        # devices have none; and in one copy, as a card has to be waited for.
        parts = torch.split(torch.cat(losses).cpu().double(), [len(part) for part in losses])
        return [float(part.sum()) for part in parts]

    def _logits(self, batch: Sequence[Scored]) -> tuple[torch.Tensor, int]:
        """Return next-token logits (texts, T, vocabulary) from one token of each text on, and which that is."""
        context = batch[0].ids[: batch[0].context]
        is_shared = len(context) > 1 and all(item.ids[: item.context] == context for item in batch)
        known = self._read(context) if is_shared else None
        start = 0 if known is None else len(context) - 1
        ids, mask = padded([item.ids[start:] for item in batch], self._device)  # padding is never a target
        if known is None:
            return self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits, 0
        known.batch_repeat_interleave(len(batch))
        mask = torch.cat([mask.new_ones(len(batch), start), mask], dim=1)
        name = next(name for name in _CACHES if name in self._takes)
        return self._model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: known}).logits, start

    def _read(self, context: list[int]) -> Any:
        """Return a copy of what a model keeps of a context, which reading on changes; None if it keeps nothing."""
        from transformers.cache_utils import DynamicCache

        if context != self._context and not self._takes.keys().isdisjoint(_CACHES):
            # Its logits, a row of the vocabulary's size for each token, are not needed.
            fewer = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
            answer = self._model(input_ids=uploaded([context[:-1]], self._device), use_cache=True, **fewer)
            self._context = context
            self._cache = next((part for part in answer.values() if isinstance(part, DynamicCache)), None)
        return copy.deepcopy(self._cache)


def _row_losses(logits: torch.Tensor, item: Scored, start: int) -> torch.Tensor:
    """Return the loss of each scored token; `logits` (T, vocabulary) are those from the token `start` on."""
    # One row at a time in float32: a whole batch of vocabulary-wide rows would double the peak memory.
    predicted = logits[item.first - 1 - start : len(item.ids) - 1 - start].float()
    return functional.cross_entropy(predicted, uploaded(item.targets, logits.device), reduction="none")


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both int64 of shape (rows, T); T is that of the longest row, or `length`."""
    # Padding is on the right and masked: in a causal model no real token sees it.
    length = length or max(map(len, rows))
    ids = uploaded([[*row, *[0] * (length - len(row))] for row in rows], device)
    return ids, uploaded([[1] * len(row) + [0] * (length - len(row)) for row in rows], device)


def next_token_logits(base: BaseModel, items: Sequence[Scored], *, from_leaf: bool = False) -> list[torch.Tensor]:
    """Return the next-token logits of each text, (T, vocabulary) without its padding."""
    rows, length = [item.ids for item in items], max(item.size for item in items)
    if not from_leaf:  # then hooks may count what they see, which must not be padding
        length = max(length, base.within(round_length(length, base.device, base.input_dtype)))
    ids, mask = padded(rows, base.device, length)
    inputs = {"input_ids": ids}
    if from_leaf:
        # Autograd only runs from a leaf that takes gradients, and every parameter of the base model is frozen.
        embedded: torch.Tensor = base.model.get_input_embeddings()(ids)  # (texts, T, d)
        inputs = {"inputs_embeds": embedded.detach().requires_grad_()}
    # Without padding and without a mask, attention may use its fastest kernel.
    if any(item.size < length for item in items):
        inputs["attention_mask"] = mask
    with _attention(base, length):
        logits = base.model(**inputs, use_cache=False).logits  # (texts, T, vocabulary)
    return [row[: len(item.ids)] for row, item in zip(logits, items, strict=True)]


def _attention(base: BaseModel, length: int) -> AbstractContextManager[None]:
    """Return what chooses the kernel of attention for texts of so many tokens."""
    # In bfloat16 on a processor the gradient of the fused kernel takes ten times as long as the kernel itself, and its
    # order slows what follows: without it a step of refinement takes a quarter less (docs/results/LOG.md).
    is_slow = base.device.type == "cpu" and base.input_dtype == torch.bfloat16 and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if is_slow and length <= _PLAIN_ATTENTION else nullcontext()
