"""Models that answer with text to an image and text, such as Florence-2, SmolVLM and Qwen2-VL.

Measured by the loss of the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icmlora.base_models.auto_model import IGNORED, AutoModality, Inputs, names_a_class_of
from icmlora.base_models.lookup import read_config
from icmlora.base_models.media import Media, image_of, open_image
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.seq2seq_lm import moved
from icmlora.errors import DataError

if TYPE_CHECKING:
    import torch

    from icmlora.base_models.lookup import FoundBase


@dataclass(frozen=True)
class ImagePrompt:
    """An image, a prompt, and the answer to them."""

    image: Media
    prompt: str
    completion: str


class ImageTextToText(AutoModality):
    """What `transformers.AutoModelForImageTextToText` loads."""

    name = "image-and-text model"
    auto_class = "AutoModelForImageTextToText"
    processor_class = "AutoProcessor"
    batch = 1  # some of them number the pieces of all images in one row

    def suits(self, found: FoundBase) -> bool:
        """Judge by `config.json`; those that transformers also loads as language models are run as such: Gemma 3."""
        return super().suits(found) and not names_a_class_of("AutoModelForCausalLM", read_config(found.path))

    def example(self, row: Mapping[str, Any]) -> ImagePrompt:
        """Read an image, a prompt and a completion."""
        prompt, completion = row.get("prompt", ""), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion.strip():
            raise DataError("has no prompt and completion to its image")
        return ImagePrompt(image_of(row), prompt, completion)

    def inputs(self, base: BaseModel, example: ImagePrompt, limit: int) -> Inputs:
        """Let the processor place the image in the prompt; only the completion is scored."""
        import torch

        processor = base.processor
        prompt = dict(
            processor(text=_prompt(base, example.prompt), images=open_image(example.image), return_tensors="pt")
        )
        options = {"truncation": True, "max_length": limit, "return_tensors": "pt"}
        if base.model.config.is_encoder_decoder:
            answer = processor.tokenizer(example.completion, **options)["input_ids"]
            tensors = prompt | {"decoder_input_ids": moved(base, answer[0].tolist())}
            size = prompt["input_ids"].shape[1] + answer.shape[1]
            return Inputs(tensors, tuple(answer[0].tolist()), example.completion, size)
        answer = processor.tokenizer(example.completion, add_special_tokens=False, **options)["input_ids"]
        ids = torch.cat([prompt["input_ids"], answer], dim=1)
        # The logits at a token predict the next one.
        before = prompt["input_ids"].shape[1] - 1
        targets = (*[IGNORED] * before, *answer[0].tolist(), IGNORED)
        tensors = prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Inputs(tensors, targets, example.completion, ids.shape[1])

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return the decoder's last layer at the last position, as the paper does (arXiv 2501.17635)."""
        states = getattr(outputs, "decoder_hidden_states", None) or outputs.hidden_states
        return states[-1][:, -1]  # type: ignore[no-any-return]


def _prompt(base: BaseModel, prompt: str) -> str:
    """Write a prompt as the model's processor expects it: with its chat template, or with the token for an image."""
    processor = base.processor
    if getattr(processor, "chat_template", None):
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        return str(processor.apply_chat_template([message], add_generation_prompt=True))
    if base.model.config.is_encoder_decoder:  # Florence-2's processor puts the image first by itself
        return prompt
    return f"{getattr(processor, 'image_token', '')}{prompt}"
