"""Language models with an encoder: masked ones such as BERT, and sequence-to-sequence ones such as T5 and NLLB."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from icmlora.base_models.examples.examples import Example, plain
from icmlora.base_models.examples.forms import plain_text_of
from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs, WithDecoder, moved
from icmlora.base_models.kinds.causal_lm import PROBES
from icmlora.base_models.kinds.continuations import answer
from icmlora.base_models.modality import IGNORED, BaseModel, Metric

_MASKED = 0.15  # share of a text's tokens to mask, as in BERT (Devlin et al., arXiv 1810.04805); at least one token


class MaskedLM(AutoModality):
    """Models that `transformers.AutoModelForMaskedLM` loads; measured by the loss of masked tokens."""

    name = "masked language model"
    metric = Metric("nats per masked token", higher_is_better=False)
    probes: Sequence[Example] = plain(PROBES)
    auto_class = "AutoModelForMaskedLM"

    def example(self, row: Mapping[str, Any]) -> Example:
        return plain_text_of(row)

    def inputs(self, base: BaseModel, example: Example, limit: int) -> Inputs:
        """Mask some tokens, always the same ones per text, so that measurements are comparable."""
        tokenizer = base.tokenizer
        ids = torch.tensor(tokenizer(example.text, truncation=True, max_length=limit)["input_ids"])  # (T,)
        special = torch.tensor(tokenizer.get_special_tokens_mask(ids.tolist(), already_has_special_tokens=True))
        places = (special == 0).nonzero()[:, 0]
        draw = torch.Generator().manual_seed(zlib.crc32(example.text.encode()))
        count = min(len(places), max(1, round(_MASKED * len(places))))
        hidden = places[torch.randperm(len(places), generator=draw)[:count]]
        targets = torch.full_like(ids, IGNORED)
        targets[hidden] = ids[hidden]
        text = tokenizer.decode(ids[hidden])
        ids[hidden] = tokenizer.mask_token_id
        tensors = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        return Inputs(tensors, tuple(targets.tolist()), text, len(ids))


class Seq2SeqLM(WithDecoder):
    """Models that `transformers.AutoModelForSeq2SeqLM` loads: the encoder reads the prompt, the decoder the rest."""

    name = "sequence-to-sequence language model"
    auto_class = "AutoModelForSeq2SeqLM"

    def example(self, row: Mapping[str, Any]) -> Example:
        return plain_text_of(row)

    def inputs(self, base: BaseModel, example: Example, limit: int) -> Inputs:
        prompt = base.tokenizer(example.prompt, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        if not prompt.shape[1]:  # an empty prompt, and the tokenizer adds no special tokens
            prompt = moved(base, [])
        labels = base.tokenizer(text_target=example.completion, truncation=True, max_length=limit)["input_ids"]
        tensors = {"input_ids": prompt, "decoder_input_ids": moved(base, labels)}
        return Inputs(tensors, tuple(labels), example.completion, prompt.shape[1] + len(labels))

    def answer(self, base: BaseModel, prompt: Prompt, most: int) -> str:
        return answer(base, prompt, most)
