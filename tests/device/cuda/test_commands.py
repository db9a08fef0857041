"""Every command that has `--device`, on the card: it does what it does on the CPU, up to the rounding of bfloat16."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from icmlora import Fleet
from icmlora.formats.discovery.folder import load_adapter
from icmlora.task_vectors.file import arrays_from_bytes
from registry.store import Store
from tests.cli.coded import codes, tasks_of
from tests.cli.conftest import Ran
from tests.cli.test_recognize import write_samples
from tests.cli.tiny_fleet import EPISODES, STEPS, SUBJECTS, icm_quietly, write_lora
from tests.device.counts import counting
from tests.icmlora.fleet.stores import TASKS
from tests.icmlora.tiny_base import LABEL
from tests.shared import use_config_of

Icm = Callable[..., Ran]
CARD, CPU = ("--device", "cuda"), ("--device", "cpu")
QUICK = ("--no-eval", "--refine", "0", "--steps", STEPS)


@pytest.fixture
def card(icm: Icm) -> Callable[..., Ran]:
    """Return a function that runs a command on the card, and insists that it succeeds and that the card was used."""

    def call(*arguments: object) -> Ran:
        with counting() as counts:
            ran = icm(*arguments, *CARD)
        assert ran.code == 0, ran.err
        assert counts.operators > 0
        return ran

    return call


@pytest.fixture(scope="module")
def on_card_template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the mixed fleet, trained on the card, with a few-shot start."""
    use_config_of(mixed_template)
    store = Path(shutil.copytree(mixed_template / "store", tmp_path_factory.mktemp("card") / "store"))
    icm_quietly(store, "train", *QUICK, *CARD)
    icm_quietly(store, "train", "--few-shot", "--episodes", EPISODES, *CARD)
    return store


@pytest.fixture
def on_card(on_card_template: Path, mixed_template: Path, tmp_path: Path) -> Path:
    use_config_of(mixed_template)
    return Path(shutil.copytree(on_card_template, tmp_path / "store"))


def vectors_of(store: Path) -> dict[str, NDArray[np.float32]]:
    """Return the mean task vector of each task and view."""
    with Store.open(store) as opened:
        blobs = {task.name: task.vectors[0].blob for task in opened.tasks() if task.vectors}
        files = {task: arrays_from_bytes(opened.blobs.read(blob)) for task, blob in blobs.items()}
    return {f"{task}/{view}": sets.mean(0) for task, views in files.items() for view, sets in views.items()}


def alike(one: dict[str, NDArray[np.float32]], other: dict[str, NDArray[np.float32]]) -> None:
    """Insist that two stores have vectors that point the same way."""
    assert one.keys() == other.keys()
    for name, vector in one.items():
        cosine = vector @ other[name] / np.linalg.norm(vector) / np.linalg.norm(other[name])
        assert cosine > 0.99, name


def rungs_of(ran: Ran) -> dict[str, dict[str, Any]]:
    """Return what `icm eval --json` measured, by task and source."""
    events = [event for event in ran.events if event["type"] == "task"]
    return {f"{event['task']}/{name}": rung for event in events for name, rung in event["sources"].items()}


def total(store: Path) -> int:
    return sum(code.size for code in codes(store).values())


class TestVectors:
    def test_ingest_makes_the_vectors_of_the_cpu(
        self, card: Icm, icm: Icm, mixed_template: Path, tmp_path: Path
    ) -> None:
        icm("base", "add", LABEL, mixed_template / "base")
        assert card("ingest", mixed_template / "loras").err == ""
        alike(vectors_of(tmp_path / "store"), vectors_of(mixed_template / "store"))

    def test_vectors_makes_them_again(self, card: Icm, mixed: Path, mixed_template: Path) -> None:
        assert card("vectors", "--again", "--json").events[-1]["extracted"] == 3
        alike(vectors_of(mixed), vectors_of(mixed_template / "store"))


