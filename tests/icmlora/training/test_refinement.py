"""Functional refinement on a tiny model: the code comes nearer to what the adapter does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples import plain
from icmlora.base_models.factors import added
from icmlora.base_models.modality import BaseModel
from icmlora.errors import DataError
from icmlora.formats.folder import load_adapter
from icmlora.generator.codec import Codec
from icmlora.generator.config import config_for
from icmlora.generator.cvae import CVAE
from icmlora.generator.network_file import generator_from_bytes, generator_to_bytes
from icmlora.generator.relaxed import RelaxedCode
from icmlora.training.refinement import RefineConfig, refine
from tests.icmlora.tiny_base import LABEL, load_tiny_base, write_tiny_adapter

TEXTS = ["a first text of the task", "another one, of another length", "the third"]
CONFIG = RefineConfig(steps=25, price=0.0, learning_rate=0.05)


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return load_adapter(write_tiny_adapter(tmp_path / "adapter", strength=2.0))


@pytest.fixture
def coded(adapter: Adapter) -> tuple[Codec, bytes]:
    torch.manual_seed(0)
    net = CVAE(config_for(LABEL, [adapter.layout], tasks=64, condition_size=0, quality=4))
    codec = Codec(generator_from_bytes(generator_to_bytes(net)))
    return codec, codec.encode(adapter, {}, tolerance=0.4).data


def divergence(base: BaseModel, original: Adapter, other: Adapter) -> float:
    """Return KL(original || other) in nats, summed over all tokens of the texts."""
    total = 0.0
    for text in TEXTS:
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        rows = []
        for side in (original, other):
            with torch.no_grad(), added(base.model, {module.name: (module.a, module.b) for module in side.modules}):
                rows.append(base.model(ids).logits[0].log_softmax(dim=-1))
        total += float((rows[0].exp() * (rows[0] - rows[1])).sum())
    return total


def refined(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes], config: RefineConfig = CONFIG) -> bytes:
    codec, data = coded
    relaxed = RelaxedCode(codec, adapter, data)
    assert list(refine(relaxed, 0.4, base, adapter, plain(TEXTS), config)) == list(range(1, config.steps + 1))
    return relaxed.to_code()


def test_a_refined_code_does_more_of_what_the_adapter_does(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]
) -> None:
    codec, data = coded
    before = divergence(base, adapter, codec.decode(data))
    assert divergence(base, adapter, codec.decode(refined(base, adapter, coded))) < 0.7 * before


def test_a_higher_price_gives_a_smaller_code(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    sizes = [
        len(refined(base, adapter, coded, RefineConfig(steps=25, price=price, learning_rate=0.05)))
        for price in (0.0, 3.0)
    ]
    assert sizes[1] < sizes[0]


def test_the_same_refinement_gives_the_same_code(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    assert refined(base, adapter, coded) == refined(base, adapter, coded)


def test_the_base_model_is_left_as_it_was(base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    refined(base, adapter, coded)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not any(module._forward_hooks for module in base.model.modules())


def test_without_text_there_is_nothing_to_refine_on(
    base: BaseModel, adapter: Adapter, coded: tuple[Codec, bytes]
) -> None:
    codec, data = coded
    with pytest.raises(DataError, match="no example"):
        next(refine(RelaxedCode(codec, adapter, data), 0.4, base, adapter, plain([""]), CONFIG))
