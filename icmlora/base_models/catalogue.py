"""The supported modalities, one per line, the most general last. Importing this module needs no torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from icmlora.base_models.examples.examples import Examples, parse_examples
from icmlora.base_models.finding.lookup import FoundBase
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.kinds.custom_model import CustomModality
from icmlora.base_models.kinds.image_classification import ImageClassification
from icmlora.base_models.kinds.image_text import ImageTextToText
from icmlora.base_models.kinds.masked_lm import MaskedLM
from icmlora.base_models.kinds.object_detection import ObjectDetection
from icmlora.base_models.kinds.seq2seq_lm import Seq2SeqLM
from icmlora.base_models.kinds.speech import Speech
from icmlora.base_models.kinds.text_classification import TextClassification
from icmlora.base_models.modality import Modality
from icmlora.errors import BaseModelUnsuited, DataError

MODALITIES: list[Modality[Any, Any]] = [
    ObjectDetection(),
    ImageClassification(),
    Speech(),
    ImageTextToText(),
    TextClassification(),
    Seq2SeqLM(),
    MaskedLM(),
    CausalLM(),
]


def modality_of(found: FoundBase) -> Modality[Any, Any]:
    """Return the loader's modality, else the first suitable one; raise `BaseModelUnsuited` if there is none."""
    found.refuse_pipeline()
    if found.loader is not None:
        return CustomModality(found.loader)
    for known in MODALITIES:
        if known.suits(found):
            return known
    hint = "its tasks can be stored, encoded and materialized; run `icm base add --loader` to measure them too"
    raise BaseModelUnsuited(f"base model {found.label!r} is of a kind that icm cannot run", hint=hint)


def check_examples(data: bytes, *, path: str | Path | None = None, any_row: bool = False) -> Examples:
    """Read examples without knowing the base model: the modality that can read most rows wins.

    Set `any_row` if a base model with a loader is known, because it may read rows of any form. `path` is for messages.

    Raises:
        DataError: No modality can read any of the rows.
    """
    found: list[Examples] = []
    for known in MODALITIES[:-1]:
        with suppress(DataError):
            found.append(parse_examples(data, known.example, path=path))
    if any(not examples.skipped for examples in found):
        return max(found, key=len)
    # The last modality is the most general, and its message is the most helpful.
    try:
        found.append(parse_examples(data, MODALITIES[-1].example, path=path))
    except DataError:
        if any_row:
            return parse_examples(data, dict, path=path)
        if not found:
            raise
    return max(found, key=len)