class TestTrain:
    def test_a_generator_trained_on_the_card_codes_as_one_of_the_cpu(
        self, on_card: Path, trained_template: Path
    ) -> None:
        found, wanted = codes(on_card), codes(trained_template)
        assert sum(code.size for code in found.values()) == pytest.approx(total(trained_template), rel=0.05)
        assert [found[task].squared_error for task in TASKS] == pytest.approx(
            [wanted[task].squared_error for task in TASKS], abs=0.05
        )

    def test_codes_are_refined_on_texts_that_the_model_writes_there_and_measured(
        self, card: Icm, icm: Icm, mixed_template: Path
    ) -> None:
        icm("base", "add", LABEL, mixed_template / "base")
        icm("ingest", mixed_template / "loras" / "poems", "--no-vectors")
        told = {event["type"]: event for event in card("train", "--steps", STEPS, "--refine", 2, "--json").events}
        assert told["refined"]["effect"] > 0.9
        assert told["task"]["sources"].keys() == {"base", "original", "code"}

    def test_an_update_encodes_what_is_new(self, card: Icm, icm: Icm, trained: Path, tmp_path: Path) -> None:
        icm("ingest", write_lora(tmp_path / "extra", seed=9), "--no-vectors")
        before = codes(trained)
        card("train", "--update", *QUICK)
        after = codes(trained)
        assert {task: code.blob for task, code in after.items() if task in before} == {
            task: code.blob for task, code in before.items()
        }
        assert after.keys() - before.keys() == {"extra"}

    @pytest.mark.parametrize("steps", ["--refine", "--distil"])
    def test_with_a_few_shot_start_an_adapter_is_generated(
        self, card: Icm, on_card: Path, tmp_path: Path, steps: str
    ) -> None:
        samples = write_samples(tmp_path / "geese.jsonl", "grey geese")
        options = ("--samples", samples, "-o", tmp_path / "out", steps, 2, "--json")
        document = card("generate", "geese", *options).document
        assert document["nats_per_token"] < document["base_nats_per_token"]
        assert load_adapter(tmp_path / "out").modules

    def test_a_start_is_trained_for_a_generator_that_is_there(self, card: Icm, trained: Path) -> None:
        ran = card("train", "--few-shot", "--episodes", 2, "--json")
        assert "start" in {event["type"] for event in ran.events}


class TestContext:
    def test_it_is_worth_what_it_is_on_the_cpu(self, card: Icm, icm: Icm, trained: Path, tmp_path: Path) -> None:
        words = ("context", "poems", "--samples", write_samples(tmp_path / "geese.jsonl", "grey geese"), "--json")
        on_card, on_cpu = card(*words).document["measured"], icm(*words, *CPU).document["measured"]
        for name in ("neither", "context", "adapter", "both"):
            assert on_card[name] == pytest.approx(on_cpu[name], rel=0.01)

    def test_an_adapter_is_made_from_a_sentence(self, card: Icm, on_card: Path, tmp_path: Path) -> None:
        words = ("--description", "songs of geese", "--count", "4", "-o", tmp_path / "out", "--json")
        assert card("generate", "geese", *words).document["described"] is True


class TestEval:
    def test_the_figures_are_those_of_the_cpu(self, card: Icm, icm: Icm, learned: Fleet) -> None:
        store = ("--store", learned.path)
        on_card = rungs_of(card(*store, "eval", "--json"))
        on_cpu = rungs_of(icm(*store, "eval", "--again", "--json", *CPU))
        assert on_card.keys() == on_cpu.keys()
        for name, rung in on_card.items():
            assert rung["nats_per_token"] == pytest.approx(on_cpu[name]["nats_per_token"], rel=0.005)
            if rung.get("retained_gain") is not None:
                assert rung["retained_gain"] == pytest.approx(on_cpu[name]["retained_gain"], abs=0.05)


class TestEncode:
    def test_a_code_is_refined_on_the_samples_of_its_task(self, card: Icm, subjects: Path) -> None:
        before = codes(subjects)["ships"].blob
        told = tasks_of(card("encode", "ships", "--quality", 4, "--refine", 2, "--json"))
        assert (told["ships"]["status"], told["ships"]["effect"] > 0.9) == ("encoded", True)
        assert codes(subjects)["ships"].blob != before

    def test_without_refining_the_codes_are_those_of_the_cpu_byte_for_byte(
        self, icm: Icm, trained: Path, trained_template: Path, tmp_path: Path
    ) -> None:
        other = shutil.copytree(trained_template, tmp_path / "other")
        line = ("encode", "rules", "--max-error", 0.3)
        assert icm(*line, *CARD).code == icm("--store", other, *line, *CPU).code == 0
        assert {task: code.blob for task, code in codes(trained).items()} == {
            task: code.blob for task, code in codes(other).items()
        }

    def test_a_gain_lets_the_original_go(self, card: Icm, learned: Fleet) -> None:
        store = ("--store", learned.path)
        card(*store, "evict", "ships", "--min-gain", 0.8)
        assert learned.show("ships").task.final.is_evicted


class TestTellingTasksApart:
    def test_samples_of_a_known_task_are_recognised(self, card: Icm, subjects: Path, tmp_path: Path) -> None:
        for name, subject in SUBJECTS.items():
            samples = write_samples(tmp_path / f"{name}.jsonl", subject)
            assert card("recognize", "--samples", samples, "--json").document["task"] == name
