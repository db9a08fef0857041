"""Merged adapters are those that PEFT makes of the same adapters on their base model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftModel

from icmlora.adapter.merge import OF_ONE_RANK, WITH_DENSITY, MergeMethod, merged
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import DataError
from icmlora.formats.discovery.folder import load_adapter
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.tiny_base import tiny_model

WEIGHTS = [0.7, -0.4]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write_lora(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other"))]


@pytest.fixture
def adapters(folders: list[Path]) -> list[Adapter]:
    return [load_adapter(folder) for folder in folders]


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {module.name: module.b @ module.a for module in adapter.modules}


def by_peft(folders: list[Path], method: MergeMethod, rank: int | None) -> dict[str, torch.Tensor]:
    """Return dW of each module as PEFT merges it with the whole model at hand."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(tiny_model(), folders[0], adapter_name="0")
        model.load_adapter(folders[1], adapter_name="1")
    torch.manual_seed(3)
    density = 0.5 if method in WITH_DENSITY else None
    model.add_weighted_adapter(["0", "1"], WEIGHTS, "all", combination_type=method, svd_rank=rank, density=density)
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    return {name: layer.get_delta_weight("all") for name, layer in layers.items()}


@pytest.mark.parametrize("method", [name for name in get_args(MergeMethod) if not name.startswith("dare")])
def test_a_merge_is_what_peft_makes_on_the_base_model(
    folders: list[Path], adapters: list[Adapter], method: MergeMethod
) -> None:
    rank = 3 if method.endswith("svd") else None
    expected, found = by_peft(folders, method, rank), deltas(merged(adapters, WEIGHTS, method, rank=rank))
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_what_dare_drops_follows_from_the_seed(adapters: list[Adapter], method: MergeMethod) -> None:
    one, same, other = (deltas(merged(adapters, WEIGHTS, method, seed=seed)) for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_merge_leaves_torchs_own_random_numbers_alone(adapters: list[Adapter]) -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    merged(adapters, WEIGHTS, "dare_linear")
    assert torch.rand(4).equal(expected)


def test_a_module_that_only_one_adapter_has_is_weighted_alone(adapters: list[Adapter]) -> None:
    extra = LoraModule("layers.9.alone", torch.randn(2, 8), torch.randn(6, 2))
    more = Adapter("base", None, ("alone",), (*adapters[1].modules, extra))
    found = deltas(merged([adapters[0], more], WEIGHTS, "cat"))
    torch.testing.assert_close(found["layers.9.alone"], WEIGHTS[1] * extra.b @ extra.a)


@pytest.mark.parametrize("method", OF_ONE_RANK)
def test_what_merges_factors_refuses_different_ranks(tmp_path: Path, folders: list[Path], method: MergeMethod) -> None:
    pair = [load_adapter(folders[0]), load_adapter(write_lora(tmp_path / "wide", rank=5))]
    with pytest.raises(DataError, match="needs equal ranks") as refused:
        merged(pair, WEIGHTS, method)
    assert refused.value.hint == f"use --method {'svd' if method == 'linear' else f'{method}_svd'}"


def test_modules_of_different_widths_are_not_merged() -> None:
    pair = [
        Adapter("base", None, ("q",), (LoraModule("layers.0.q", torch.randn(2, width), torch.randn(6, 2)),))
        for width in (8, 9)
    ]
    with pytest.raises(DataError, match="different widths"):
        merged(pair, WEIGHTS, "cat")
