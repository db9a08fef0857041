"""Fleets of MLX-LM and GGUF adapters: in, coded, out as they were, and converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmlora import AdapterRefused, BaseModelMismatch, Bundle, DataError, Fleet, load_adapter
from icmlora.adapter.metrics import squared_error
from icmlora.base_models.finding.locations import Location, set_location
from icmlora.formats.pairs.gguf import GgufFormat
from icmlora.formats.pairs.mlx import MlxFormat
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import files_of
from tests.icmlora.formats.llama_files import gguf_file
from tests.icmlora.tiny_base import LABEL, write_tiny_base

NAMES = ("poems", "rules")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with PEFT adapters, and a folder `base` with their base model."""
    folder = tmp_path_factory.mktemp("source")
    fleet = Fleet(folder / "store")
    for seed, name in enumerate(NAMES):
        write_lora(folder / "loras" / name, seed=seed)
    fleet.ingest([folder / "loras"])
    fleet.add_base_model(LABEL, write_tiny_base(folder / "base"))
    for name in NAMES:
        fleet.materialize(name, folder / "mlx" / name, adapter_format="mlx")
        (folder / "gguf").mkdir(exist_ok=True)
        fleet.materialize(name, folder / "gguf" / f"{name}.gguf", adapter_format="gguf")
    return folder


@pytest.fixture(autouse=True)
def located_base(source: Path, isolated_home: None) -> None:
    """The base model is on this machine, which the user of each test has noted."""
    set_location(LABEL, Location(str(source / "base")))


def trained(source: Path, kind: str, folder: Path) -> Fleet:
    """Return a fleet of the same adapters in one format, with codes."""
    fleet = Fleet(folder / "store")
    report = fleet.ingest([source / kind])
    assert ([task.task for task in report.done], report.problems) == (list(NAMES), [])
    fleet.add_base_model(LABEL, source / "base")
    fleet.train(device="cpu", steps=5, refine=0, evaluate=False)
    return fleet


