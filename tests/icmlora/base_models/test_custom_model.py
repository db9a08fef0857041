"""Base models with a loader: the worked example of the guide does what every modality does, and errors are clear."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.finding.fingerprint import fingerprint_base, is_same_model
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.channel_statistics import channel_statistics
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.errors import BaseModelMismatch, BaseModelNotFound, BaseModelUnsuited, DataError
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from tests.icmlora.base_models.toy_modality import HIDDEN, INPUTS, points, write_classifier

LABEL = "my/classifier"
GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "base-models.md"
CPU = torch.device("cpu")
Write = Callable[[str], str]


def worked_example() -> str:
    """Return the loader of the guide."""
    return GUIDE.read_text("utf-8").split("```python\n")[1].partition("```")[0]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module where Python finds it; returns the name of its function `load`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(code: str) -> str:
        name = f"loaders_{len(list(tmp_path.glob('loaders_*.py')))}"
        (tmp_path / f"{name}.py").write_text(code)
        return f"{name}:load"

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("loaders_"):
            del sys.modules[name]


def load(folder: Path, loader: str) -> BaseModel:
    found = inspect_base(LABEL, folder, loader)
    return modality_of(found).load(found, device=CPU)


@pytest.fixture
def base(write: Write, tmp_path: Path) -> BaseModel:
    return load(write_classifier(tmp_path / "base"), write(worked_example()))


def start() -> Adapter:
    random = torch.Generator().manual_seed(0)
    sizes = (("encoder", INPUTS), ("mix", HIDDEN))
    modules = [LoraModule(name, torch.randn(4, n, generator=random) / 4, torch.zeros(HIDDEN, 4)) for name, n in sizes]
    return Adapter(LABEL, None, ("encoder", "mix"), tuple(modules))


def test_the_worked_example_has_states_and_a_metric(base: BaseModel) -> None:
    examples = parse_examples(points(0, 30), base.modality.example).items
    assert base.modality.states(base, examples, 64).shape == (30, HIDDEN)
    score = base.modality.measure(base, examples, 64)
    assert (score.count, 0 <= score.value <= 1, base.modality.metric.name) == (30, True, "accuracy")


def test_an_adapter_is_trained_through_the_loss_of_a_loader(base: BaseModel) -> None:
    examples = parse_examples(points(1, 64), base.modality.example).items
    items = base.modality.prepare(base, examples, 64)
    *_, (_, trained) = finetune(base, start(), items, FinetuneConfig(100, 0.05, batch=16))
    before = base.modality.measure(base, examples, 64).value
    with added(base.model, factors_of(trained)):
        assert base.modality.measure(base, examples, 64).value > before + 0.2


def test_channel_statistics_come_from_the_predictions(base: BaseModel) -> None:
    examples = parse_examples(points(0, 9), base.modality.example).items
    measured = channel_statistics(base, examples, ["encoder", "mix"], max_tokens=50)
    assert {name: (len(a), len(b)) for name, (a, b) in measured.items()} == {"encoder": (8, 16), "mix": (16, 16)}


def test_a_row_that_the_loader_cannot_read_is_skipped_with_a_reason(base: BaseModel) -> None:
    found = parse_examples(points(0, 2) + b'{"x": 1}\n', base.modality.example)
    assert (len(found), found.skipped) == (2, 1)
    assert found.reason == "line 3 is not an example of the base model: KeyError: 'vector'"


def test_without_predictions_the_base_model_is_unsuited_to_refinement(write: Write, tmp_path: Path) -> None:
    code = worked_example().replace("def predictions", "def other").replace("self.predictions", "self.other")
    base = load(write_classifier(tmp_path / "base"), write(code))
    examples = parse_examples(points(0, 2), base.modality.example).items
    with pytest.raises(BaseModelUnsuited, match="no predictions"):
        base.modality.logits(base, base.modality.prepare(base, examples, 64))


def test_any_file_is_a_base_model_and_its_fingerprint_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"one")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "any.bin").write_bytes(b"one")
    file, folder = (inspect_base(LABEL, tmp_path / name, "m:load") for name in ("weights.bin", "folder"))
    assert fingerprint_base(file) == fingerprint_base(folder)
    assert is_same_model(file, folder)
    assert not is_same_model(file, inspect_base(LABEL, tmp_path / "folder", "other:load"))
    (tmp_path / "weights.bin").write_bytes(b"two")
    assert fingerprint_base(file) != fingerprint_base(folder)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_path_without_files_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelNotFound):
        inspect_base(LABEL, tmp_path / name, "m:load")


BROKEN = {
    "is not marked as a loader": "def load(path, device, dtype): ...",
    "failed: RuntimeError: no such weights": (
        "import icmlora\n@icmlora.base_model_loader\n"
        "def load(path, device, dtype): raise RuntimeError('no such weights')"
    ),
    "is not an icmlora.CustomModel": (
        "import icmlora\n@icmlora.base_model_loader\ndef load(path, device, dtype): return None"
    ),
    "cannot be imported: ZeroDivisionError": "1 / 0",
    "cannot be imported: AttributeError": "",
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_loader_that_does_not_work_is_one_clear_error(message: str, write: Write, tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound) as caught:
        load(write_classifier(tmp_path / "base"), write(BROKEN[message]))
    assert message in caught.value.message


@pytest.mark.parametrize("loader", ["os", "os:system:ls", "os:system", ":load", "os:path.join"])
def test_a_store_cannot_name_any_function(loader: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound):
        load(write_classifier(tmp_path / "base"), loader)


def test_a_method_that_fails_says_which(write: Write, tmp_path: Path) -> None:
    base = load(write_classifier(tmp_path / "base"), write(worked_example().replace("self.model.hidden", "1 / 0 or ")))
    examples = parse_examples(points(0, 2), base.modality.example).items
    with pytest.raises(BaseModelMismatch, match=r"^states of the loader loaders_0:load failed: ZeroDivisionError"):
        base.modality.states(base, examples, 64)


def test_states_of_another_shape_are_refused(write: Write, tmp_path: Path) -> None:
    base = load(
        write_classifier(tmp_path / "base"), write(worked_example().replace("hidden_size = 16", "hidden_size = 8"))
    )
    with pytest.raises(BaseModelMismatch, match=r"\(2, 16\), not \(2, 8\)"):
        base.modality.states(base, parse_examples(points(0, 2), base.modality.example).items, 64)


def test_nothing_is_measured_on_nothing(base: BaseModel) -> None:
    with pytest.raises(DataError):
        base.modality.measure(base, [], 64)
