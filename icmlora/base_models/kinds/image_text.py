"""Models that answer with text to an image and text, such as Florence-2, SmolVLM and Qwen2-VL.

Measured by the loss of the answer's tokens.
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


_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
# Language models that also see: most of their adapters were trained on text alone, so they are run on that.
_MAINLY_TEXT = frozenset({"gemma3", "gemma3n", "gemma4", "gemma4_unified"})
# Models whose tokens of kind 0 see each other both ways: an answer of that kind would be read before it is predicted.
_PREFIXED = frozenset({"paligemma"})


@dataclass(frozen=True)
class ImagePrompt:
    """An image, a prompt, and the answer to them."""

    image: Media
    prompt: str
    completion: str


class ImageTextToText(AutoModality):
    """What `transformers.AutoModelForImageTextToText` loads."""

    name = "image-and-text model"
    reads = ("image",)
    auto_class = "AutoModelForImageTextToText"
    processor_class = "AutoProcessor"
    batch = 1  # some of them number the pieces of all images in one row

    def suits(self, found: FoundBase) -> bool:
        """Judge by `config.json`; language models that also see, such as Gemma 3, are run as language models."""
        if not super().suits(found):
            return False
        config = read_config(found.path)
        return not (config.get("model_type") in _MAINLY_TEXT and names_a_class_of("AutoModelForCausalLM", config))

    def example(self, row: Mapping[str, Any]) -> ImagePrompt:
        """Read an image, a prompt and a completion; raise `DataError` if it has none."""
        prompt, completion = row.get("prompt", ""), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion.strip():
            raise DataError("has no prompt and completion for its image")
        return ImagePrompt(image_of(row), prompt, completion)

    def inputs(self, base: BaseModel, example: ImagePrompt, limit: int) -> Inputs:
        """Place the image in the prompt, score the completion; raise `BaseModelUnsuited` if there are no tokens."""
        image = open_image(example.image)
        # The decoders of TrOCR and Donut read no text beside the image; they only continue what they wrote.
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
    """Give the image to the encoder, and the prompt to the decoder as what it wrote before the answer."""
    pixels = seen(base, base.processor(images=image, return_tensors="pt"), "an image")
    asked = base.processor.tokenizer(example.prompt, add_special_tokens=False)["input_ids"] if example.prompt else []
    answer = base.processor.tokenizer(example.completion, truncation=True, max_length=limit)["input_ids"]
    tensors = pixels | {"decoder_input_ids": moved(base, [*asked, *answer])}
    targets = (*[IGNORED] * len(asked), *answer)
    return Inputs(tensors, targets, example.completion, len(targets))


def _translated(base: BaseModel, example: ImagePrompt, prompt: dict[str, torch.Tensor], limit: int) -> Inputs:
    """Give image and prompt to the encoder and the answer, moved by one token, to the decoder."""
    answer = base.processor.tokenizer(example.completion, truncation=True, max_length=limit)["input_ids"]
    tensors = prompt | {"decoder_input_ids": moved(base, answer)}
    return Inputs(tensors, tuple(answer), example.completion, prompt["input_ids"].shape[1] + len(answer))


def _continued(base: BaseModel, example: ImagePrompt, prompt: dict[str, torch.Tensor], limit: int) -> Inputs:
    """Let the model read image, prompt and answer one after the other."""
    import torch
    from torch.nn.functional import pad

    tokenizer = base.processor.tokenizer
    options = {"add_special_tokens": False, "truncation": True, "max_length": limit, "return_tensors": "pt"}
    answer = tokenizer(example.completion, **options)["input_ids"]
    asked = prompt["input_ids"]
    if tokenizer.sep_token_id is not None and int(asked[0, -1]) == tokenizer.sep_token_id:
        asked = asked[:, :-1]  # BERT's tokenizer, which GIT has, ends every text
    ids = torch.cat([asked, answer], dim=1)
    # The logits at a token predict the next one.
    targets = (*[IGNORED] * (asked.shape[1] - 1), *answer[0].tolist(), IGNORED)
    # What says of each token what kind it is, (1, T), goes on with that of an answer.
    kind = 1 if base.model.config.model_type in _PREFIXED else 0
    given = {name: prompt[name] for name in _OF_TOKENS if name in prompt}
    kinds = {name: pad(value, (0, ids.shape[1] - value.shape[1]), value=kind) for name, value in given.items()}
    tensors = prompt | kinds | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Inputs(tensors, targets, example.completion, ids.shape[1])


def _prompt(base: BaseModel, prompt: str) -> str:
    """Write a prompt as the model's processor expects it: with its chat template, or with the token for an image."""
    processor = base.processor
    if getattr(processor, "chat_template", None):
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        return str(processor.apply_chat_template([message], add_generation_prompt=True))
    if base.model.config.is_encoder_decoder:  # Florence-2's processor puts the image first by itself
        return prompt
    return f"{getattr(processor, 'image_token', '')}{prompt}"
