"""A second kind of base model goes through the whole program once it is registered: vectors, codes, retained gain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from icm_cli.errors import ExitCode
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models import catalogue
from icmlora.base_models.examples.examples import parse_examples, text_example
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds import modalities
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from icmlora.formats.discovery.folder import load_adapter, save_adapter
from icmlora.task_vectors.vector import VectorSettings
from registry.store import Store
from tests.cli.conftest import Ran
from tests.icmlora.base_models.toy_modality import HIDDEN, INPUTS, VectorClassifier, points, write_classifier

Icm = Callable[..., Ran]
LABEL = "toy/classifier"
CPU = ("--device", "cpu")
MODALITY = VectorClassifier()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modalities, "MODALITIES", [MODALITY, CausalLM()])
    monkeypatch.setattr(catalogue, "READERS", [MODALITY.example, text_example])


def write_task(folder: Path, base_folder: Path, task: int) -> None:
    """Train an adapter for one task and write it with its samples and its held-out examples."""
    base = MODALITY.load(inspect_base(LABEL, base_folder), device=torch.device("cpu"))
    random = torch.Generator().manual_seed(task)
    modules = [
        LoraModule(name, torch.randn(4, inputs, generator=random) / 4, torch.zeros(HIDDEN, 4))
        for name, inputs in (("encoder", INPUTS), ("mix", HIDDEN))
    ]
    start = Adapter(LABEL, None, ("encoder", "mix"), tuple(modules))
    samples = points(task, 64)
    *_, (_, trained) = finetune(
        base, start, list(parse_examples(samples, MODALITY.example)), FinetuneConfig(150, 0.05, batch=16)
    )
    save_adapter(trained, folder, dtype="float32", card="# trained\n")
    (folder / "samples.jsonl").write_bytes(samples)
    (folder / "eval.jsonl").write_bytes(points(task, 100, seed=1))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model in base/ and two trained tasks in loras/."""
    root = tmp_path_factory.mktemp("toys")
    write_classifier(root / "base")
    for task in (1, 2):
        write_task(root / "loras" / f"turned-{task}", root / "base", task)
    return root


@pytest.fixture
def store(icm: Icm, fleet: Path, tmp_path: Path) -> Path:
    """A store of them, with vectors and codes."""
    assert icm("base", "add", LABEL, fleet / "base").code == 0
    assert icm("ingest", fleet / "loras", *CPU).code == 0
    assert icm("train", "--no-eval", "--refine", "0", "--steps", 12, *CPU).code == 0
    return tmp_path / "store"


def test_vectors_have_the_hidden_size_of_the_model(store: Path) -> None:
    with Store.open(store, read_only=True) as opened:
        vectors = opened.task("turned-1").vectors
        assert {row.view for row in vectors} == {"adapted", "context"}
        assert ({row.dim for row in vectors}, len(vectors)) == ({HIDDEN}, 2 * VectorSettings().support_sets)


def test_the_retained_gain_is_that_of_the_accuracy(icm: Icm, store: Path, fleet: Path, tmp_path: Path) -> None:
    sources = icm("eval", "turned-1", *CPU, "--json").events[0]["sources"]
    assert icm("materialize", "turned-1", "-o", tmp_path / "out", "--source", "code").code == 0
    base = MODALITY.load(inspect_base(LABEL, fleet / "base"), device=torch.device("cpu"))
    held_out = parse_examples(points(1, 100, seed=1), MODALITY.example).items
    accuracies = [MODALITY.measure(base, held_out, 1).value]
    for folder in (fleet / "loras" / "turned-1", tmp_path / "out"):
        with added(base.model, factors_of(load_adapter(folder))):
            accuracies.append(MODALITY.measure(base, held_out, 1).value)
    without, original, code = accuracies
    assert original > without + 0.2
    assert sources["code"]["retained_gain"] == pytest.approx((code - without) / (original - without))


def test_a_code_is_refined_on_the_samples(icm: Icm, store: Path) -> None:
    ran = icm("encode", "turned-1", "--again", "--quality", "1", "--refine", "3", *CPU)
    assert (ran.code, "not refined" in ran.out) == (0, False), ran.err


def test_an_original_is_evicted_by_the_gain_that_its_code_keeps(icm: Icm, store: Path) -> None:
    assert icm("evict", "turned-1", "--min-gain", "0.1", *CPU).code == 0
    with Store.open(store, read_only=True) as opened:
        assert opened.task("turned-1").final.is_evicted


def test_samples_of_no_modality_are_left_out(icm: Icm, fleet: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "odd", fleet / "base", 3)
    (tmp_path / "odd" / "samples.jsonl").write_text('{"sound": "bell"}\n')
    ran = icm("ingest", tmp_path / "odd", "--no-vectors", "--json")
    assert (ran.code, ran.events[0]["samples"], ran.events[0]["eval_data"]["kept"]) == (ExitCode.PARTLY, None, 100)
