"""Measure how well a causal language model predicts text.

    text -> tokens t0 t1 ... tn -> sum of -log p(t_i | t_0 .. t_i-1) over the scored tokens = nats

Losses are summed over predicted tokens, so each text is weighted by its length.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedTokenizerBase

from icmlora.base_models.examples.chat_template import Rendered, scored_tokens
from icmlora.base_models.examples.context import SEPARATOR
from icmlora.base_models.examples.examples import Example
from icmlora.base_models.modality import IGNORED, BaseModel, Score
from icmlora.errors import DataError
from icmlora.io.devices import round_length, uploaded

_SPECIAL = {"add_special_tokens": False}
_MIN_TOKENS = 2  # per text, to predict one token from the other
_PLAIN_ATTENTION = 128  # tokens; for longer texts plain attention is slower, and its memory grows quadratically
_CACHES = ("cache", "past_key_values")  # names of the KV cache argument; transformers renamed it


@dataclass(frozen=True)
class Scored:
    """Token ids of one example, and which of them are scored."""

    ids: list[int]  # the tokens
    first: int  # index of the first scored token, at least 1
    unscored: frozenset[int] = frozenset()  # later indices that are not scored: the user's turns of a longer chat
    # Indices of the answer tokens, for an example with a prompt that is scored as a whole.
    answers: frozenset[int] = frozenset()
    context: int = 0  # number of leading tokens that belong to the prepended context
    is_chat: bool = False  # whether it was rendered by a chat template

    @property
    def count(self) -> int:
        return len(self.ids) - self.first - len(self.unscored)

    @property
    def targets(self) -> list[int]:
        """Target tokens from the first scored one on; `IGNORED` for unscored ones, which torch's loss skips."""
        rest = self.ids[self.first :]
        return [IGNORED if place in self.unscored else token for place, token in enumerate(rest, self.first)]

    @property
    def size(self) -> int:
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
    """Score examples by teacher forcing; if present, only completions and assistant turns are scored."""
    # Prompts are truncated on the left. A batch size above 1 helps only on accelerators. `device` is the input device
    # if the weights are spread over several; `positions` is the model's maximum length.
    scored = tokenized(tokenizer, examples, max_tokens, positions=positions)
    # Summed in input order, independent of the batches.
    starts = range(0, len(scored), batch_size)
    reader = _TextScorer(model, device or model.device)
    nats = [value for start in starts for value in reader.nats(scored[start : start + batch_size])]
    utf8_bytes = 0
    for item in scored:
        # Each contiguous run of scored tokens on its own; a truncated character counts as three bytes.
        for is_scored, run in itertools.groupby(item.targets, lambda token: token != IGNORED):
            if is_scored:
                utf8_bytes += len(str(tokenizer.decode(list(run), clean_up_tokenization_spaces=False)).encode())
    count = sum(item.count for item in scored)
    of_each = tuple(value / item.count for value, item in zip(nats, scored, strict=True))
    return Score(math.fsum(nats) / count, count, max(1, utf8_bytes), of_each=of_each)


def tokenized(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example | Rendered],
    limit: int,
    *,
    whole: bool = False,
    positions: int | None = None,
) -> list[Scored]:
    """Convert examples to at most `limit` token ids each, skipping empty ones; raise `DataError` if none is left.

    A context is added on top of `limit`, as long as the total fits into `positions`.
    """
    contexts = cache(lambda text: list(tokenizer(text)["input_ids"]) if text else [])  # usually all the same
    scored: list[Scored] = []
    for example in examples:
        if isinstance(example, Rendered):
            ids, marks, before = _marked_tokens(tokenizer, example)
            context = ids[:before]
        else:
            context = contexts(example.context)
        room = limit if positions is None else min(limit, positions - len(context))
        if context and room < _MIN_TOKENS:
            fact = f"the context has {len(context)} tokens, but the base model reads only {positions}"
            raise DataError(fact, hint="run `icm context` to make a shorter one")
        if isinstance(example, Rendered):
            item = _chat_tokens(tokenizer, ids[before:], marks[before:], room, whole=whole)
        else:
            item = _tokenize(tokenizer, example, room, whole=whole)
        if item is not None:
            scored.append(_after(tokenizer, context, item) if context else item)
    if not scored:
        raise DataError("no example is long enough to predict a token", hint="use longer texts")
    return scored


def _after(tokenizer: PreTrainedTokenizerBase, context: list[int], item: Scored) -> Scored:
    """Prepend a context to an item and drop the item's own start token."""
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
        # No special tokens, or the tokenizer would start a second text between prompt and completion.
        options = {"add_special_tokens": False, "truncation": True, "max_length": limit - 1}
        answer = list(tokenizer(example.completion, **options)["input_ids"])
        # Truncate the prompt on the left: the tokens next to the answer matter most.
        prompt = prompt[-(limit - len(answer)) :]
        ids, first = prompt + answer, max(1, len(prompt))
    return Scored(ids, first) if len(ids) > first else None


def _chat_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], marks: list[bool], limit: int, *, whole: bool = False
) -> Scored | None:
    places = [place for place, is_scored in enumerate(marks) if is_scored and place > 0]
    if whole:
        return _whole(tokenizer, ids, places, limit)
    if not places:
        return None
    # Truncate on the left, as for a prompt, but keep the token before the first answer.
    end = min(places[-1] + 1, max(limit, places[0] + limit - 1))
    start = max(0, min(end - limit, places[0] - 1))
    kept = marks[start:end]
    first = places[0] - start
    unscored = frozenset(place for place in range(first, len(kept)) if not kept[place])
    return Scored(ids[start:end], first, unscored, is_chat=True)


