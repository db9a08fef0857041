"""The supported kinds of base models, the most general last."""

from __future__ import annotations

from typing import Any

from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.kinds.classification import ImageClassification, TextClassification
from icmlora.base_models.kinds.media_to_text import ImageTextToText, Speech
from icmlora.base_models.kinds.object_detection import ObjectDetection
from icmlora.base_models.kinds.text import MaskedLM, Seq2SeqLM
from icmlora.base_models.modality import Modality

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
