"""The modalities that this icm knows: one line for each, the most general last. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icmlora.base_models.causal_lm import CausalLM
from icmlora.base_models.lookup import FoundBase
from icmlora.base_models.modality import Modality
from icmlora.errors import DataError

MODALITIES: list[Modality[Any, Any]] = [
    CausalLM(),
]


def modality_of(found: FoundBase) -> Modality[Any, Any]:
    """Return the first modality that suits a base model; the last one takes all that are left."""
    return next((known for known in MODALITIES if known.suits(found)), MODALITIES[-1])


def read_examples(data: bytes, *, path: str | Path | None = None) -> tuple[Any, ...]:
    """Read examples where the base model, and so their modality, is not known: any modality may take them."""
    # The last modality is the most general one, and its message is the most helpful.
    for known in MODALITIES[:-1]:
        try:
            return known.read_examples(data, path=path)
        except DataError:
            continue
    return MODALITIES[-1].read_examples(data, path=path)
