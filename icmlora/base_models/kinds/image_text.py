"""Models that answer an image and a prompt with text, such as Florence-2, SmolVLM and Qwen2-VL.

Measured by the loss of the answer tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.media import Media, image_of, open_image
from icmlora.base_models.finding.lookup import read_config
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs, names_a_class_of, seen
from icmlora.base_models.kinds.seq2seq_lm import moved
from icmlora.base_models.modality import IGNORED, BaseModel
from icmlora.errors import BaseModelUnsuited, DataError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from icmlora.base_models.finding.lookup import FoundBase


_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# Multimodal language models whose adapters were mostly trained on text alone, so they are run on text alone.
_MAINLY_TEXT = frozenset({"gemma3", "gemma3n", "gemma4", "gemma4_unified"})
# Models whose type-0 tokens attend in both directions: an answer of that type would be read before it is predicted.
_PREFIXED = frozenset({"paligemma"})


@dataclass(frozen=True)
class ImagePrompt:
    """An image, a prompt, and the answer to them."""

    image: Media
    prompt: str
    completion: str


class ImageTextToText(AutoModality):
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
        """Read an image, a prompt and a completion; raise `DataError` if one is missing or invalid."""
        prompt, completion = row.get("prompt", ""), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion.strip():
            raise DataError("has no prompt and completion for its image")
        return ImagePrompt(image_of(row), prompt, completion)

    def inputs(self, base: BaseModel, example: ImagePrompt, limit: int) -> Inputs:
        """Put the image into the prompt and score the completion; raise `BaseModelUnsuited` if there are no tokens."""
        image = open_image(example.image)
        # TrOCR and Donut take no prompt as input; their decoders only continue their own output.
        if "input_ids" not in inspect.signature(type(base.model).forward).parameters:
            return _written_after(base, example, image, limit)
        made = base.processor(text=_prompt(base, example.prompt), images=image, return_tensors="pt")
        prompt = seen(base, made, "an image and a prompt")
        if "input_ids" not in prompt:
            raise BaseModelUnsuited(f"the processor of base model {base.label!r} does not tokenise prompts")
        return (_translated if base.model.config.is_encoder_decoder else _continued)(base, example, prompt, limit)

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return the decoder's last layer at the last position, (examples, d), as ICM-LoRA does (arXiv 2501.17635)."""
        states = getattr(outputs, "decoder_hidden_states", None) or outputs.hidden_states
        return states[-1][:, -1]  # type: ignore[no-any-return]


def _written_after(base: BaseModel, example: ImagePrompt, image: Image, limit: int) -> Inputs:
    """Build inputs with the image for the encoder, and the prompt and answer for the decoder."""
    pixels = seen(base, base.processor(images=image, return_tensors="pt"), "an image")
    asked = base.processor.tokenizer(example.prompt, add_special_tokens=False)["input_ids"] if example.prompt else []
    answer = base.processor.tokenizer(example.completion, truncation=True, max_length=limit)["input_ids"]
    tensors = pixels | {"decoder_input_ids": moved(base, [*asked, *answer])}
    targets = (*[IGNORED] * len(asked), *answer)
    return Inputs(tensors, targets, example.completion, len(targets))


def _translated(base: BaseModel, example: ImagePrompt, prompt: dict[str, torch.Tensor], limit: int) -> Inputs:
    """Build inputs with image and prompt for the encoder, and the answer, shifted by one token, for the decoder."""
    answer = base.processor.tokenizer(example.completion, truncation=True, max_length=limit)["input_ids"]
    tensors = prompt | {"decoder_input_ids": moved(base, answer)}
    return Inputs(tensors, tuple(answer), example.completion, prompt["input_ids"].shape[1] + len(answer))


def _continued(base: BaseModel, example: ImagePrompt, prompt: dict[str, torch.Tensor], limit: int) -> Inputs:
    """Build inputs with image, prompt and answer in sequence."""
    import torch
    from torch.nn.functional import pad

    tokenizer = base.processor.tokenizer
    options = {"add_special_tokens": False, "truncation": True, "max_length": limit, "return_tensors": "pt"}
    answer = tokenizer(example.completion, **options)["input_ids"]
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
    return Inputs(tensors, targets, example.completion, ids.shape[1])


def _prompt(base: BaseModel, prompt: str) -> str:
    """Format a prompt for the model's processor, with its chat template or with the image token."""
    processor = base.processor
    if getattr(processor, "chat_template", None):
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        return str(processor.apply_chat_template([message], add_generation_prompt=True))
    if base.model.config.is_encoder_decoder:  # Florence-2's processor inserts the image itself
        return prompt
    return f"{getattr(processor, 'image_token', '')}{prompt}"
