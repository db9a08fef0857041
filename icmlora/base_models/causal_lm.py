"""Causal language models, which continue text token by token. Torch is imported only when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.base_models.examples import Example, parse_examples, plain
from icmlora.base_models.modality import BaseModel, Metric
from icmlora.base_models.probes import PROBES

if TYPE_CHECKING:
    import torch

    from icmlora.base_models.likelihood import NllResult, Scored
    from icmlora.base_models.lookup import FoundBase


class CausalLM:
    """What `transformers.AutoModelForCausalLM` loads; measured by the loss of the next token."""

    name = "causal language model"
    metric = Metric("nats per token", higher_is_better=False)
    probes: Sequence[Example] = plain(PROBES)

    def suits(self, found: FoundBase) -> bool:
        """Take everything: whether it can be loaded, loading says."""
        return True

    def load(
        self,
        found: FoundBase,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> BaseModel:
        """Load model and tokenizer."""
        from icmlora.base_models.load import load_base_model

        return load_base_model(found, device=device, dtype=dtype, fingerprint=fingerprint)

    def read_examples(self, data: bytes, *, path: str | Path | None = None) -> tuple[Example, ...]:
        """Read JSON lines of text, or of prompt and completion."""
        return parse_examples(data, path=path)

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int, *, whole: bool = False) -> list[Scored]:
        """Return token ids; of an example with a prompt only the completion is scored, unless it is read as a whole."""
        from icmlora.base_models.likelihood import tokenized

        texts = plain(example.text for example in examples) if whole else examples
        return tokenized(base.tokenizer, texts, limit)

    def states(self, base: BaseModel, examples: Sequence[Example], limit: int) -> torch.Tensor:
        """Return the last layer at the last token of each text."""
        from icmlora.base_models.hidden_states import last_positions

        return last_positions(base, [example.text for example in examples], limit)

    def context_state(self, base: BaseModel, examples: Sequence[Example], limit: int) -> torch.Tensor:
        """Return the mean of the last layer over one context of all texts, one after the other."""
        from icmlora.base_models.hidden_states import mean_over_context

        return mean_over_context(base, [example.text for example in examples], limit)

    def logits(self, base: BaseModel, items: Sequence[Scored], *, from_leaf: bool = False) -> list[torch.Tensor]:
        """Return next-token logits at every token, (T, vocabulary) for each text."""
        from icmlora.base_models.likelihood import next_token_logits

        return next_token_logits(base, items, from_leaf=from_leaf)

    def loss(self, base: BaseModel, items: Sequence[Scored]) -> torch.Tensor:
        """Return the negative log-likelihood of the scored tokens in nats, summed."""
        from icmlora.base_models.likelihood import summed_loss

        return summed_loss(base, items)

    def counted(self, base: BaseModel, items: Sequence[Scored]) -> torch.Tensor:
        """Return which tokens are not padding, (texts, T)."""
        from icmlora.base_models.likelihood import padded

        return padded([item.ids for item in items], base.device)[1].bool()

    def measure(self, base: BaseModel, examples: Sequence[Example], limit: int) -> NllResult:
        """Return the loss in nats per token."""
        from icmlora.base_models.likelihood import nll

        return nll(base.model, base.tokenizer, examples, max_tokens=limit)
