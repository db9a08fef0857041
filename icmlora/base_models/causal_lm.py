"""Texts of different lengths as one batch.

A base model in memory: loaded once, offline, and lent to adapters.

    FoundBase --load_base_model--> BaseModel(model, tokenizer, fingerprint) --check_fits(layout)--> fit for an adapter

Nothing is fetched and no code of the model's folder is run. Weights that the files do not provide are an error, because
the library would fill them with random numbers.

How well a model predicts the held-out text of a task, and what an adapter is worth.

    text -> tokens t0 t1 ... tn -> sum of -log p(t_i | t_0 .. t_i-1) over the scored tokens = nats
    retained gain = (L_base - L_x) / (L_base - L_original),  L in nats per token

Losses are sums over predicted tokens, so that texts of different length weigh by their length.

What goes into a base model's modules and how the loss reacts behind them, channel by channel.

    text ──base model──▶ inputs x of each module ──mean squares──▶ (in,)
      └── labels drawn from its own predictions ──loss──▶ gradients g of each module's outputs ──mean squares──▶ (out,)

Labels are drawn, not read: then the mean of g g^T belongs to the Fisher information
(Kunstner et al., arXiv 1905.12558).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from icmlora.base_models.examples import Example
from icmlora.base_models.gguf import load_gguf, quiet_loading
from icmlora.base_models.lookup import FoundBase, fingerprint_base
from icmlora.errors import BaseModelMismatch, DataError
from icmlora.io.devices import inference_dtype


def padded(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both int64 of shape (rows, T).

    Padding is on the right and masked: in a causal model no real token sees it.
    """
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


@dataclass(frozen=True)
class BaseModel:
    """A loaded causal language model in evaluation mode.

    Attributes:
        label: The name the adapters use.
        model: The network; adapters are put on it and taken off again, its weights never change.
        tokenizer: Its tokenizer.
        fingerprint: Which weights these are (see `icmlora.fingerprint`).
    """

    label: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, which is the dimension of a task vector."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def dtype(self) -> str:
        """Precision of the weights, as "float32" or "bfloat16"."""
        return str(self.model.dtype).removeprefix("torch.")


def load_base_model(
    found: FoundBase,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    fingerprint: str | None = None,
) -> BaseModel:
    """Load a base model that `find_base_model` found.

    Args:
        found: Where it is.
        device: Where to put it; None for the CPU.
        dtype: Precision of the weights; None for what `inference_dtype` chooses for the device.
        fingerprint: The fingerprint, where the caller has it already; None computes it, reading every weight file.

    Raises:
        BaseModelNotFound: The files cannot be loaded as a causal language model, or do not hold all its weights.
    """
    device = device or torch.device("cpu")
    with quiet_loading(found):
        if found.is_gguf:
            model, tokenizer = load_gguf(found.path, dtype or inference_dtype(device))
        else:
            model, tokenizer = _load_folder(found, dtype or inference_dtype(device))
    model.requires_grad_(False).train(False).to(device)
    return BaseModel(found.label, model, tokenizer, fingerprint or fingerprint_base(found))


def check_fits(base: BaseModel, layout: Sequence[tuple[str, int, int, int]]) -> None:
    """Check that every module of an adapter exists in the base model, with its sizes.

    Args:
        base: The base model.
        layout: For each module of the adapter: name, rank, input size, output size.

    Raises:
        BaseModelMismatch: One does not; the message names the first and both shapes.
    """
    modules = dict(base.model.named_modules())
    hint = "name the right base model: icm base add NAME PATH"
    for name, _, inputs, outputs in layout:
        shape = linear_shape(modules.get(name))
        if shape is None:
            fact = "is no linear layer" if name in modules else "does not exist"
            raise BaseModelMismatch(f"module {name!r} of the adapter {fact} in base model {base.label!r}", hint=hint)
        if shape != (outputs, inputs):
            raise BaseModelMismatch(
                f"module {name!r}: the adapter is for a weight of shape {(outputs, inputs)} (out, in), "
                f"base model {base.label!r} has {shape}",
                hint=hint,
            )


