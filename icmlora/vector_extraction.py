"""Run the base model over support sets and keep the mean hidden state.

    adapted   (samples, tokens) -> last layer (samples, tokens, d) -> last real position (samples, d) -> mean -> (d,)
    context   (1, tokens)       -> last layer (1, tokens, d)                                          -> mean -> (d,)

The last layer is what the output head reads: after the final norm. The head is not run. Means are taken in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from icmlora.adapted import adapted
from icmlora.base_model import BaseModel
from icmlora.errors import DataError
from icmlora.padding import padded
from icmlora.probes import PROBES
from icmlora.task_vector import Extractor, Source, TaskVector, VectorSettings, View, split_samples

_SEPARATOR = "\n\n"


def extract_adapted(
    base: BaseModel, folder: Path, samples: Sequence[str] | None, settings: VectorSettings | None = None
) -> tuple[TaskVector, ...]:
    """Make the adapted view: one vector for each support set.

    Args:
        base: The base model; the adapter is put on it and taken off again.
        folder: The adapter as a PEFT folder that this package wrote or checked.
        samples: The task's samples; None for the bundled probes.
        settings: How much text to read; None for the defaults.

    Raises:
        BaseModelMismatch: The adapter cannot be put on this base model.
        DataError: There is no sample, or one has no token.
    """
    settings = settings or VectorSettings()
    sets = split_samples(PROBES if samples is None else samples, settings)
    batches = [[_tokens(base.tokenizer, text, settings.sample_tokens) for text in texts] for texts in sets]
    with adapted(base, folder):
        # The LoRA layers sit inside base.model now, so its trunk is the adapted one.
        values = [_last_positions(base, batch).mean(dim=0) for batch in batches]
    return _vectors(base, "adapted", "probes" if samples is None else "samples", settings, values)


def extract_context(
    base: BaseModel, samples: Sequence[str], settings: VectorSettings | None = None
) -> tuple[TaskVector, ...]:
    """Make the context view: one vector for each support set, without any adapter.

    There is no probe version of it: without an adapter and without samples it would be the same for every task.

    Args:
        base: The bare base model.
        samples: The task's samples.
        settings: How much text to read; None for the defaults.

    Raises:
        DataError: There is no sample, or one has no token.
    """
    settings = settings or VectorSettings()
    values = [_mean_over_positions(base, texts, settings) for texts in split_samples(samples, settings)]
    return _vectors(base, "context", "samples", settings, values)


def _vectors(
    base: BaseModel, view: View, source: Source, settings: VectorSettings, values: Sequence[torch.Tensor]
) -> tuple[TaskVector, ...]:
    extractor = Extractor(view, source, settings, base.dtype, base.fingerprint)
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise DataError(f"the hidden states of the {view} view are not finite", hint="try a wider precision")
    return tuple(TaskVector(view, number, value.cpu(), extractor) for number, value in enumerate(values))


def _last_positions(base: BaseModel, rows: Sequence[list[int]]) -> torch.Tensor:
    """Return the last layer at the last real token of each row, (rows, d) in float32."""
    hidden = _last_layer(base, *padded(rows))
    last = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
    return hidden[torch.arange(len(rows), device=hidden.device), last].float()


def _mean_over_positions(base: BaseModel, texts: Sequence[str], settings: VectorSettings) -> torch.Tensor:
    ids = torch.tensor([_demonstrations(base.tokenizer, texts, settings.context_tokens)])
    return _last_layer(base, ids, torch.ones_like(ids))[0].float().mean(dim=0)


def _demonstrations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[int]:
    """Pack the beginnings of all texts into one context; each gets an equal share of it, separator included."""
    separator = list(tokenizer(_SEPARATOR, add_special_tokens=False)["input_ids"])
    share = max(1, limit // len(texts) - len(separator))
    packed = _tokens(tokenizer, texts[0], share)
    for text in texts[1:]:
        packed += separator + _tokens(tokenizer, text, share, special=False)
    return packed[:limit]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, *, special: bool = True) -> list[int]:
    ids = list(tokenizer(text, truncation=True, max_length=limit, add_special_tokens=special)["input_ids"])
    if not ids:
        raise DataError("a sample has no token", hint="remove empty samples")
    return ids


def _last_layer(base: BaseModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    trunk = base.model.base_model
    with torch.no_grad():
        output = trunk(input_ids=ids.to(base.model.device), attention_mask=mask.to(base.model.device), use_cache=False)
    hidden = output.last_hidden_state
    assert isinstance(hidden, torch.Tensor)
    return hidden
