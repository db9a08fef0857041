"""Models that answer a recording or an image with text, such as Whisper, Florence-2, SmolVLM and Qwen2-VL.

Measured by the loss of the answer tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from icmlora.base_models.examples.forms import ImagePrompt, Utterance, image_prompt_of, utterance_of
from icmlora.base_models.examples.media import open_image, read_sound
from icmlora.base_models.finding.lookup import FoundBase, read_config
from icmlora.base_models.kinds.auto_model import Inputs, WithDecoder, moved, names_a_class_of, seen
from icmlora.base_models.modality import IGNORED, BaseModel
from icmlora.errors import BaseModelUnsuited

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# Multimodal language models whose adapters were mostly trained on text alone, so they are run on text alone.
_MAINLY_TEXT = frozenset({"gemma3", "gemma3n", "gemma4", "gemma4_unified"})
# Models whose type-0 tokens attend in both directions: an answer of that type would be read before it is predicted.
_PREFIXED = frozenset({"paligemma"})


class Speech(WithDecoder):
    """Models that `transformers.AutoModelForSpeechSeq2Seq` loads."""

    name = "speech recogniser"
    reads = ("audio",)
    auto_class = "AutoModelForSpeechSeq2Seq"
    processor_class = "AutoProcessor"

    def example(self, row: Mapping[str, Any]) -> Utterance:
        return utterance_of(row)

    def inputs(self, base: BaseModel, example: Utterance, limit: int) -> Inputs:
        if not base.model.config.is_encoder_decoder:
            fact = f"base model {base.label!r} is an audio language model, which icm cannot run"
            raise BaseModelUnsuited(fact, hint="use an encoder-decoder speech recogniser such as Whisper")
        rate = base.processor.feature_extractor.sampling_rate
        sound = read_sound(example.audio, rate)
        features = seen(base, base.processor(audio=sound, sampling_rate=rate, return_tensors="pt"), "a recording")
        labels = base.processor.tokenizer(example.text, truncation=True, max_length=limit)["input_ids"]
        return Inputs(features | {"decoder_input_ids": moved(base, labels)}, tuple(labels), example.text, len(labels))


class ImageTextToText(WithDecoder):
    """Models that `transformers.AutoModelForImageTextToText` loads."""

    name = "image-and-text model"
    reads = ("image",)
    auto_class = "AutoModelForImageTextToText"
    processor_class = "AutoProcessor"
    batch = 1  # some of them number the patches of all images consecutively

    def suits(self, found: FoundBase) -> bool:
        """Return whether `config.json` names such a model; models like Gemma 3 are run as language models instead."""
        if not super().suits(found):
            return False
        config = read_config(found.path)
        return not (config.get("model_type") in _MAINLY_TEXT and names_a_class_of("AutoModelForCausalLM", config))

    def example(self, row: Mapping[str, Any]) -> ImagePrompt:
        return image_prompt_of(row)

    def inputs(self, base: BaseModel, example: ImagePrompt, limit: int) -> Inputs:
        """Put the image into the prompt and score the completion; raise `BaseModelUnsuited` if there are no tokens."""
        image, processor, text = open_image(example.image), base.processor, example.completion
        cut = {"truncation": True, "max_length": limit}
        # TrOCR and Donut take no prompt as input; their decoders only continue their own output.
        if "input_ids" not in inspect.signature(type(base.model).forward).parameters:
            pixels = seen(base, processor(images=image, return_tensors="pt"), "an image")
            asked = processor.tokenizer(example.prompt, add_special_tokens=False)["input_ids"] if example.prompt else []
            answer = processor.tokenizer(text, **cut)["input_ids"]
            targets = (*[IGNORED] * len(asked), *answer)
            return Inputs(pixels | {"decoder_input_ids": moved(base, [*asked, *answer])}, targets, text, len(targets))
        made = processor(text=_prompt(base, example.prompt), images=image, return_tensors="pt")
        prompt = seen(base, made, "an image and a prompt")
        if "input_ids" not in prompt:
            raise BaseModelUnsuited(f"the processor of base model {base.label!r} does not tokenise prompts")
        if base.model.config.is_encoder_decoder:
            answer = processor.tokenizer(text, **cut)["input_ids"]
            tensors = prompt | {"decoder_input_ids": moved(base, answer)}
            return Inputs(tensors, tuple(answer), text, prompt["input_ids"].shape[1] + len(answer))
        return _continued(base, prompt, text, limit)


def _continued(base: BaseModel, prompt: dict[str, torch.Tensor], text: str, limit: int) -> Inputs:
    tokenizer = base.processor.tokenizer
    options = {"add_special_tokens": False, "truncation": True, "max_length": limit, "return_tensors": "pt"}
    answer = tokenizer(text, **options)["input_ids"]
    asked = prompt["input_ids"]
    if tokenizer.sep_token_id is not None and int(asked[0, -1]) == tokenizer.sep_token_id:
        asked = asked[:, :-1]  # GIT uses BERT's tokenizer, which ends every text with a separator
    ids = torch.cat([asked, answer], dim=1)
    # The logits at a token predict the next one.
    targets = (*[IGNORED] * (asked.shape[1] - 1), *answer[0].tolist(), IGNORED)
    # Extend the token type ids, (1, T), with the type of an answer.
    kind = 1 if base.model.config.model_type in _PREFIXED else 0
    given = {name: prompt[name] for name in _TOKEN_TYPES if name in prompt}
    kinds = {name: pad(value, (0, ids.shape[1] - value.shape[1]), value=kind) for name, value in given.items()}
    tensors = prompt | kinds | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Inputs(tensors, targets, text, ids.shape[1])


def _prompt(base: BaseModel, prompt: str) -> str:
    """Format a prompt for the model's processor, with its chat template or with the image token."""
    processor = base.processor
    if getattr(processor, "chat_template", None):
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        return str(processor.apply_chat_template([message], add_generation_prompt=True))
    if base.model.config.is_encoder_decoder:  # Florence-2's processor inserts the image itself
        return prompt
    return f"{getattr(processor, 'image_token', '')}{prompt}"
