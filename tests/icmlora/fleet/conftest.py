"""Fleets of the small stores, and one whose adapters were trained, so that there are gains to keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from icmlora import Fleet, LoraModule, save_adapter
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from tests.icmlora.fewshot.trained_tasks import random_adapter, scored
from tests.icmlora.fleet.stores import copy_of
from tests.icmlora.tiny_base import LABEL, load_tiny_base
from tests.quick import quick_codes
from tests.shared import built_once, use_config_of

SUBJECTS = {"apples": "red apples", "ships": "tall ships", "trains": "night trains"}

__all__ = ["quick_codes"]


@pytest.fixture
def loras(mixed_template: Path) -> Path:
    """The adapters of the mixed fleet, not to be changed."""
    return mixed_template / "loras"


@pytest.fixture
def base_folder(mixed_template: Path) -> Path:
    """The tiny base model, not to be changed."""
    return mixed_template / "base"


@pytest.fixture
def ingested(mixed: Path) -> Fleet:
    """The mixed fleet with its vectors, not trained."""
    return Fleet(mixed)


@pytest.fixture
def fleet(trained: Path) -> Fleet:
    """The mixed fleet, trained."""
    return Fleet(trained)


@pytest.fixture(scope="session")
def learned_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, three adapters that were trained on texts of their own, and a trained store."""
    return built_once(tmp_path_factory, "learned", write_learned)


def write_learned(folder: Path) -> None:
    """Train three adapters on texts of their own, and a store on them."""
    base = load_tiny_base(folder / "base")
    start = random_adapter(0)
    nothing = replace(start, modules=tuple(LoraModule(module.name, module.a, 0 * module.b) for module in start.modules))
    for name, subject in SUBJECTS.items():
        texts = [f"{subject} {'and ' * (number % 3)}{subject} {number}" for number in range(12)]
        samples = scored(base, texts[:8])
        *_, (_, adapter) = finetune(base, nothing, samples, FinetuneConfig(steps=20, learning_rate=0.05, batch=4))
        save_adapter(adapter, folder / "loras" / name)
        for file, part in (("samples.jsonl", texts[:8]), ("eval.jsonl", texts[8:])):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
            (folder / "loras" / name / file).write_text(lines)
    fleet = Fleet(folder / "store")
    fleet.add_base_model(LABEL, folder / "base")
    fleet.ingest([folder / "loras"])
    fleet.extract_vectors(device="cpu")
    fleet.train(device="cpu", steps=30, quality=6, refine=0, evaluate=False)


@pytest.fixture
def learned(learned_template: Path, tmp_path: Path) -> Fleet:
    """A trained fleet in which every adapter helps on its task's held-out text."""
    use_config_of(learned_template)
    return copy_of(learned_template / "store", tmp_path / "learned")


@pytest.fixture(scope="session")
def image_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline of diffusers, image adapters, and a trained store."""
    from tests.icmlora.fleet.image_store import write_images  # imports diffusers

    return built_once(tmp_path_factory, "images", write_images)


@pytest.fixture
def images(image_template: Path, tmp_path: Path) -> Fleet:
    """A trained fleet of image adapters whose base model is a pipeline."""
    use_config_of(image_template)
    return copy_of(image_template / "store", tmp_path / "store")
