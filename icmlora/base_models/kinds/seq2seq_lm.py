"""Sequence-to-sequence language models such as T5, BART and NLLB; measured by next-token loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.examples import Example, text_example
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs
from icmlora.base_models.kinds.masked_lm import as_text
from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelUnsuited

if TYPE_CHECKING:
    import torch

    from icmlora.base_models.examples.prompts import Prompt


class Seq2SeqLM(AutoModality):
    """Models that `transformers.AutoModelForSeq2SeqLM` loads: the encoder reads the prompt, the decoder the rest."""

    name = "sequence-to-sequence language model"
    auto_class = "AutoModelForSeq2SeqLM"

    def example(self, row: Mapping[str, Any]) -> Example:
        """Read prompt and completion; plain text is all completion."""
        return as_text(text_example(row))

    def inputs(self, base: BaseModel, example: Example, limit: int) -> Inputs:
        """Build inputs with the prompt for the encoder and the completion, shifted by one token, for the decoder."""
        import torch

        prompt = base.tokenizer(example.prompt, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        if not prompt.shape[1]:  # an empty prompt, and the tokenizer adds no special tokens
            prompt = torch.tensor([[decoder_start(base)]])
        labels = base.tokenizer(text_target=example.completion, truncation=True, max_length=limit)["input_ids"]
        tensors = {"input_ids": prompt, "decoder_input_ids": moved(base, labels)}
        return Inputs(tensors, tuple(labels), example.completion, prompt.shape[1] + len(labels))

    def answer(self, base: BaseModel, prompt: Prompt, most: int) -> str:
        """Return the decoder's output for a prompt."""
        from icmlora.base_models.kinds.continuations import answer

        return answer(base, prompt, most)

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return the decoder's last layer at the last position, (examples, d), as ICM-LoRA does (arXiv 2501.17635)."""
        return outputs.decoder_hidden_states[-1][:, -1]  # type: ignore[no-any-return]


def moved(base: BaseModel, labels: list[int]) -> torch.Tensor:
    """Return the decoder inputs to predict T tokens, (1, T): the start token, then all but the last."""
    import torch

    return torch.tensor([[decoder_start(base), *labels[:-1]]])


def decoder_start(base: BaseModel) -> int:
    """Return a decoder's start token; raise `BaseModelUnsuited` if the configuration does not define it."""
    config = base.model.config
    for place in (config, config.get_text_config(decoder=True), getattr(base.model, "generation_config", None)):
        start = getattr(place, "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    raise BaseModelUnsuited(f"base model {base.label!r} does not define the decoder's start token")
