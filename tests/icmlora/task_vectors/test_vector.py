"""Support sets, and task vectors as bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import DataError
from icmlora.task_vectors.vector import Extractor, TaskVector, VectorSettings, split_samples

EXTRACTOR = Extractor("adapted", "samples", VectorSettings(), "float32", "ab" * 32)


def numbered(count: int) -> list[str]:
    return [f"sample {number}" for number in range(count)]


def vector(values: list[float]) -> TaskVector:
    return TaskVector("adapted", 0, torch.tensor(values), EXTRACTOR)


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 12))
def test_support_sets_are_disjoint_and_come_from_the_samples(count: int, sets: int, size: int) -> None:
    samples = numbered(count)
    made = split_samples(samples, VectorSettings(support_sets=sets, set_size=size))
    used = [text for texts in made for text in texts]
    assert len(set(used)) == len(used)
    assert set(used) <= set(samples)


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 12))
def test_sets_are_full_unless_there_are_too_few_samples_for_one(count: int, sets: int, size: int) -> None:
    made = split_samples(numbered(count), VectorSettings(support_sets=sets, set_size=size))
    assert 1 <= len(made) <= sets
    assert {len(texts) for texts in made} == {min(size, count)}


def test_sixty_four_samples_give_four_sets_of_eight_from_the_whole_file() -> None:
    made = split_samples(numbered(64))
    assert [len(texts) for texts in made] == [8, 8, 8, 8]
    assert made[0] == tuple(f"sample {number}" for number in range(0, 64, 8))


def test_fewer_samples_give_fewer_sets() -> None:
    assert len(split_samples(numbered(20))) == 2
    assert split_samples(numbered(3)) == (("sample 0", "sample 1", "sample 2"),)


def test_the_sets_of_a_sorted_file_look_alike() -> None:
    made = split_samples(["verse"] * 32 + ["prose"] * 32)
    assert all(texts.count("verse") == 4 for texts in made)


def test_no_sample_is_an_error() -> None:
    with pytest.raises(DataError, match="needs samples of the task") as error:
        split_samples([])
    assert "--samples FILE" in str(error.value.hint)


@pytest.mark.parametrize("wrong", [{"support_sets": 0}, {"set_size": 0}, {"sample_tokens": 0}, {"context_tokens": 7}])
def test_settings_that_would_read_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        VectorSettings(**wrong)


def test_equal_extractors_have_equal_text() -> None:
    assert EXTRACTOR.to_json() == replace(EXTRACTOR).to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"view": "context"},
        {"source": "probes"},
        {"settings": VectorSettings(set_size=4)},
        {"dtype": "bfloat16"},
        {"base": "cd" * 32},
        {"version": 99},
    ],
)
def test_whatever_changes_the_vectors_changes_the_text(change: dict[str, object]) -> None:
    assert replace(EXTRACTOR, **change).to_json() != EXTRACTOR.to_json()  # type: ignore[arg-type]