def joined(tokenizer: PreTrainedTokenizerBase, items: Sequence[Scored], limit: int) -> list[Scored]:
    """Concatenate items like the samples of a context; the scored tokens of each stay the same.

    Returns a few texts with about equal numbers of items and at most `limit` tokens, unless an item itself is longer.
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
    """Split an example that is scored as a whole into pieces of about equal length, at most `limit` tokens.

    For an example with an answer, return only the piece around the start of the answer.
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
    """Return an example that is scored as a whole; truncate a longer one around the start of its answer.

    The prompt gets at most half of the limit, unless the answer is short.
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
    """Return the begin-of-text token if `ids` has one; all later tokens attend to it."""
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _marked_tokens(tokenizer: PreTrainedTokenizerBase, chat: Rendered) -> tuple[list[int], list[bool], int]:
    """Tokenise a chat; return its tokens, a mask of the scored ones, and the number of leading context tokens."""
    # The text already contains the special tokens.
    if tokenizer.is_fast:
        tokens = tokenizer(chat.text, return_offsets_mapping=True, **_SPECIAL)
        offsets = tokens["offset_mapping"]
        context = sum(end <= chat.context for _, end in offsets) if chat.context else 0
        return list(tokens["input_ids"]), scored_tokens(chat, offsets), context
    ids, marks = list[int](), list[bool]()
    edges = [0, chat.context, *(edge for span in chat.scored for edge in span), len(chat.text)]
    context = 0
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        if start < end:
            ids += tokenizer(chat.text[start:end], **_SPECIAL)["input_ids"]
        marks += [number > 0 and number % 2 == 0] * (len(ids) - len(marks))
        context = context if number else len(ids)
    return ids, marks, context


class _TextScorer:
    """Score batches of texts with a model; a context shared by a batch is read once and cached."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._takes = inspect.signature(model.forward).parameters
        self._context: list[int] = []
        self._cache: Any = None  # keys and values of all context tokens but the last

    @torch.inference_mode()
    def nats(self, batch: Sequence[Scored]) -> list[float]:
        """Return the loss of each text, summed over its scored tokens."""
        logits, start = self._logits(batch)
        losses = []
        for row, item in zip(logits, batch, strict=True):
            # float32 for one text at a time: for a whole batch it would double the peak memory.
            predicted = row[item.first - 1 - start : len(item.ids) - 1 - start].float()
            targets = uploaded(item.targets, predicted.device)
            losses.append(functional.cross_entropy(predicted, targets, reduction="none"))
        # float64: a float32 sum over thousands of tokens would lose digits that a retained gain needs. On the CPU,
        # because Apple's devices have no float64; in one copy, because each copy waits for the GPU.
        parts = torch.split(torch.cat(losses).cpu().double(), [len(part) for part in losses])
        return [float(part.sum()) for part in parts]

    def _logits(self, batch: Sequence[Scored]) -> tuple[torch.Tensor, int]:
        """Return next-token logits (texts, T, vocabulary), and the index of their first token in each text."""
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
        """Return a copy of the KV cache of a context, since later passes modify it; None if there is no cache."""
        if context != self._context and not self._takes.keys().isdisjoint(_CACHES):
            # The logits, (T, vocabulary), are not needed.
            fewer = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
            answer = self._model(input_ids=uploaded([context[:-1]], self._device), use_cache=True, **fewer)
            self._context = context
            self._cache = next((part for part in answer.values() if isinstance(part, DynamicCache)), None)
        return copy.deepcopy(self._cache)


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, int64 of shape (rows, T); T is `length` or the longest row's length."""
    # Padding is on the right and masked: in a causal model no real token attends to it.
    length = length or max(map(len, rows))
    ids = uploaded([[*row, *[0] * (length - len(row))] for row in rows], device)
    return ids, uploaded([[1] * len(row) + [0] * (length - len(row)) for row in rows], device)


def next_token_logits(base: BaseModel, items: Sequence[Scored], *, from_leaf: bool = False) -> list[torch.Tensor]:
    """Return the next-token logits of each text, (T, vocabulary) without its padding."""
    rows, length = [item.ids for item in items], max(item.size for item in items)
    if not from_leaf:  # with from_leaf, hooks may count their inputs, which must not include padding
        length = max(length, base.within(round_length(length, base.device, base.input_dtype)))
    ids, mask = padded(rows, base.device, length)
    inputs = {"input_ids": ids}
    if from_leaf:
        # Autograd needs a leaf that requires gradients, and every parameter of the base model is frozen.
        embedded: torch.Tensor = base.model.get_input_embeddings()(ids)  # (texts, T, d)
        inputs = {"inputs_embeds": embedded.detach().requires_grad_()}
    # Without padding and a mask, attention may use its fastest kernel.
    if any(item.size < length for item in items):
        inputs["attention_mask"] = mask
    # In bfloat16 on a CPU, the gradient of the fused kernel takes ten times as long as the kernel itself, and its order
    # slows later operations: without it, a refinement step takes a quarter less time (docs/results/LOG.md).
    is_slow = base.device.type == "cpu" and base.input_dtype == torch.bfloat16 and torch.is_grad_enabled()
    with sdpa_kernel(SDPBackend.MATH) if is_slow and length <= _PLAIN_ATTENTION else nullcontext():
        logits = base.model(**inputs, use_cache=False).logits  # (texts, T, vocabulary)
    return [row[: len(item.ids)] for row, item in zip(logits, items, strict=True)]
