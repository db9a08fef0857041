"""Where the weights of a base model go: to one device, or spread by accelerate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate.utils
import pytest
import torch

from icmlora.base_models.finding.lookup import FoundBase, inspect_base
from icmlora.base_models.kinds import auto_model as loading
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.placement import placement
from icmlora.base_models.running.channel_statistics import channel_statistics
from icmlora.base_models.running.lora_hooks import added
from icmlora.errors import BaseModelNotFound
from icmlora.fewshot.evidence import recomputing
from icmlora.io.text import human_size
from tests.icmlora.tiny_base import LABEL, load_tiny_base, tiny_model, write_tiny_base

ANY_CARD = torch.device("cuda")
NEEDED = sum(2 * parameter.numel() for parameter in tiny_model().parameters())  # bytes in bfloat16


@pytest.fixture
def found(tmp_path: Path) -> FoundBase:
    return inspect_base(LABEL, write_tiny_base(tmp_path / "base"))


def place(found: FoundBase, device: torch.device) -> dict[str, Any]:
    return placement(found, "AutoModelForCausalLM", device, torch.bfloat16)


def cards(monkeypatch: pytest.MonkeyPatch, *free: int, cpu: int = 1 << 30) -> None:
    """Say that there are cards with so much free memory."""
    memory: dict[int | str, int] = {**dict(enumerate(free)), "cpu": cpu}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index or 0], 1 << 40))
    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: dict(memory))


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_device_that_was_named_gets_all_of_it(found: FoundBase, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 1)
    assert place(found, torch.device(device)) == {"dtype": torch.bfloat16}


def test_a_card_that_is_large_enough_gets_all_of_it(found: FoundBase, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, round(NEEDED / 0.9) + 1, 1 << 30)
    assert place(found, ANY_CARD) == {"dtype": torch.bfloat16}


def test_it_is_spread_where_one_card_is_too_small(found: FoundBase, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, round(NEEDED / 0.9) - 1, 40_000, cpu=100_000)
    placed = place(found, ANY_CARD)
    assert placed["device_map"] == "auto"
    assert placed["max_memory"] == {0: round(0.9 * (round(NEEDED / 0.9) - 1)), 1: 36_000, "cpu": 90_000}


def test_what_fits_nowhere_is_told_what_makes_it_smaller(found: FoundBase, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 1000, cpu=2000)
    with pytest.raises(
        BaseModelNotFound, match=f"needs {human_size(NEEDED)}, but only {human_size(3000)} are free"
    ) as error:
        place(found, ANY_CARD)
    assert error.value.hint == f"run `icm base add {LABEL} PATH --load-in nf4` to load it in 4 bits"


def test_in_few_bits_it_needs_less_and_never_goes_to_the_cpu(found: FoundBase, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    few = replace(found, load_in="nf4")
    cards(monkeypatch, NEEDED // 2 + 5000)
    assert place(few, ANY_CARD)["device_map"] == {"": ANY_CARD}
    cards(monkeypatch, 15_000, 25_000)
    placed = place(few, ANY_CARD)
    assert (placed["device_map"], list(placed["max_memory"])) == ("auto", [0, 1])
    cards(monkeypatch, 15_000)
    with pytest.raises(BaseModelNotFound) as error:
        place(few, ANY_CARD)
    assert error.value.hint == "use --device cpu"


@pytest.fixture
def spread(found: FoundBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """The tiny base model as accelerate spreads it, its last layer out of memory: there is no card to put it on."""
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    made = {"dtype": torch.float32, "device_map": places, "offload_folder": str(tmp_path / "offload")}
    monkeypatch.setattr(loading, "placement", lambda *_: made)
    return load_tiny_base(tmp_path / "base")


def test_a_spread_model_computes_what_it_computes_in_one_place(spread: BaseModel, found: FoundBase) -> None:
    whole = spread.modality.load(found, device=torch.device("cpu"))
    assert {parameter.device.type for parameter in spread.model.parameters()} == {"cpu", "meta"}
    assert (spread.device, spread.dtype) == (torch.device("cpu"), "float32")
    examples, names = spread.modality.probes[:3], ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    figures = []
    for base in (whole, spread):
        items = base.modality.prepare(base, examples, 32)
        sizes = zip(names, (64, 32), strict=True)
        pairs = {name: (torch.ones(1, 32, requires_grad=True), torch.ones(size, 1)) for name, size in sizes}
        with added(base.model, pairs), recomputing(base.model):
            base.modality.loss(base, items).backward()
        gradients = [a.grad for a, _ in pairs.values()]
        statistics = channel_statistics(base, examples, names, max_tokens=64)
        figures.append([base.modality.states(base, examples, 32), gradients, statistics])
        assert base.modality.measure(base, examples, 64) == whole.modality.measure(whole, examples, 64)
    torch.testing.assert_close(figures[0], figures[1])
