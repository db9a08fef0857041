"""What every adapter format must do. A new format is one more line in `FORMATS` here.

A format without a fresh form writes in the form of `FORMS`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.errors import AdapterRefused
from icmlora.formats import catalogue
from icmlora.formats.catalogue import format_named
from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.format import AdapterBytes, AdapterFormat, FoundAdapter, Template, write_adapter_files
from icmlora.formats.pairs.gguf import GgufFormat
from icmlora.formats.pairs.mlx import MlxFormat
from icmlora.formats.peft.peft import PeftFormat
from icmlora.io.safetensors import RawTensor
from tests.icmlora.adapter_files import BASE, Q0, V0, adapter
from tests.icmlora.formats.llama_files import gguf_details
from tests.icmlora.formats.toy_format import ToyFormat

FORMATS: tuple[AdapterFormat, ...] = (PeftFormat(), MlxFormat(), GgufFormat(), ToyFormat())
FORMS: Mapping[str, str] = {"gguf": gguf_details(BASE)}


@pytest.fixture(params=FORMATS, ids=lambda found: found.name)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AdapterFormat:
    """One format after the other, registered as the only one."""
    found: AdapterFormat = request.param
    monkeypatch.setattr(catalogue, "FORMATS", [found])
    return found


RANK, INPUTS, OUTPUTS = 4, 16, 8  # each factor fills whole blocks of 32 bytes, so that no file ends with padding


def example(rank: int = RANK) -> Adapter:
    """Make an adapter of two modules whose values every type holds exactly."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=random) / 8

    return adapter(*((name, draw(rank, INPUTS), draw(OUTPUTS, rank)) for name in (Q0, V0)))


def encoded(form: AdapterFormat, made: Adapter | None = None, dtype: str = "float32") -> AdapterBytes:
    details = FORMS.get(form.name)
    like = None if details is None else Template(b"", example().layout, "F32", details)
    made = example() if made is None else made
    return form.encode(made, dtype=dtype, card="# a card\n", metadata={"icm": "1"}, like=like)


def found_in(folder: Path) -> FoundAdapter:
    discovery = find_adapters([folder])
    assert discovery.refused == ()
    (task,) = discovery.tasks
    return task.final


def test_what_is_written_is_found_and_has_the_same_bytes(form: AdapterFormat, tmp_path: Path) -> None:
    files = encoded(form)
    write_adapter_files(tmp_path / "rust", form, files, "rust")
    found = found_in(tmp_path)
    assert (found.format, found.weights.read_bytes()) == (form, files.weights)
    assert (b"" if found.config is None else found.config.read_bytes()) == files.config


def test_a_task_is_named_after_the_folder_of_its_adapter(form: AdapterFormat, tmp_path: Path) -> None:
    write_adapter_files(tmp_path / "rust", form, encoded(form), "rust")
    assert [task.name for task in find_adapters([tmp_path]).tasks] == ["rust"]


def test_reading_gives_the_adapter_that_was_written(form: AdapterFormat) -> None:
    files = encoded(form)
    read = form.read(files.config, files.weights)
    assert squared_error(example(), read.adapter) == 0.0
    assert (read.adapter.base_model, read.adapter.task_type, read.extras) == (BASE, "CAUSAL_LM", {})


def test_a_summary_says_what_reading_gives(form: AdapterFormat) -> None:
    files = encoded(form)
    summary, read = form.inspect(files.config, files.weights), form.read(files.config, files.weights).adapter
    assert (summary.base_model, summary.task_type, summary.layout) == (read.base_model, read.task_type, read.layout)
    assert summary.target_modules == read.target_modules
    assert (summary.parameters, summary.rank_max) == (
        sum(shape.parameters for shape in read.layout),
        max(shape.rank for shape in read.layout),
    )
    assert summary.extras == ()


def test_a_view_of_the_weights_can_be_inspected(form: AdapterFormat) -> None:
    files = encoded(form)
    assert form.inspect(files.config, memoryview(files.weights)) == form.inspect(files.config, files.weights)


def test_the_same_adapter_gives_the_same_bytes(form: AdapterFormat) -> None:
    assert encoded(form) == encoded(form)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_a_type_holds_come_back_exactly(form: AdapterFormat, dtype: str) -> None:
    files = encoded(form, dtype=dtype)
    assert squared_error(example(), form.read(files.config, files.weights).adapter) == 0.0


