"""Speech recognisers such as Whisper and Moonshine; measured by next-token loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.media import Media, media_of, read_sound
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs, seen
from icmlora.base_models.kinds.seq2seq_lm import moved
from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelUnsuited, DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Utterance:
    """A recording and its transcript."""

    audio: Media
    text: str


class Speech(AutoModality):
    """Models that `transformers.AutoModelForSpeechSeq2Seq` loads."""

    name = "speech recogniser"
    reads = ("audio",)
    auto_class = "AutoModelForSpeechSeq2Seq"
    processor_class = "AutoProcessor"

    def example(self, row: Mapping[str, Any]) -> Utterance:
        """Read a recording and its transcript; raise `DataError` if one is missing."""
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError("has no text for its recording")
        return Utterance(media_of(row, "audio"), text)

    def inputs(self, base: BaseModel, example: Utterance, limit: int) -> Inputs:
        """Convert the recording to features and the text to tokens; raise `BaseModelUnsuited` for a language model."""
        if not base.model.config.is_encoder_decoder:
            fact = f"base model {base.label!r} is an audio language model, which icm cannot run"
            raise BaseModelUnsuited(fact, hint="use an encoder-decoder speech recogniser such as Whisper")
        rate = base.processor.feature_extractor.sampling_rate
        sound = read_sound(example.audio, rate)
        features = seen(base, base.processor(audio=sound, sampling_rate=rate, return_tensors="pt"), "a recording")
        labels = base.processor.tokenizer(example.text, truncation=True, max_length=limit)["input_ids"]
        tensors = features | {"decoder_input_ids": moved(base, labels)}
        return Inputs(tensors, tuple(labels), example.text, len(labels))

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return the decoder's last layer at the last position, (examples, d)."""
        return outputs.decoder_hidden_states[-1][:, -1]  # type: ignore[no-any-return]
