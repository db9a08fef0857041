"""Adapters that PEFT itself began: its own code drew their A, and what training does to A and B is made up.

The models are random Llamas of two layers, wide enough for the agreement of a module's A with its draws to be certain.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.formats.peft.config import PREFIX
from icmlora.generator.codec.codec import Codec
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.initial_a.search import SeedSearch
from icmlora.training.loop import fit
from tests.icmlora.small_fleet import BASE, MemoryAdapterSource, begin
from tests.icmlora.tiny_base import tiny_model

HIDDEN = 64
SEED = 42


@dataclass(frozen=True, eq=False)
class PeftMade:
    """An adapter, and the A that PEFT drew for each of its modules, in the order in which it made them."""

    adapter: Adapter
    drawn: dict[str, torch.Tensor]


def peft_made(
    seed: int = SEED,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    *,
    rank: int = 8,
    moved: float = 0.5,
    task: int = 0,
    **options: Any,
) -> PeftMade:
    """Let PEFT make an adapter, then train it.

    Args:
        seed: Of PEFT's draws.
        targets: Target modules.
        rank: Of all modules without a pattern.
        moved: Length of what training adds to A, relative to the A that was drawn.
        task: Another task is another change of A, and another B.
        options: Further ones of `LoraConfig`.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        base = tiny_model(hidden=HIDDEN)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=rank, target_modules=list(targets), **options))
    learned = torch.Generator().manual_seed(1_000_000 + task)
    modules, drawn = [], {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            a = layer.lora_A["default"].weight.detach().clone()
            change = torch.randn(a.shape, generator=learned)
            b = torch.randn(layer.out_features, len(a), generator=learned) * 0.8 ** torch.arange(len(a))
            name = name.removeprefix(PREFIX)
            drawn[name] = a
            modules.append(LoraModule(name, a + moved * a.norm() / change.norm() * change, 0.1 * b))
    names = target_modules(module.name for module in modules)
    return PeftMade(Adapter(BASE, "CAUSAL_LM", names, tuple(modules)), drawn)


def seeds() -> SeedSearch:
    """Return a search among a hundred seeds."""
    return SeedSearch(range(100))


def initial_of(adapter: Adapter) -> InitialA:
    """Find where an adapter's initial A was drawn."""
    found = seeds().find(adapter)
    assert found is not None
    return found


@cache
def peft_fleet() -> MemoryAdapterSource:
    """Return tasks of mixed ranks and kinds, two of one seed, with nine tenths of A in the initial subspace."""
    tasks = [
        peft_made(SEED, moved=1 / 3, task=0),
        peft_made(SEED, moved=1 / 3, task=1, rank_pattern={"layers.1.self_attn.q_proj": 6}),
        peft_made(7, ("v_proj", "q_proj", "down_proj"), rank=6, moved=1 / 3, task=2),
    ]
    adapters = [made.adapter for made in tasks]
    return MemoryAdapterSource([[adapter] for adapter in adapters], 0, [initial_of(adapter) for adapter in adapters])


@cache
@torch.enable_grad()  # the first caller may be in no_grad
def peft_file() -> bytes:
    """Return the file of a generator trained on them."""
    state = begin(peft_fleet(), 40)
    for _ in fit(state, peft_fleet()):
        pass
    return generator_to_bytes(state.net)


def peft_codec() -> Codec:
    """Return a codec of its own under that generator."""
    return Codec.of(peft_file())
