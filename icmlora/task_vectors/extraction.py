"""Neutral probe texts, for tasks that bring no samples of their own.

Sixteen short pieces in several genres and languages, written for this project. They say nothing about any task: only
the adapted view reads them, where the adapter itself makes the difference.

Run the base model over support sets and keep the mean hidden state.

    adapted   (samples, tokens) -> last layer (samples, tokens, d) -> last real position (samples, d) -> mean -> (d,)
    context   (1, tokens)       -> last layer (1, tokens, d)                                          -> mean -> (d,)

The last layer is what the output head reads: after the final norm. The head is not run. Means are taken in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from icmlora.base_models.attach import adapted
from icmlora.base_models.causal_lm import BaseModel, padded
from icmlora.errors import DataError
from icmlora.task_vectors.vector import Extractor, Source, TaskVector, VectorSettings, View, split_samples

PROBES: tuple[str, ...] = (
    "The river runs slowly past the old mill before it turns north towards the town. In spring the water rises, "
    "and the children count the stones that are still dry.",
    "To prepare the tea, boil fresh water, warm the pot, add one spoon of leaves for each cup and wait four minutes.",
    "def mean(items):\n    total = 0.0\n    for item in items:\n        total += item\n    return total / len(items)\n",
    "Question: Why does ice float on water?\nAnswer: Ice is less dense than liquid water, because its "
    "molecules are held further apart in the crystal.",
    "Theorem. The sum of two even numbers is even. Proof. Let a = 2m and b = 2n. Then a + b = 2(m + n), which is even.",
    "<ul>\n  <li>Monday: closed</li>\n  <li>Tuesday: 9 to 17</li>\n  <li>Wednesday: 9 to 12</li>\n</ul>\n",
    "SELECT city, COUNT(*) AS visitors FROM visits WHERE year = 2020 GROUP BY city ORDER BY visitors DESC LIMIT 10;",
    "Dear Ms Novak, thank you for your letter of 3 May. The parcel has arrived and we will write again next week.",
    "Der Zug hält an jedem Bahnhof, und an jedem steigen ein paar Leute aus. Am Ende der Strecke ist er fast leer.",
    "La biblioteca abre a las nueve de la mañana. Los sábados hay un taller para niños y la entrada es gratuita.",
    "Le boulanger se lève avant le soleil. Quand les premiers clients arrivent, le pain est encore chaud.",
    "Зимой темнеет рано, и в окнах домов загораются огни. Снег скрипит под ногами, а воздух пахнет дымом.",
    "春天来了，河边的柳树长出了新叶。孩子们在草地上放风筝，老人坐在长椅上聊天。",
    "name,unit,price\napple,kg,2.40\nbread,piece,3.10\nmilk,litre,1.25\n",
    '{"sensor": "north", "readings": [21.5, 21.7, 21.4], "unit": "celsius", "valid": true}',
    "- Well, did you see it?\n- I saw something. A light, then nothing.\n- And you went no closer?\n- Would you have?",
)


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
