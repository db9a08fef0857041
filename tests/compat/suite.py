"""What is tested of every case. A test file names the cases, `conftest` runs these tests on each."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from icmlora import Fleet
from tests.compat import seam
from tests.compat.bases import quiet
from tests.compat.building import CONFIG, WEIGHTS, computed, converted_by_peft, fresh_model
from tests.compat.case import Case

CARD = "README.md"


@dataclass(frozen=True)
class World:
    """A store with all cases of a file, trained."""

    fleet: Fleet
    folder: Path
    """Where the libraries wrote the adapters."""
    outputs: dict[str, Any]
    """What each adapter's model computed when it was saved."""
    failed: dict[str, str]
    """Base models whose training failed, and why."""

    def form(self, case: Case) -> Path:
        """Return the adapter in whose form a code comes back: the original, or what PEFT converts it to."""
        converted = converted_by_peft(self.folder / case.name)
        return converted if converted.exists() else self.folder / case.name

    def written(self, case: Case, source: str, into: Path) -> Any:
        """Materialize a case from a source; return the report."""
        return self.fleet.materialize(case.name, into, source=source)


def build_world(cases: tuple[Case, ...], folder: Path) -> World:
    """Write the adapters of all cases, ingest them with one call, and train with few steps."""
    outputs = {case.name: case.build(folder / "adapters" / case.name) for case in cases}
    fleet = Fleet(folder / "store", cache=folder / "cache")
    seam.ingest(fleet, folder / "adapters", texts=False)
    return World(fleet, folder / "adapters", outputs, seam.train(fleet))


class CaseTests:
    """The tests; a file's class adds the cases."""

    cases: ClassVar[tuple[Case, ...]]

    def test_it_has_its_outcome(self, world: World, case: Case) -> None:
        assert seam.outcome(world.fleet, case) == case.outcome, world.failed

    def test_the_original_comes_back_byte_for_byte(self, world: World, case: Case, tmp_path: Path) -> None:
        world.written(case, "original", tmp_path / "adapter")
        assert files_of(tmp_path / "adapter") == files_of(world.folder / case.name)

    def test_its_code_comes_back_in_the_mould_of_the_original(self, world: World, case: Case, tmp_path: Path) -> None:
        original, decoded = world.form(case), tmp_path / "adapter"
        world.written(case, "code", decoded)
        assert (decoded / CONFIG).read_bytes() == (original / CONFIG).read_bytes()
        assert header_of(decoded) == header_of(original)
        assert (decoded / WEIGHTS).stat().st_size <= (original / WEIGHTS).stat().st_size
        assert extras_of(decoded) == extras_of(original)
        coded = {CONFIG, WEIGHTS, CARD}
        assert files_of(decoded, without=coded) == files_of(original, without=coded)

    def test_peft_loads_original_and_code_alike(self, world: World, case: Case, tmp_path: Path) -> None:
        import torch

        world.written(case, "original", tmp_path / "original")
        original, keys = load_into(case, tmp_path / "original")
        assert keys == ([], [])
        if (before := world.outputs[case.name]) is not None:
            assert case.base is not None
            torch.testing.assert_close(computed(original, case.base), before, rtol=1e-4, atol=1e-5)
        if case.outcome == "original":
            return
        report = world.written(case, "code", tmp_path / "code")
        decoded, keys = load_into(case, tmp_path / "code")
        assert keys == ([], [])
        original, _ = load_into(case, world.form(case))
        # The claim is about the decoded numbers, before they are rounded to the format of the file.
        allowed = 1e-4 if all(dtype == "F32" for dtype, _ in header_of(tmp_path / "code")[0].values()) else 1e-3
        assert seam.claimed_error(report) == pytest.approx(distance(original, decoded), abs=allowed)


def files_of(folder: Path, without: set[str] = frozenset()) -> dict[str, bytes]:  # type: ignore[assignment]
    """Return the files that belong to an adapter; pickles beside it do not."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".bin" and path.name not in without
    }


def header_of(folder: Path) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    """Return the types and shapes of an adapter's tensors by name, and the file's metadata."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}, file.metadata() or {}


def extras_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the tensors that are no LoRA factors, by name."""
    import torch
    from safetensors.torch import load_file

    halves = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B")
    return {
        name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in load_file(folder / WEIGHTS).items()
        if not name.removesuffix(".weight").removesuffix(".default").removesuffix(".my-adapter").endswith(halves)
    }


def load_into(case: Case, folder: Path) -> tuple[Any, tuple[list[str], list[str]]]:
    """Load an adapter with PEFT; return the model, and the unexpected and the missing keys."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    assert case.base is not None
    with quiet():
        model = PeftModel.from_pretrained(fresh_model(case.base), folder).eval()
        possible = set(get_peft_model_state_dict(model))
        needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / WEIGHTS, "np") as file:
        stored = set(file.keys())
    return model, (sorted(stored - possible), sorted(needed - stored))


def distance(original: Any, decoded: Any) -> float:
    """Return ||dW' - dW|| / ||dW|| over all modules, as PEFT computes dW."""
    before, after = updates(original), updates(decoded)
    assert before.keys() == after.keys()
    missed = sum(float((after[name] - dw).double().square().sum()) for name, dw in before.items())
    return math.sqrt(missed / sum(float(dw.double().square().sum()) for dw in before.values()))


def updates(model: Any) -> dict[str, Any]:
    """Return dW of every module in float32."""
    from peft.tuners.lora.layer import LoraLayer

    exact = copy.deepcopy(model).float()
    return {name: _update(layer).detach() for name, layer in exact.named_modules() if isinstance(layer, LoraLayer)}


def _update(layer: Any) -> Any:
    import torch

    # An embedding has its factors elsewhere.
    groups = getattr(layer.lora_B["default"], "groups", 1) if "default" in layer.lora_B else 1
    if groups == 1:
        return layer.get_delta_weight("default")
    # PEFT does not compute it for a grouped convolution: each group of outputs has its own rows of A.
    a, b = (half["default"].weight.flatten(1).chunk(groups) for half in (layer.lora_A, layer.lora_B))
    return layer.scaling["default"] * torch.cat([right @ left for left, right in zip(a, b, strict=True)])
