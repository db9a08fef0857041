"""The head of a baseline's code: everything about an adapter but its values."""

from __future__ import annotations

import pytest
import torch

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.baselines.head import ByteReader, Head
from icmlora.errors import CodeError


def with_names(*names: str) -> Adapter:
    modules = tuple(LoraModule(name, torch.ones(1, 3), torch.ones(2, 1)) for name in names)
    return Adapter("a/b", None, target_modules(names), modules, "main")


@pytest.mark.parametrize(
    "names",
    [
        ("model.layers.0.q", "model.layers.1.q", "model.layers.3.q", "model.layers.10.v"),
        ("lm_head",),
        ("experts.0.1.up", "experts.0.2.up", "experts.1.1.up"),
        ("blocks.07.q", "blocks.7.q"),
    ],
)
def test_a_head_gives_labels_names_and_sizes_back(names: tuple[str, ...]) -> None:
    head = Head.of(with_names(*names))
    assert Head.read(ByteReader(head.to_bytes())) == head


def test_a_head_of_sixty_modules_takes_two_hundred_bytes() -> None:
    names = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(30) for kind in "qv"]
    assert len(Head.of(with_names(*names)).to_bytes()) < 200


@pytest.mark.parametrize("data", [b"", b"\x05\0abcde", b"\xff\xff"])
def test_something_else_is_no_head(data: bytes) -> None:
    with pytest.raises(CodeError):
        Head.read(ByteReader(data))