@pytest.fixture(scope="module")
def mlx(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return trained(source, "mlx", tmp_path_factory.mktemp("mlx"))


@pytest.fixture(scope="module")
def llama(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return trained(source, "gguf", tmp_path_factory.mktemp("gguf"))


def test_an_mlx_folder_comes_back_byte_for_byte(mlx: Fleet, source: Path, tmp_path: Path) -> None:
    report = mlx.materialize("poems", tmp_path / "out")
    given, found = files_of(source / "mlx" / "poems"), files_of(tmp_path / "out")
    assert {name: found[name] for name in given} == given
    assert (report.adapter_format, report.converted) == ("mlx", False)


def test_a_gguf_file_comes_back_byte_for_byte_in_a_folder_or_as_a_file(
    llama: Fleet, source: Path, tmp_path: Path
) -> None:
    given = (source / "gguf" / "poems.gguf").read_bytes()
    llama.materialize("poems", tmp_path / "out")
    report = llama.materialize("poems", tmp_path / "any.gguf", adapter_format="gguf")
    assert files_of(tmp_path / "out") == {"poems.gguf": given}
    assert (tmp_path / "any.gguf").read_bytes() == given
    assert (report.adapter_format, report.converted, report.squared_error) == ("gguf", False, 0.0)


def test_a_code_of_an_mlx_adapter_has_its_names_types_and_configuration(
    mlx: Fleet, source: Path, tmp_path: Path
) -> None:
    report = mlx.materialize("rules", tmp_path / "out", source="code", dtype="float32")
    original = source / "mlx" / "rules"
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (original / "adapter_config.json").read_bytes()
    before, after = (load_file(folder / "adapters.safetensors") for folder in (original, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in before.items()} == {name: one.shape for name, one in after.items()}
    found = squared_error(load_adapter(original), load_adapter(tmp_path / "out"))
    assert found == pytest.approx(report.squared_error, rel=1e-3)


def test_a_code_of_a_gguf_adapter_has_its_keys_and_the_error_that_is_claimed(
    llama: Fleet, source: Path, tmp_path: Path
) -> None:
    report = llama.materialize("rules", tmp_path / "a.gguf", source="code", dtype="float32", adapter_format="gguf")
    before, after = (path.read_bytes() for path in (source / "gguf" / "rules.gguf", tmp_path / "a.gguf"))
    assert GgufFormat().inspect(b"", before).template == GgufFormat().inspect(b"", after).template
    found = squared_error(*(GgufFormat().read(b"", data).adapter for data in (before, after)))
    assert found == pytest.approx(report.squared_error, rel=1e-3)


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_converted_for_peft_it_is_the_adapter_that_it_was_made_from(
    kind: str, mlx: Fleet, llama: Fleet, source: Path, tmp_path: Path
) -> None:
    fleet = mlx if kind == "mlx" else llama
    report = fleet.materialize("poems", tmp_path / "out", adapter_format="peft")
    assert (report.adapter_format, report.converted, report.squared_error) == ("peft", True, 0.0)
    assert squared_error(load_adapter(source / "loras" / "poems"), load_adapter(tmp_path / "out")) < 1e-10
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["lora_alpha"] == fields["r"]
    assert (fields["peft_type"], fields["base_model_name_or_path"]) == ("LORA", LABEL)


def test_one_is_converted_into_the_other(mlx: Fleet, llama: Fleet, source: Path, tmp_path: Path) -> None:
    mlx.materialize("poems", tmp_path / "a.gguf", adapter_format="gguf")
    llama.materialize("poems", tmp_path / "out", adapter_format="mlx")
    wanted = GgufFormat().read(b"", (source / "gguf" / "poems.gguf").read_bytes()).adapter
    assert squared_error(wanted, GgufFormat().read(b"", (tmp_path / "a.gguf").read_bytes()).adapter) < 1e-10
    assert squared_error(load_adapter(source / "mlx" / "poems"), load_adapter(tmp_path / "out")) < 1e-10


@pytest.mark.slow
def test_an_evicted_original_is_restored_from_its_file(source: Path, tmp_path: Path) -> None:
    fleet = trained(source, "gguf", tmp_path)
    fleet.evict(["poems"], max_error=10.0)
    assert fleet.materialize("poems", tmp_path / "out").source == "code"
    fleet.ingest([source / "gguf" / "poems.gguf"], restore=True)
    assert fleet.materialize("poems", tmp_path / "again").source == "original"


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_a_bundle_writes_each_adapter_in_its_own_format_or_another(
    kind: str, mlx: Fleet, llama: Fleet, source: Path, tmp_path: Path
) -> None:
    fleet = mlx if kind == "mlx" else llama
    bundle = Bundle(fleet.export_bundle(tmp_path / "fleet.icm").file)
    own, theirs = tmp_path / ("own.gguf" if kind == "gguf" else "own"), tmp_path / "store.gguf"
    assert bundle.materialize("poems", own).converted is False
    bundle.materialize("poems", tmp_path / "peft", adapter_format="peft", base_model=source / "base")
    fleet.materialize("poems", tmp_path / "wanted", source="code", adapter_format="peft")
    assert squared_error(load_adapter(tmp_path / "wanted"), load_adapter(tmp_path / "peft")) == 0.0
    bundle.materialize("poems", theirs, adapter_format="gguf", base_model=source / "base")
    if kind == "gguf":
        assert theirs.read_bytes() == own.read_bytes()


def test_dora_of_mlx_lm_is_converted_for_peft(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loras" / "dora"
    folder.mkdir(parents=True)
    tensors = load_file(source / "mlx" / "poems" / "adapters.safetensors")
    lengths = {
        name.replace("lora_b", "m"): torch.rand(one.shape[1]) for name, one in tensors.items() if "lora_b" in name
    }
    save_file(tensors | lengths, folder / "adapters.safetensors")
    fields = json.loads((source / "mlx" / "poems" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"fine_tune_type": "dora"}))
    fleet = Fleet(tmp_path / "store")
    fleet.ingest([folder])
    fleet.materialize("dora", tmp_path / "out", adapter_format="peft")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, value in lengths.items():
        key = f"base_model.model.{name.removesuffix('.m')}.lora_magnitude_vector"
        assert torch.equal(written[key], value)


def test_a_gguf_adapter_of_another_architecture_is_not_converted(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(gguf_file(architecture="qwen2", base=LABEL))
    fleet = Fleet(tmp_path / "store")
    set_location(LABEL, None)
    fleet.ingest([tmp_path / "other.gguf"])
    fleet.add_base_model(LABEL, source / "base")
    with pytest.raises(BaseModelMismatch, match="is for 'qwen2', but its base model is 'llama'"):
        fleet.materialize("other", tmp_path / "out", adapter_format="peft")
    assert not (tmp_path / "out").exists()


def test_a_gguf_adapter_of_another_base_model_is_not_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "other.gguf").write_bytes(gguf_file(architecture="qwen2", base=LABEL))
    (tmp_path / "loras" / "poems.gguf").write_bytes((source / "gguf" / "poems.gguf").read_bytes())
    fleet = Fleet(source / "store")
    report = fleet.ingest([tmp_path / "loras"], dry_run=True)
    (problem,) = report.problems
    assert (Path(problem.path).name, problem.kind) == ("other.gguf", "base-model")
    assert "'qwen2'" in problem.message
    assert len(report.done) == 1


def test_what_peft_has_under_another_name_is_not_converted(tmp_path: Path) -> None:
    folder = tmp_path / "loras" / "words"
    folder.mkdir(parents=True)
    tensors = {"model.embed_tokens.lora_a": torch.randn(20, 2), "model.embed_tokens.lora_b": torch.randn(2, 8)}
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 2}, "model": LABEL}))
    fleet = Fleet(tmp_path / "store")
    fleet.ingest([folder])
    with pytest.raises(AdapterRefused, match=r"model\.embed_tokens may be an embedding"):
        fleet.materialize("words", tmp_path / "out", adapter_format="peft")


