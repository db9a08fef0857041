"""How well a causal language model predicts text.

    text -> tokens t0 t1 ... tn -> sum of -log p(t_i | t_0 .. t_i-1) over the scored tokens = nats

Losses are sums over predicted tokens, so that texts of different length count by their length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from icmlora.base_models.examples.chat_template import Rendered, scored_tokens
from icmlora.base_models.examples.examples import Example
from icmlora.base_models.modality import IGNORED, BaseModel, Score
from icmlora.errors import DataError
from icmlora.io.devices import uploaded

_SPECIAL = {"add_special_tokens": False}


@dataclass(frozen=True)
class Scored:
    """Token ids of one example, and which of them are scored.

    Attributes:
        ids: The tokens.
        first: Index of the first that is scored, at least 1.
        unscored: Indices after it of tokens that are not: the user's turns of a longer chat.
        answers: Indices of the tokens that answer a prompt, of an example that is scored as a whole.
    """

    ids: list[int]
    first: int
    unscored: frozenset[int] = frozenset()
    answers: frozenset[int] = frozenset()

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
) -> Score:
    """Score examples by teacher forcing; only completions and the assistant's turns, where there are such."""
    # Of a prompt the last tokens that fit are read. A batch size above 1 pays on accelerators only. `device` is where
    # inputs go, if weights are elsewhere too.
    scored = tokenized(tokenizer, examples, max_tokens)
    # Summed in input order, whatever the batches were.
    starts = range(0, len(scored), batch_size)
    place = device or model.device
    batches = (scored[start : start + batch_size] for start in starts)
    nats = math.fsum(value for batch in batches for value in _batch_nats(model, batch, place))
    spelled = (tokenizer.decode(run, clean_up_tokenization_spaces=False) for item in scored for run in _runs(item))
    # A character that a limit cuts counts as three bytes.
    count, utf8_bytes = sum(item.count for item in scored), sum(len(str(text).encode()) for text in spelled)
    return Score(nats / count, count, max(1, utf8_bytes))


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
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example | Rendered], limit: int, *, whole: bool = False
) -> list[Scored]:
    """Turn examples into at most `limit` token ids each, without empty ones; raise `DataError` if none is left."""
    found = (
        _chat_tokens(tokenizer, example, limit, whole=whole)
        if isinstance(example, Rendered)
        else _tokenize(tokenizer, example, limit, whole=whole)
        for example in examples
    )
    scored = [item for item in found if item is not None]
    if not scored:
        raise DataError("no example is long enough to predict a token of it", hint="give longer texts")
    return scored


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
    tokenizer: PreTrainedTokenizerBase, chat: Rendered, limit: int, *, whole: bool = False
) -> Scored | None:
    ids, marks = _marked_tokens(tokenizer, chat)
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
    return Scored(ids[start:end], first, unscored)


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


def _marked_tokens(tokenizer: PreTrainedTokenizerBase, chat: Rendered) -> tuple[list[int], list[bool]]:
    """Return the tokens of a chat and which are scored; its special tokens are spelled in its text already."""
    if tokenizer.is_fast:
        tokens = tokenizer(chat.text, return_offsets_mapping=True, **_SPECIAL)
        return list(tokens["input_ids"]), scored_tokens(chat, tokens["offset_mapping"])
    ids: list[int] = []
    marks: list[bool] = []
    edges = [0, *(edge for span in chat.scored for edge in span), len(chat.text)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        piece = list(tokenizer(chat.text[start:end], **_SPECIAL)["input_ids"]) if start < end else []
        ids += piece
        marks += [number % 2 == 1] * len(piece)
    return ids, marks


def _batch_nats(model: Any, batch: Sequence[Scored], device: torch.device) -> list[float]:
    ids, mask = padded([item.ids for item in batch], device)  # padding is never a target
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (batch, length, vocabulary)
        losses = [_row_losses(row, item) for row, item in zip(logits, batch, strict=True)]
        # float64: a sum over thousands of tokens would lose digits that a retained gain needs. On the CPU, as Apple's
        # devices have none; and in one copy, as a card has to be waited for.
        parts = torch.split(torch.cat(losses).cpu().double(), [len(part) for part in losses])
        return [float(part.sum()) for part in parts]


def _row_losses(logits: torch.Tensor, item: Scored) -> torch.Tensor:
    # One row at a time in float32: a whole batch of vocabulary-wide rows would double the peak memory.
    predicted = logits[item.first - 1 : len(item.ids) - 1].float()
    return functional.cross_entropy(predicted, uploaded(item.targets, logits.device), reduction="none")


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both int64 of shape (rows, T)."""
    # Padding is on the right and masked: in a causal model no real token sees it.
    length = max(map(len, rows))
    ids = uploaded([[*row, *[0] * (length - len(row))] for row in rows], device)
    return ids, uploaded([[1] * len(row) + [0] * (length - len(row)) for row in rows], device)


def next_token_logits(base: BaseModel, items: Sequence[Scored], *, from_leaf: bool = False) -> list[torch.Tensor]:
    """Return the next-token logits of each text, (T, vocabulary) without its padding."""
    ids, mask = padded([item.ids for item in items], base.device)
    inputs = {"input_ids": ids}
    if from_leaf:
        # Autograd only runs from a leaf that takes gradients, and every parameter of the base model is frozen.
        embedded: torch.Tensor = base.model.get_input_embeddings()(ids)  # (texts, T, d)
        inputs = {"inputs_embeds": embedded.detach().requires_grad_()}
    # Without padding and without a mask, attention may use its fastest kernel.
    if len({item.size for item in items}) > 1:
        inputs["attention_mask"] = mask
    logits = base.model(**inputs, use_cache=False).logits  # (texts, T, vocabulary)
    return [row[: len(item.ids)] for row, item in zip(logits, items, strict=True)]
