"""Hidden states into task vectors, checked against the plain way of computing them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from icmlora.base_models.examples.examples import plain
from icmlora.base_models.kinds.causal_lm import PROBES
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.attach import adapted
from icmlora.errors import DataError
from icmlora.task_vectors.extraction import extract_adapted, extract_context
from icmlora.task_vectors.vector import TaskVector, VectorSettings, split_samples
from tests.icmlora.tiny_base import HIDDEN, load_tiny_base, write_tiny_adapter

TEXTS = [f"{'long ' * (number % 5)}text number {number}" for number in range(16)]
SAMPLES = plain(TEXTS)
SMALL = VectorSettings(support_sets=2, set_size=4, sample_tokens=20, context_tokens=64)


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_adapter(tmp_path / "adapter")


def last_layer(base: BaseModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        output = base.model(torch.tensor([ids]), output_hidden_states=True)
    states: torch.Tensor = output.hidden_states[-1][0]
    return states


def same(first: tuple[TaskVector, ...], second: tuple[TaskVector, ...]) -> bool:
    return all(torch.equal(one.values, other.values) for one, other in zip(first, second, strict=True))


def test_each_support_set_gives_one_vector_of_the_hidden_size(base: BaseModel, folder: Path) -> None:
    for vectors in (extract_adapted(base, folder, SAMPLES, SMALL), extract_context(base, SAMPLES, SMALL)):
        assert [vector.support_set for vector in vectors] == [0, 1]
        assert {(vector.values.dtype, tuple(vector.values.shape)) for vector in vectors} == {(torch.float32, (HIDDEN,))}


def test_the_adapted_view_is_the_mean_of_last_positions_of_the_adapted_model(base: BaseModel, folder: Path) -> None:
    texts = split_samples(TEXTS, SMALL)[0]
    with adapted(base, folder):
        rows = [last_layer(base, base.tokenizer(text)["input_ids"][:20])[-1] for text in texts]
    vector = extract_adapted(base, folder, SAMPLES, SMALL)[0]
    assert torch.allclose(vector.values, torch.stack(rows).mean(0), atol=1e-5)


def test_the_context_view_is_the_mean_over_all_demonstrations_of_the_bare_model(base: BaseModel) -> None:
    texts = split_samples(TEXTS, SMALL)[0]
    share = 64 // 4 - 2  # two bytes separate the demonstrations
    ids = base.tokenizer("\n\n".join(text[:share] for text in texts))["input_ids"]
    assert len(ids) <= SMALL.context_tokens
    vector = extract_context(base, SAMPLES, SMALL)[0]
    assert torch.allclose(vector.values, last_layer(base, ids).mean(0), atol=1e-5)


def test_padding_does_not_reach_a_short_sample(base: BaseModel, folder: Path) -> None:
    settings = VectorSettings(support_sets=1, set_size=2, sample_tokens=200, context_tokens=64)
    (both,) = extract_adapted(base, folder, plain(["short", "a much, much longer sample"]), settings)
    alone = [
        extract_adapted(base, folder, plain([text]), settings)[0].values
        for text in ("short", "a much, much longer sample")
    ]
    assert torch.allclose(both.values, torch.stack(alone).mean(0), atol=1e-5)


def test_text_beyond_the_limit_of_a_sample_is_not_read(base: BaseModel, folder: Path) -> None:
    longer = plain(text.ljust(20, ".") + " and more" for text in TEXTS)
    other = plain(text.ljust(20, ".") + " or less" for text in TEXTS)
    assert same(extract_adapted(base, folder, longer, SMALL), extract_adapted(base, folder, other, SMALL))


def test_the_adapter_moves_the_adapted_view_and_not_the_context_view(
    base: BaseModel, folder: Path, tmp_path: Path
) -> None:
    context = extract_context(base, SAMPLES, SMALL)
    other = write_tiny_adapter(tmp_path / "other", seed=5)
    assert not same(extract_adapted(base, folder, SAMPLES, SMALL), extract_adapted(base, other, SAMPLES, SMALL))
    assert same(extract_context(base, SAMPLES, SMALL), context)


def test_extraction_is_repeatable(base: BaseModel, folder: Path) -> None:
    assert same(extract_adapted(base, folder, SAMPLES, SMALL), extract_adapted(base, folder, SAMPLES, SMALL))


def test_a_task_without_samples_is_seen_through_the_probes(base: BaseModel, folder: Path) -> None:
    vectors = extract_adapted(base, folder, None)
    assert len(vectors) == len(PROBES) // 8
    assert {vector.extractor.source for vector in vectors} == {"probes"}
    assert same(vectors, extract_adapted(base, folder, plain(PROBES)))


def test_the_extractor_names_the_base_model_its_precision_and_the_view(base: BaseModel) -> None:
    extractor = extract_context(base, SAMPLES, SMALL)[0].extractor
    assert (extractor.base, extractor.dtype, extractor.view) == (base.fingerprint, "float32", "context")
    assert extractor.settings == SMALL


def test_vectors_can_be_used_in_training(base: BaseModel) -> None:
    values = extract_context(base, SAMPLES, SMALL)[0].values
    weight = torch.ones(HIDDEN, requires_grad=True)
    (values * weight).sum().backward()
    assert weight.grad is not None


def test_a_sample_without_tokens_is_an_error(base: BaseModel, folder: Path) -> None:
    with pytest.raises(DataError, match="no token"):
        extract_adapted(base, folder, plain([""]))


def test_hidden_states_that_are_not_finite_are_an_error(base: BaseModel) -> None:
    with torch.no_grad():
        base.model.get_submodule("model.norm").weight.fill_(float("nan"))  # type: ignore[operator,union-attr]
    with pytest.raises(DataError, match="not finite"):
        extract_context(base, SAMPLES, SMALL)


def test_the_probes_are_distinct_and_short_enough_to_be_read_whole(base: BaseModel) -> None:
    assert len(set(PROBES)) == 16
    assert max(len(text) for text in PROBES) < 300