def test_bad_adapters_are_named_and_the_good_ones_are_taken(source: Path, tmp_path: Path) -> None:
    good = (source / "gguf" / "poems.gguf").read_bytes()
    for name, data in {"good": good, "cut": good[:-200], "model": gguf_file(general_type="model")}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
    turned = tmp_path / "turned"
    turned.mkdir()
    tensors = load_file(source / "mlx" / "poems" / "adapters.safetensors")
    save_file({name: one.T.contiguous() for name, one in tensors.items()}, turned / "adapters.safetensors")
    config = (source / "mlx" / "poems" / "adapter_config.json").read_bytes()
    (turned / "adapter_config.json").write_bytes(config)
    report = Fleet(tmp_path / "store").ingest([tmp_path])
    assert [task.task for task in report.done] == ["good"]
    assert sorted(Path(problem.path or "").name for problem in report.problems) == ["adapters.safetensors", "cut.gguf"]


def test_both_are_read_into_memory_by_their_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes((source / "gguf" / "poems.gguf").read_bytes())
    assert load_adapter(tmp_path).modules[0].name == "blk.0.attn_q"
    files = [(source / "mlx" / "poems" / name).read_bytes() for name in ("adapter_config.json", "adapters.safetensors")]
    assert squared_error(MlxFormat().read(*files).adapter, load_adapter(source / "mlx" / "poems")) == 0.0


def test_only_peft_adapters_are_attached(llama: Fleet) -> None:
    from icmlora import attach
    from tests.icmlora.tiny_base import tiny_model

    with pytest.raises(DataError, match="'poems' cannot be attached: it is not in PEFT format"):
        attach(tiny_model(), llama, "poems")