def test_a_value_that_the_type_cannot_hold_is_refused(form: AdapterFormat) -> None:
    made = example()
    huge = replace(made.modules[0], a=torch.full((RANK, INPUTS), 1e30))
    with pytest.raises(AdapterRefused) as caught:
        encoded(form, replace(made, modules=(huge, made.modules[1])), dtype="float16")
    assert caught.value.kind == "overflow"


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_weights_that_were_cut_short_are_refused(form: AdapterFormat, keep: int) -> None:
    files = encoded(form)
    with pytest.raises(AdapterRefused):
        form.inspect(files.config, files.weights[:keep])
    with pytest.raises(AdapterRefused):
        form.read(files.config, files.weights[:keep])


def test_a_value_that_is_not_finite_is_never_given_to_training(form: AdapterFormat) -> None:
    files = encoded(form)
    weights = files.weights[:-4] + b"\0\0\xc0\x7f"  # the last value becomes NaN
    with pytest.raises(AdapterRefused):
        form.read(files.config, weights)
    with suppress(AdapterRefused):  # a format may refuse it or keep its original only
        summary = form.inspect(files.config, weights)
        assert summary.does_nothing
        assert "NaN" in (summary.original_only or "")


def test_a_damaged_configuration_is_refused_without_the_weights(form: AdapterFormat) -> None:
    with pytest.raises(AdapterRefused):
        form.read_config(b"{")


def test_a_refusal_names_the_file(form: AdapterFormat) -> None:
    with pytest.raises(AdapterRefused) as caught:
        form.inspect(encoded(form).config, b"", path="some/file")
    assert caught.value.path == "some/file"


def test_extras_come_back_exactly(form: AdapterFormat) -> None:
    extras = {"head": RawTensor("F32", (2, 3), torch.arange(6).float().numpy().tobytes())}
    plain = encoded(form)
    like = Template(plain.config, example().layout, "F32", form.inspect(plain.config, plain.weights).template)
    files = form.encode(example(), card="", metadata={}, like=like, extras=extras)
    (found,) = form.inspect(files.config, files.weights).extras
    assert (found.name, found.dtype, found.shape) == ("head", "F32", (2, 3))
    assert files.weights[found.begin : found.end] == extras["head"].data
    assert form.read(files.config, files.weights).extras == extras


def test_a_folder_of_something_else_holds_no_adapter(form: AdapterFormat, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing of ours")
    assert (find_adapters([tmp_path]).tasks, find_adapters([tmp_path]).refused) == ((), ())


def test_a_format_is_found_by_its_name(form: AdapterFormat) -> None:
    assert format_named(form.name) is form


def test_a_format_that_is_not_known_is_refused_with_a_hint() -> None:
    with pytest.raises(AdapterRefused, match="'punched cards'") as caught:
        format_named("punched cards")
    assert caught.value.hint


MODULES = [type(form).__module__ for form in FORMATS]


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_format_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_single_file_can_be_given_by_its_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ToyFormat()
    monkeypatch.setattr(catalogue, "FORMATS", [PeftFormat(), toy])
    (tmp_path / "rust.toy").write_bytes(encoded(toy).weights)
    assert [task.name for task in find_adapters([tmp_path / "rust.toy"]).tasks] == ["rust"]


def test_a_folder_of_single_files_is_many_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ToyFormat()
    monkeypatch.setattr(catalogue, "FORMATS", [PeftFormat(), toy])
    for name in ("rust", "sql"):
        (tmp_path / f"{name}.toy").write_bytes(encoded(toy).weights)
    write_adapter_files(tmp_path / "poems", PeftFormat(), encoded(PeftFormat()), "poems")
    assert [task.name for task in find_adapters([tmp_path]).tasks] == ["poems", "rust", "sql"]


def test_what_looks_like_a_format_but_is_not_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "FORMATS", [PeftFormat(), ToyFormat()])
    (tmp_path / "old.toy0").write_bytes(b"")
    assert [error.kind for error in find_adapters([tmp_path]).refused] == ["toy"]
