"""The stand-in as Apple's `mps`: no float64 and nothing of CUDA. The four lines and what else computes run on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from icmlora.formats.discovery.folder import load_adapter
from tests.cli.coded import codes, tasks_of
from tests.cli.conftest import Ran
from tests.cli.fleet import write_texts
from tests.cli.test_recognize import write_samples
from tests.cli.tiny_fleet import STEPS, icm_quietly, write_subject
from tests.device.counts import counting
from tests.icmlora.tiny_base import LABEL
from tests.shared import use_config_of

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


@pytest.fixture(scope="module")
def coded_template(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two tasks that were ingested and trained on the card; their codes are refined and measured."""
    folder = tmp_path_factory.mktemp("mps")
    store = folder / "store"
    icm_quietly(store, "base", "add", LABEL, mixed_template / "base")
    for seed, name in enumerate(("apples", "ships")):
        write_texts(write_subject(folder / "loras" / name, seed=seed), "eval.jsonl", count=2)
    icm_quietly(store, "ingest", folder / "loras", "--device", "mps")
    icm_quietly(store, "train", "--steps", STEPS, "--refine", 2, "--device", "mps")
    return store


@pytest.fixture
def coded(coded_template: Path, mixed_template: Path, tmp_path: Path) -> Path:
    use_config_of(mixed_template)
    return Path(shutil.copytree(coded_template, tmp_path / "store"))


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


def test_the_four_lines_run(icm: Icm, coded: Path, tmp_path: Path) -> None:
    for source in ("code", "original"):
        assert icm("materialize", "ships", "-o", tmp_path / source, "--source", source).code == 0
    assert load_adapter(tmp_path / "code").layout == load_adapter(tmp_path / "original").layout
    assert "not measured" not in icm("stats").out


def test_eval_measures_what_it_measures_on_the_cpu(card: Icm, icm: Icm, coded: Path) -> None:
    on_card = card("eval", "--again", "--json").events[0]["sources"]
    on_cpu = icm("eval", "--again", "--json", "--device", "cpu").events[0]["sources"]
    for name, rung in on_card.items():
        assert rung["nats_per_token"] == pytest.approx(on_cpu[name]["nats_per_token"], rel=0.005)


def test_vectors_are_made_and_codes_are_refined(card: Icm, coded: Path) -> None:
    assert card("vectors", "--again", "--json").events[-1]["extracted"] == 2
    before = codes(coded)["ships"].size
    assert tasks_of(card("encode", "ships", "--quality", 2, "--refine", 1, "--json"))["ships"]["status"] == "encoded"
    assert codes(coded)["ships"].size < before


def test_a_few_shot_start_generates_an_adapter(card: Icm, coded: Path, tmp_path: Path) -> None:
    card("train", "--few-shot", "--episodes", 2)
    samples = write_samples(tmp_path / "geese.jsonl", "grey geese")
    document = card("generate", "geese", "--samples", samples, "-o", tmp_path / "out", "--refine", 2, "--json").document
    assert document["nats_per_token"] < document["base_nats_per_token"]
