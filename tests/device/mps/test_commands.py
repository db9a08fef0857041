"""The stand-in as Apple's `mps`: no float64 and nothing of CUDA. The four lines and what else computes run on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from icmlora.formats.folder import load_adapter
from tests.cli.coded import codes, tasks_of
from tests.cli.conftest import Ran
from tests.cli.test_recognize import write_samples
from tests.cli.tiny_fleet import EPISODES, STEPS, SUBJECTS
from tests.device.counts import counting
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]


@pytest.fixture
def card(icm: Icm) -> Callable[..., Ran]:
    """Return a function that runs a command on the card, and insists that it succeeds and that the card was used."""

    def call(*arguments: object) -> Ran:
        with counting() as counts:
            ran = icm(*arguments, "--device", "mps")
        assert ran.code == 0, ran.err
        assert counts.operators > 0
        return ran

    return call


def test_it_has_no_float64() -> None:
    assert (torch.backends.mps.is_available(), torch.cuda.is_available()) == (True, False)
    for make in (
        lambda: torch.zeros(3, dtype=torch.float64, device="mps"),
        lambda: torch.zeros(3, device="mps").double(),
        lambda: torch.zeros(3, dtype=torch.float64).to("mps"),
        lambda: torch.tensor([1.0], dtype=torch.float64, device="mps"),
    ):
        with pytest.raises(TypeError, match="MPS framework doesn't support float64"):
            make()


def test_the_four_lines_with_refined_codes_that_are_measured(
    card: Icm, icm: Icm, mixed_template: Path, tmp_path: Path
) -> None:
    icm("base", "add", LABEL, mixed_template / "base")
    card("ingest", mixed_template / "loras" / "poems")
    told = {event["type"]: event for event in card("train", "--steps", STEPS, "--refine", 2, "--json").events}
    assert told["refined"]["size"] < told["refined"]["before"]
    assert told["task"]["rungs"].keys() == {"base", "original", "code"}
    assert icm("materialize", "poems", "-o", tmp_path / "adapter", "--source", "code").code == 0
    assert load_adapter(tmp_path / "adapter").modules
    assert "RELATIVE ERROR" in icm("stats").out


def test_eval_vectors_and_encode_run(card: Icm, subjects: Path) -> None:
    assert card("vectors", "--again", "--json").events[-1]["extracted"] == len(SUBJECTS)
    before = codes(subjects)["ships"].size
    told = tasks_of(card("encode", "ships", "--quality", 4, "--refine", 2, "--json"))
    assert told["ships"]["status"] == "encoded"
    assert codes(subjects)["ships"].size < before


def test_eval_measures_what_it_measures_on_the_cpu(card: Icm, icm: Icm, trained: Path) -> None:
    on_card = card("eval", "poems", "--json").events[0]["rungs"]
    on_cpu = icm("eval", "poems", "--again", "--json", "--device", "cpu").events[0]["rungs"]
    for name, rung in on_card.items():
        assert rung["nats_per_token"] == pytest.approx(on_cpu[name]["nats_per_token"], rel=0.005)


def test_a_few_shot_start_generates_an_adapter(card: Icm, trained: Path, tmp_path: Path) -> None:
    card("train", "--objective", "functional", "--episodes", EPISODES)
    samples = write_samples(tmp_path / "geese.jsonl", "grey geese")
    document = card("generate", "geese", "--samples", samples, "-o", tmp_path / "out", "--refine", 2, "--json").document
    assert document["nats_per_token"] < document["base_nats_per_token"]
