"""A diffusers pipeline as base model: everything but pictures goes on without it, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import Fleet
from icmlora.errors import AdapterRefused
from tests.icmlora.fleet.image_store import LABEL

WHAT = "a diffusers pipeline, which icm uses only to generate images"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file with held-out text."""
    (tmp_path / "eval.jsonl").write_text('{"text": "a red pear"}\n')
    return tmp_path / "eval.jsonl"


@pytest.mark.slow
def test_its_tasks_have_no_vectors(images: Fleet) -> None:
    report = images.extract_vectors(device="cpu")
    (left_out,) = [group for group in report.skipped if group.base_model is not None]
    assert (left_out.is_problem, WHAT in left_out.reason, report.done) == (False, True, [])


def test_its_tasks_are_not_measured(images: Fleet, data: Path) -> None:
    report = images.evaluate(data=data, device="cpu")
    assert [WHAT in left_out.reason for left_out in report.skipped] == [True]


@pytest.mark.slow
def test_they_are_trained_and_encoded_without_being_refined(images: Fleet) -> None:
    images.train(device="cpu", steps=2, fresh=True, refine=0, evaluate=False)
    (task,) = images.encode(["pear"], quality=2, device="cpu").done
    assert task.reason == "not refined: icm cannot run the base models of image adapters"


@pytest.mark.slow
def test_they_are_evicted_by_error_and_kept_where_a_gain_is_asked_for(images: Fleet) -> None:
    images.evict(["pear"], max_error=0.9)
    images.evict(["plum"], min_gain=0.1)
    assert images.show("pear").task.final.is_evicted
    assert not images.show("plum").task.final.is_evicted


def test_new_ones_are_ingested_next_to_it(images: Fleet, image_template: Path) -> None:
    images.remove(["pear"])
    report = images.ingest([image_template / "loras"])
    assert "pear" in {task.task for task in report.done}
    assert (report.vectors, report.without_vectors) == (None, [])


def test_the_store_is_listed_verified_and_billed_as_ever(images: Fleet, image_template: Path) -> None:
    (base,) = images.base_models()
    assert (base.path, base.problem) == (image_template / "sd15", None)
    assert list(images.verify(read_data=True)) == []
    assert images.stats().fleets[0].base_model == LABEL


def test_llama_cpp_is_told_that_it_has_no_such_model(images: Fleet, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="kohya is a format of image models, and gguf one of language models"):
        images.materialize("pear", tmp_path / "pear.gguf", adapter_format="gguf")