def _load_folder(found: FoundBase, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    # The stub does not know the pair that output_loading_info gives.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        found.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"its weight files lack {missing[0]!r} (and {len(missing) - 1} more)")
    return model, AutoTokenizer.from_pretrained(found.path, **options)


def linear_shape(module: torch.nn.Module | None) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer; quantised layers and GPT-2's Conv1D have the sizes in attributes."""
    for outputs, inputs in (("out_features", "in_features"), ("nf", "nx")):
        if module is not None and hasattr(module, outputs) and hasattr(module, inputs):
            return int(getattr(module, outputs)), int(getattr(module, inputs))
    return None


@dataclass(frozen=True)
class NllResult:
    """Negative log-likelihood of text under a model.

    Attributes:
        nats: Sum over the scored tokens.
        tokens: How many were scored.
        utf8_bytes: Length in UTF-8 of the text that those tokens spell; a character that a limit cuts counts as three.
    """

    nats: float
    tokens: int
    utf8_bytes: int

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the mean; infinity where it overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which compares models with different tokenizers."""
        return self.nats / math.log(2) / self.utf8_bytes


@dataclass(frozen=True)
class Scored:
    """Token ids of one example and the index of the first that is scored, at least 1."""

    ids: list[int]
    first: int

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first


def nll(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_tokens: int = 256,
    batch_size: int = 1,
) -> NllResult:
    """Score examples by teacher forcing.

    Args:
        model: A causal language model, bare or adapted.
        tokenizer: Its tokenizer.
        examples: The texts; of one with a prompt only the completion is scored.
        max_tokens: Tokens of an example that are read. Of a prompt the last ones that fit are kept.
        batch_size: Examples per forward pass; more than 1 pays on accelerators only.

    Raises:
        DataError: No token of any example is left to predict.
    """
    scored = tokenized(tokenizer, examples, max_tokens)
    # Summed in input order, whatever the batches were.
    starts = range(0, len(scored), batch_size)
    nats = math.fsum(value for start in starts for value in _batch_nats(model, scored[start : start + batch_size]))
    spelled = (tokenizer.decode(s.ids[s.first :], clean_up_tokenization_spaces=False) for s in scored)
    return NllResult(
        nats=nats,
        tokens=sum(item.count for item in scored),
        utf8_bytes=max(1, sum(len(str(text).encode()) for text in spelled)),
    )


def retained_gain(base: float, original: float, other: float) -> float | None:
    """Return which share of the original adapter's gain another adapter keeps.

    1 is as good as the original, 0 as good as no adapter; both ends may be passed.

    Args:
        base: Nats per token of the base model.
        original: With the original adapter.
        other: With the adapter in question.

    Returns:
        The share, or None where the original does not help, so that there is no gain to keep.
    """
    gain = base - original
    return (base - other) / gain if gain > 0 else None


def tokenized(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limit: int) -> list[Scored]:
    """Turn examples into token ids, at most `limit` each; those without a token to predict are left out.

    Raises:
        DataError: None is left.
    """
    scored = [item for example in examples if (item := _tokenize(tokenizer, example, limit)) is not None]
    if not scored:
        raise DataError("no example is long enough to predict a token of it", hint="give longer texts")
    return scored


def _tokenize(tokenizer: PreTrainedTokenizerBase, example: Example, limit: int) -> Scored | None:
    if not example.prompt:
        ids = list(tokenizer(example.completion, truncation=True, max_length=limit)["input_ids"])
        first = 1
    else:
        prompt = list(tokenizer(example.prompt)["input_ids"])
        # Without special tokens, or the tokenizer would start a second text between prompt and completion.
        options = {"add_special_tokens": False, "truncation": True, "max_length": limit - 1}
        answer = list(tokenizer(example.completion, **options)["input_ids"])
        prompt = prompt[-(limit - len(answer)) :]
        ids, first = prompt + answer, max(1, len(prompt))
    return Scored(ids, first) if len(ids) > first else None


def _batch_nats(model: Any, batch: Sequence[Scored]) -> list[float]:
    ids, mask = padded([item.ids for item in batch], model.device)  # padding is never a target
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (batch, length, vocabulary)
        return [_row_nats(logits[row], ids[row], item) for row, item in enumerate(batch)]


def _row_nats(logits: torch.Tensor, ids: torch.Tensor, item: Scored) -> float:
    # One row at a time in float32: a whole batch of vocabulary-wide rows would double the peak memory.
    end = len(item.ids)
    predicted = logits[item.first - 1 : end - 1].float()
    losses = functional.cross_entropy(predicted, ids[item.first : end], reduction="none")
    return float(losses.double().sum())


_TOKENS_PER_TEXT = 192
_SEED = 0


def channel_statistics(
    base: BaseModel, texts: Sequence[str], modules: Iterable[str], *, max_tokens: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Measure mean squares of inputs and of output gradients over some text.

    Args:
        base: The base model, in float32 or bfloat16.
        texts: Read in turn, the first 192 tokens of each, until there are enough tokens.
        modules: Dotted names of linear modules; a name that the model does not have is left out.
        max_tokens: How much text is read.

    Returns:
        By module: float32 mean squares of inputs (in,) and of gradients (out,), on the CPU; empty without any text.
    """
    named = dict(base.model.named_modules())
    sums: dict[str, list[torch.Tensor]] = {}
    handles = [named[name].register_forward_hook(_adder(name, sums)) for name in modules if name in named]
    draw = torch.Generator(device=base.model.device).manual_seed(_SEED)
    tokens = 0
    try:
        for text in texts:
            ids = base.tokenizer(text, truncation=True, max_length=_TOKENS_PER_TEXT, return_tensors="pt")["input_ids"]
            if tokens >= max_tokens:
                break
            if ids.shape[1] > 1:
                _backward(base.model, ids.to(base.model.device), draw)
                tokens += ids.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return {name: (inputs.cpu() / tokens, outputs.cpu() / tokens) for name, (inputs, outputs) in sums.items()}


def _backward(model: nn.Module, ids: torch.Tensor, draw: torch.Generator) -> None:
    """Run one text (1, T) forward and backward; nothing gathers gradients but the hooks."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    with torch.enable_grad():
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0].float()  # (T, vocabulary)
        labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=draw)[:, 0]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]


def _adder(
    name: str, sums: dict[str, list[torch.Tensor]]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    def add(number: int, values: torch.Tensor) -> None:
        squares = values.detach().reshape(-1, values.shape[-1]).float().square().sum(dim=0)
        sums[name][number] = sums[name][number] + squares

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
        sums.setdefault(name, [torch.zeros(()), torch.zeros(())])
        add(0, inputs[0])
        outputs.register_hook(lambda gradient: add(1, gradient))  # type: ignore[no-untyped-call]

    return hook
