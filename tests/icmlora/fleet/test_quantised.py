"""A base model in few bits through the whole library: every figure says so, and none is mixed with one in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from icmlora import Bundle, DataError, Fleet
from icmlora.base_models.finding.locations import Location
from icmlora.errors import BaseModelUnsuited
from icmlora.fleet.resources.loading import ModelCache
from icmlora.fleet.resources.stored_vectors import comparable_vectors
from registry.store import Store
from tests.cli.tiny_fleet import SUBJECTS, write_subject
from tests.icmlora.fleet.stores import copy_of, files_of
from tests.icmlora.tiny_base import LABEL

pytest.importorskip("bitsandbytes")

CPU = {"device": "cpu"}


@pytest.fixture
def base(learned_template: Path) -> Path:
    """The base model that the adapters of `learned` were trained on."""
    return learned_template / "base"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"text": f"tall ships {number}"}) + "\n" for number in range(8)))
    return file


@pytest.fixture(scope="module")
def subjects(learned_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A fleet of four tasks with support sets enough to recognise them, on the same base model in nf4."""
    folder = tmp_path_factory.mktemp("subjects")
    for seed, name in enumerate(SUBJECTS):
        write_subject(folder / "loras" / name, seed=seed)
    fleet = Fleet(folder / "store")
    fleet.add_base_model(LABEL, learned_template / "base", load_in="nf4")
    fleet.ingest([folder / "loras"])
    fleet.extract_vectors(**CPU)
    fleet.train(steps=4, refine=0, evaluate=False, **CPU)
    return fleet


def recorded(fleet: Fleet, task: str) -> dict[tuple[str, str | None], float]:
    """Return what was measured of a task by source and precision."""
    return {(one.source, one.precision): one.value for one in fleet.show(task).task.measured}


def test_it_is_recorded_with_the_base_model_and_the_same_call_without_it_takes_it_back(
    learned: Fleet, base: Path
) -> None:
    before = learned.base_models()[0]
    learned.add_base_model(LABEL, base, load_in="nf4")
    (known,) = learned.base_models()
    assert (known.location, known.base) == (Location(base, load_in="nf4"), before.base)
    learned.add_base_model(LABEL, base)
    assert learned.base_models()[0].location == Location(base)


def test_a_base_model_of_which_that_cannot_be_done_is_refused_and_nothing_changes(learned: Fleet, base: Path) -> None:
    before = files_of(learned.path)
    with pytest.raises(BaseModelUnsuited, match="its own loader decides"):
        learned.add_base_model(LABEL, base, loader="my_models:load", load_in="nf4")
    assert files_of(learned.path) == before


def test_what_is_measured_stands_beside_what_was_measured_in_full_precision(learned: Fleet, base: Path) -> None:
    (full,) = learned.evaluate(["ships"], sources=["code"], **CPU).done
    before = recorded(learned, "ships")
    learned.add_base_model(LABEL, base, load_in="nf4")
    (few,) = learned.evaluate(["ships"], sources=["code"], **CPU).done
    assert (full.precision, few.precision) == ("float32", "nf4")
    after = recorded(learned, "ships")
    assert {key: value for key, value in after.items() if key[1] == "float32"} == before
    losses = {source: after[source, "nf4"] for source in ("base", "original", "code")}
    gain = (losses["base"] - losses["code"]) / (losses["base"] - losses["original"])
    assert few.sources["code"].retained_gain == pytest.approx(gain)
    assert all(losses[source] != before[source, "float32"] for source in losses)
    learned.add_base_model(LABEL, base)
    files = files_of(learned.path)
    assert learned.evaluate(["ships"], sources=["code"], **CPU).done == [full]  # measured before, and not again
    assert files_of(learned.path) == files


@pytest.mark.slow
def test_listing_bill_and_task_say_the_precision_of_a_gain(learned: Fleet, base: Path) -> None:
    learned.add_base_model(LABEL, base, load_in="int8")
    learned.evaluate(["ships"], sources=["code"], **CPU)
    listed = {row.name: row.gain_precision for row in learned.tasks()}
    bill = learned.stats().fleets[0]
    assert listed["ships"] == "int8"
    assert next(task.row.gain_precision for task in bill.tasks if task.row.name == "ships") == "int8"
    assert bill.retained_gains is not None
    assert "int8" in bill.retained_gains.precisions


@pytest.mark.slow
def test_samples_are_not_compared_with_vectors_of_another_precision(
    subjects: Fleet, base: Path, samples: Path, tmp_path: Path
) -> None:
    fleet = copy_of(subjects.path, tmp_path / "full")
    fleet.add_base_model(LABEL, base)
    with pytest.raises(DataError, match="made with the base model in nf4, but it is loaded in bfloat16"):
        fleet.recognize(samples, **CPU)


def test_vectors_of_different_precisions_are_not_compared(learned: Fleet, base: Path) -> None:
    learned.add_base_model(LABEL, base, load_in="nf4")
    learned.extract_vectors(["ships"], again=True, **CPU)
    with Store.open(learned.path) as store:
        found = comparable_vectors(store, list(store.tasks()), "context")
    assert {left.task: left.reason for left in found.left_out} == {
        "ships": "made with the base model in nf4, the others in bfloat16"
    }


@pytest.mark.slow
def test_a_bundle_is_asked_in_the_precision_of_its_vectors(
    subjects: Fleet, base: Path, samples: Path, tmp_path: Path
) -> None:
    subjects.add_base_model(LABEL, base, load_in="nf4")
    here = subjects.recognize(samples, **CPU)
    subjects.export_bundle(tmp_path / "fleet.icm")
    there = Bundle(tmp_path / "fleet.icm", cache=tmp_path / "cache").recognize(samples, base_model=base, **CPU)
    assert there.candidates == here.candidates


def test_one_copy_serves_for_everything(learned: Fleet, base: Path, tmp_path: Path) -> None:
    learned.add_base_model(LABEL, base, load_in="nf4")
    with Store.open(learned.path) as store:
        models = ModelCache(store, torch.device("cpu"), tmp_path)
        assert models.base(LABEL) is models.base(LABEL, torch.bfloat16)


@pytest.mark.slow
def test_an_adapter_is_generated_on_it(started: Path, mixed_template: Path, samples: Path, tmp_path: Path) -> None:
    fleet = Fleet(started)
    fleet.add_base_model(LABEL, mixed_template / "base", load_in="nf4")
    made = fleet.generate("ships", samples, tmp_path / "out", refine=2, register=True, **CPU)
    assert (made.precision, made.samples) == ("nf4", 8)
    assert made.code_size is not None


@pytest.mark.slow
def test_a_generator_is_trained_with_what_its_channels_do(learned: Fleet, base: Path) -> None:
    learned.add_base_model(LABEL, base, load_in="int8")
    (trained,) = learned.train(fresh=True, steps=4, refine=0, evaluate=False, **CPU).trained
    assert trained.version == 2
