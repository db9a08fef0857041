"""Texts that a causal language model writes by itself, with the adapter that is on it.

    first tokens of a sample, or of nothing ──sample token by token──▶ text like that which the adapter was trained on

A code can be fitted to what an adapter does on such texts where data is short or gone (as LLM-QAT quantises models
without data: Liu et al., arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icmlora.base_models.likelihood import Scored
from icmlora.base_models.modality import BaseModel

_START = 8  # tokens of a sample that a text begins with
_SHORTEST = 16  # tokens below which a text is left out
_BATCH = 32  # texts written together


def continuations(base: BaseModel, items: Sequence[Scored], count: int, limit: int, *, seed: int = 0) -> list[Scored]:
    """Let the model write texts, of which each begins like an item, in turn, or with nothing if there are none.

    Args:
        base: A causal language model.
        items: What to begin like.
        count: Texts to write. Fewer come back where some end early.
        limit: Most tokens of a text.
        seed: Of all random numbers; torch's global generators are left as they were.
    """
    starts = [item.ids[:_START] for item in items if len(item.ids) >= _START] or [[_nothing(base)]]
    rows = [starts[number % len(starts)] for number in range(count)]
    found: list[Scored] = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, count, _BATCH):
            found += [Scored(ids, 1) for ids in _sampled(base, rows[first : first + _BATCH], base.within(limit))]
    return [item for item in found if item.size >= _SHORTEST]


def _sampled(base: BaseModel, starts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Sample from the model's own distribution, unchanged by temperature or cut-offs, up to the end of each text."""
    ids = torch.tensor(starts, device=base.device)
    end = base.tokenizer.eos_token_id
    written = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit - ids.shape[1],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=end,
        pad_token_id=end if end is not None else 0,
    )
    return [_until(end, row, ids.shape[1]) for row in written.tolist()]


def _until(end: int | None, ids: list[int], start: int) -> list[int]:
    """Cut a text behind its first end token."""
    places = [place for place, token in enumerate(ids) if token == end and place >= start]
    return ids[: places[0] + 1] if places else ids


def _nothing(base: BaseModel) -> int:
    """Return the token that stands before a text: that of its beginning, else that of the end of another one."""
    tokenizer = base.tokenizer
    found = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return int(found)
