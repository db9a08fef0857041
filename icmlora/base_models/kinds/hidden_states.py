"""The last layer of a causal language model, after the final norm; the output head is not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from icmlora.base_models.examples.chat_template import Rendered
from icmlora.base_models.kinds.likelihood import padded
from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelUnsuited, DataError
from icmlora.io.devices import uploaded

_SEPARATOR = "\n\n"


def last_positions(base: BaseModel, texts: Sequence[str | Rendered], limit: int) -> torch.Tensor:
    """Return the last layer at the last real token of each text, (texts, d) in float32."""
    # A chat is read up to the end of its last answer, because the end-of-turn tokens are the same for every task.
    rows = [
        _tokens(base.tokenizer, text.text[: text.stop], limit, special=False)
        if isinstance(text, Rendered)
        else _tokens(base.tokenizer, text, limit)
        for text in texts
    ]
    hidden = _last_layer(base, *padded(rows, base.device))  # (texts, T, d)
    # Padding is on the right, so a row's last real token is at its length minus one.
    last = uploaded([len(row) - 1 for row in rows], hidden.device)
    return hidden[torch.arange(len(rows), device=hidden.device), last].float()


def mean_over_context(base: BaseModel, texts: Sequence[str | Rendered], limit: int) -> torch.Tensor:
    """Return the mean of the last layer over one context with the beginning of every text, (d,) in float32."""
    # A demonstration gets few tokens, and a template's text before a chat is the same for every task.
    plain = [text.text[text.start : text.stop] if isinstance(text, Rendered) else text for text in texts]
    ids = uploaded([_demonstrations(base.tokenizer, plain, limit)], base.device)  # (1, T)
    return _last_layer(base, ids, torch.ones_like(ids))[0].float().mean(dim=0)


def _demonstrations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[int]:
    """Pack the beginnings of all texts into one context; each share includes a separator."""
    separator = list(tokenizer(_SEPARATOR, add_special_tokens=False)["input_ids"])
    share = max(1, limit // len(texts) - len(separator))
    packed = _tokens(tokenizer, texts[0], share)
    # Only the first text may begin with special tokens: later ones would look like a new document.
    for text in texts[1:]:
        packed += separator + _tokens(tokenizer, text, share, special=False)
    return packed[:limit]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, *, special: bool = True) -> list[int]:
    ids = list(tokenizer(text, truncation=True, max_length=limit, add_special_tokens=special)["input_ids"])
    if not ids:
        raise DataError("a sample has no tokens", hint="remove empty samples")
    return ids


def _last_layer(base: BaseModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        hidden = _trunk(base)(**inputs).last_hidden_state
    assert isinstance(hidden, torch.Tensor)
    return hidden


def _trunk(base: BaseModel) -> Any:
    """Return the model without its head: logits over the whole vocabulary would cost as much as several layers."""
    model = base.model
    # Llama 4's text model stores its trunk under a different attribute than its class declares.
    for found in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if found is not None and found is not model:
            return found
    raise BaseModelUnsuited(f"icm cannot find the hidden states of base model {base.label!r}")
