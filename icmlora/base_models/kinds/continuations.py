"""Texts that a language model writes by itself, with the adapter that is on it.

    first tokens of a sample, or of nothing ──sample token by token──▶ text like that which the adapter was trained on
    a prompt ──sample token by token──▶ several answers to it
    a prompt ──most probable token, again and again──▶ the same answer each time, to be read by people

A code can be fitted to what an adapter does on sampled texts where data is short or gone (as LLM-QAT quantises models
without data: Liu et al., arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel

_START = 8  # tokens of a sample that a text begins with
_SHORTEST = 16  # tokens below which a text is left out
_BATCH = 32  # texts written together


def continuations(base: BaseModel, items: Sequence[Scored], count: int, limit: int, *, seed: int = 0) -> list[Scored]:
    """Let the model write texts, of which each begins like an item, in turn, or with nothing if there are none.

    Fewer than `count` come back where some end early; none has more than `limit` tokens. `seed` is that of all random
    numbers; torch's global generators are left as they were.
    """
    starts = [item.ids[:_START] for item in items if len(item.ids) >= _START] or [[_nothing(base)]]
    rows = [starts[number % len(starts)] for number in range(count)]
    found: list[Scored] = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, count, _BATCH):
            found += [Scored(ids, 1) for ids in sampled(base, rows[first : first + _BATCH], base.within(limit))]
    return [item for item in found if item.size >= _SHORTEST]


def variants(base: BaseModel, prompt: Prompt, count: int, most: int, *, seed: int = 0) -> list[str]:
    """Let the model continue a prompt `count` times, each time with at most so many tokens that it samples.

    `seed` is that of all random numbers; torch's global generators are left as they were.
    """
    ids, found = _ids_of(base, prompt), list[str]()
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, count, _BATCH):
            starts = [ids] * min(_BATCH, count - first)
            rows = sampled(base, starts, base.within(len(ids) + most))
            found += [_spelled(base.tokenizer, row[len(ids) :]) for row in rows]
    return found


def answer(base: BaseModel, prompt: Prompt, most: int) -> str:
    """Let a causal or sequence-to-sequence language model continue a prompt with its most probable tokens.

    At most `most` are written. Of a prompt that is too long, the end is read.
    """
    tokenizer, room = base.tokenizer, None if base.positions is None else max(1, base.positions - most)
    ids = (_ids_of(base, prompt) or [_nothing(base)])[-room if room else 0 :]
    with torch.inference_mode():
        rows = _generated(base, [ids], most, do_sample=False, num_beams=1, temperature=None, top_k=None, top_p=None)
    if base.model.config.is_encoder_decoder:
        return _spelled(tokenizer, rows[0])
    # Alone, the first new token would lose the space before it.
    before, whole = _spelled(tokenizer, ids), _spelled(tokenizer, rows[0])
    return whole[len(before) :] if whole.startswith(before) else _spelled(tokenizer, rows[0][len(ids) :])


def _ids_of(base: BaseModel, prompt: Prompt) -> list[int]:
    return list(base.tokenizer(prompt.text, add_special_tokens=not prompt.is_rendered)["input_ids"])


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def sampled(base: BaseModel, starts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Sample from the model's own distribution, unchanged by temperature or cut-offs, up to the end of each text."""
    length = len(starts[0])
    rows = _generated(base, starts, limit - length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return [_until(base.tokenizer.eos_token_id, row, length) for row in rows]


def _generated(base: BaseModel, starts: Sequence[Sequence[int]], most: int, **how: Any) -> list[list[int]]:
    """Return texts of equal length, each with at most so many tokens that the model writes after it."""
    ids, end = torch.tensor(starts, device=base.device), base.tokenizer.eos_token_id
    written = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        repetition_penalty=1.0,
        eos_token_id=end,
        pad_token_id=end if end is not None else 0,
        **how,
    )
    rows: list[list[int]] = written.tolist()
    return rows


def _until(end: int | None, ids: list[int], start: int) -> list[int]:
    """Cut a text behind its first end token."""
    places = [place for place, token in enumerate(ids) if token == end and place >= start]
    return ids[: places[0] + 1] if places else ids


def _nothing(base: BaseModel) -> int:
    """Return the token that stands before a text: that of its beginning, else that of the end of another one."""
    tokenizer = base.tokenizer
    found = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return int(found)
