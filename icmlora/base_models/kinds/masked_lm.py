"""Masked language models such as BERT and ModernBERT; measured by the loss of masked tokens."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.examples import Example, plain, text_example
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs
from icmlora.base_models.kinds.causal_lm import PROBES
from icmlora.base_models.modality import IGNORED, BaseModel, Metric
from icmlora.errors import DataError

if TYPE_CHECKING:
    from icmlora.base_models.examples.chats import Chat

_MASKED = 0.15
"""Share of a text's tokens to mask, as in BERT (Devlin et al., arXiv 1810.04805); at least one token."""


class MaskedLM(AutoModality):
    """Models that `transformers.AutoModelForMaskedLM` loads."""

    name = "masked language model"
    metric = Metric("nats per masked token", higher_is_better=False)
    probes: Sequence[Example] = plain(PROBES)
    auto_class = "AutoModelForMaskedLM"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Read text, or prompt and completion as one text."""
        return as_text(text_example(row))

    def inputs(self, base: BaseModel, example: Example, limit: int) -> Inputs:
        """Mask some tokens, always the same ones per text, so that measurements are comparable."""
        import torch

        tokenizer = base.tokenizer
        ids = torch.tensor(tokenizer(example.text, truncation=True, max_length=limit)["input_ids"])  # (T,)
        special = torch.tensor(tokenizer.get_special_tokens_mask(ids.tolist(), already_has_special_tokens=True))
        places = (special == 0).nonzero()[:, 0]
        draw = torch.Generator().manual_seed(zlib.crc32(example.text.encode()))
        count = min(len(places), max(1, round(_MASKED * len(places))))
        hidden = places[torch.randperm(len(places), generator=draw)[:count]]
        targets = torch.full_like(ids, IGNORED)
        targets[hidden] = ids[hidden]
        text = tokenizer.decode(ids[hidden])
        ids[hidden] = tokenizer.mask_token_id
        tensors = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        return Inputs(tensors, tuple(targets.tolist()), text, len(ids))


def as_text(example: Example | Chat) -> Example:
    """Return an example as text; raise `DataError` if it is a chat without a plain form."""
    if not isinstance(example, Example):
        if example.plain is None:
            raise DataError("is a chat, which masked language models do not read")
        return Example(*example.plain)
    return example
