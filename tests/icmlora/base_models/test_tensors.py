"""The tensors of a base model's files: which one an adapter may have a copy of, and reading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.finding.tensors import BaseTensors
from icmlora.errors import BaseModelNotFound

EMBEDDING, HEAD, QUERY = "model.embed_tokens.weight", "lm_head.weight", "model.layers.{}.q_proj.weight"


def write_base(folder: Path, **shards: dict[str, torch.Tensor]) -> BaseTensors:
    """Write a base model in several files, which are links as in the Hugging Face cache."""
    (folder / "blobs").mkdir()
    for shard, tensors in shards.items():
        save_file(tensors, folder / "blobs" / shard)
        (folder / f"{shard}.safetensors").symlink_to(folder / "blobs" / shard)
    weight_map = {name: f"{shard}.safetensors" for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return BaseTensors(inspect_base("acme/base", folder))


QUERIES = {QUERY.format(layer): torch.full((8, 8), float(layer)) for layer in range(2)}


@pytest.fixture
def tied(tmp_path: Path) -> BaseTensors:
    return write_base(tmp_path, one={EMBEDDING: torch.arange(80.0).reshape(10, 8)}, two=QUERIES)


@pytest.fixture
def untied(tmp_path: Path) -> BaseTensors:
    return write_base(tmp_path, one={EMBEDDING: torch.zeros(10, 8)}, two={HEAD: torch.ones(10, 8)} | QUERIES)


def test_a_tensor_is_read_from_the_file_that_has_it(tied: BaseTensors) -> None:
    for name in (EMBEDDING, *QUERIES):
        read = tied.read(name)
        assert read is not None
        assert (read.dtype, len(read.data)) == ("F32", 4 * torch.Size(read.shape).numel())
    one = tied.read(QUERY.format(1))
    assert one is not None
    assert one.data == torch.ones(8, 8).numpy().tobytes()
    assert tied.read("other") is None


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("base_model.model.model.embed_tokens.base_layer.weight", EMBEDDING),
        ("base_model.model.lm_head.weight", HEAD),
        ("base_model.model.lm_head.base_layer.weight", HEAD),
        ("base_model.model.embed_tokens.weight", EMBEDDING),  # of a class without the prefix `model`
        ("base_model.model.language_model.model.embed_tokens.weight", EMBEDDING),
        ("base_model.model.score.weight", None),  # which of the two it could be is open
    ],
)
def test_a_tensor_of_the_same_module_is_the_counterpart(untied: BaseTensors, name: str, own: str | None) -> None:
    assert untied.counterpart(name, (10, 8)) == own


def test_tied_weights_are_found_under_the_name_that_the_files_have(tied: BaseTensors) -> None:
    assert tied.counterpart("base_model.model.lm_head.weight", (10, 8)) == EMBEDDING


@pytest.mark.parametrize("shape", [(11, 8), (8, 10), (80,)])
def test_a_tensor_of_another_shape_has_no_counterpart(tied: BaseTensors, shape: tuple[int, ...]) -> None:
    assert tied.counterpart(f"base_model.model.{EMBEDDING}", shape) is None


def test_a_gguf_file_has_other_tensors(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseModelNotFound, match="GGUF") as caught:
        BaseTensors(inspect_base("acme/base", tmp_path / "base.gguf"))
    assert "icm base add" in str(caught.value.hint)
