"""Tiny random base models by name, each with inputs that it accepts. The libraries load when the first one is made."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WIDTH, LAYERS, VOCABULARY = 32, 2, 264

LAYER_STACK: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = LAYER_STACK | {"vocab_size": VOCABULARY, "max_position_embeddings": 128}
GROUPED = TEXT | {"num_key_value_heads": 2}
"""Grouped-query attention, as most models since 2023 have it: `k_proj` and `v_proj` are narrower than `q_proj`."""

Inputs = dict[str, Any]
Base = tuple["torch.nn.Module", Inputs]
Maker = Callable[[], Base]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let PEFT and transformers warn as they like: their warnings are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def label_of(base: str) -> str:
    """Return the name that adapters give a base model."""
    return f"acme/{base}"


@cache
def base_model(name: str) -> Base:
    """Make a base model; callers copy it before they change it."""
    import torch
    from transformers.utils import logging

    from tests.compat import bases_other, bases_text

    logging.set_verbosity_error()
    makers: dict[str, Maker] = bases_text.MAKERS | bases_other.MAKERS
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = makers[name]()
    return model.eval(), inputs


def tokens() -> Inputs:
    """Return two short texts as token numbers."""
    import torch

    return {"input_ids": torch.arange(5, 14)[None].repeat(2, 1)}


def translated() -> Inputs:
    """Return two texts with the beginning of their translations."""
    import torch

    return tokens() | {"decoder_input_ids": torch.tensor([[1, 7, 8], [1, 9, 4]])}


def pictures(size: int = 32) -> Inputs:
    """Return two pictures of noise."""
    import torch

    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))}


def made(auto: str, config: str, fields: dict[str, Any], inputs: Callable[[], Inputs] = tokens) -> Maker:
    """Describe a model by the names of an auto class and a configuration of transformers."""

    def make() -> Base:
        import transformers

        configuration = getattr(transformers, config)(**fields)
        return getattr(transformers, auto).from_config(configuration), inputs()

    return make


def built(model: str, config: str, fields: dict[str, Any], inputs: Callable[[], Inputs] = tokens) -> Maker:
    """Describe a model by the names of its own class and its configuration."""

    def make() -> Base:
        import transformers

        configuration = getattr(transformers, config)(**fields)
        return getattr(transformers, model)(configuration), inputs()

    return make
