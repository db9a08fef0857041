"""Base models in nf4 and int8: the same uses as in full precision, with less memory, on every kind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.finding.lookup import FoundBase, check_load_in, inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.quantised import stored_bytes
from icmlora.base_models.running.attach import adapted
from icmlora.base_models.running.channel_statistics import channel_statistics
from icmlora.base_models.running.lora_hooks import Factors, added
from icmlora.base_models.running.modules import linear_shape
from icmlora.errors import BaseModelMismatch, BaseModelNotFound, BaseModelUnsuited, DataError
from icmlora.formats.format import RunnableAdapter
from registry.names import LoadIn
from tests.icmlora.base_models.test_gguf import write_tiny_gguf
from tests.icmlora.base_models.tiny_kinds import CLASSES, KINDS, Kind, texts, write_bert_without_head
from tests.icmlora.tiny_base import LABEL, write_tiny_base

pytest.importorskip("bitsandbytes")

LLAMA = Kind("llama", write_tiny_base, texts, ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"))
BITS: tuple[LoadIn, ...] = ("nf4", "int8")


@pytest.fixture(params=BITS)
def load_in(request: pytest.FixtureRequest) -> LoadIn:
    bits: LoadIn = request.param
    return bits


def load(folder: Path, load_in: LoadIn | None) -> BaseModel:
    found = replace(inspect_base(LABEL, folder), load_in=load_in)
    return modality_of(found).load(found, device=torch.device("cpu"))


def factors(base: BaseModel, modules: tuple[str, ...]) -> Factors:
    """Return random factors with gradients."""
    random = torch.Generator().manual_seed(1)
    made: Factors = {}
    for name in modules:
        shape = linear_shape(base.model.get_submodule(name))
        assert shape is not None
        a, b = (0.3 * torch.randn(size, generator=random) for size in ((2, shape[1]), (shape[0], 2)))
        made[name] = a.requires_grad_(), b.requires_grad_()
    return made


def gradients(base: BaseModel, items: Any, modules: tuple[str, ...]) -> torch.Tensor:
    pairs = factors(base, modules)
    with added(base.model, pairs):
        base.modality.loss(base, items).backward()
    found = [factor.grad for pair in pairs.values() for factor in pair]
    assert all(one is not None for one in found)
    return torch.cat([one.flatten() for one in found if one is not None])


@pytest.fixture(params=[LLAMA, *KINDS.values()], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.mark.one_case
def test_every_kind_is_measured_gives_gradients_and_statistics_and_takes_adapters(
    kind: Kind, load_in: LoadIn, tmp_path: Path
) -> None:
    base = load(kind.write(tmp_path / "base"), load_in)
    examples = parse_examples(kind.examples, base.modality.example).items
    items = base.modality.prepare(base, examples[:3], 64)
    first = gradients(base, items, kind.modules)  # before any pass without gradients
    before = base.modality.measure(base, examples, 64)
    torch.testing.assert_close(gradients(base, items, kind.modules), first)
    assert first.abs().sum() > 0
    assert all(one.isfinite().all() for one in base.modality.states(base, examples[:2], 64))
    statistics = channel_statistics(base, examples, kind.modules, max_tokens=64)
    assert {name: (len(b), len(a)) for name, (a, b) in statistics.items()} == {
        name: linear_shape(base.model.get_submodule(name)) for name in kind.modules
    }
    modules = tuple(LoraModule(name, a.detach(), b.detach()) for name, (a, b) in factors(base, kind.modules).items())
    adapter = RunnableAdapter(Adapter(LABEL, None, kind.modules, modules))
    plain = base.modality.logits(base, items)
    with adapted(base, adapter):
        changed = base.modality.logits(base, items)
    with added(base.model, {module.name: (module.a, module.b) for module in modules}):
        expected = base.modality.logits(base, items)
    assert all(torch.equal(one, two) for one, two in zip(plain, base.modality.logits(base, items), strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(plain, changed, strict=True))
    effect, odd = (torch.cat(one) - torch.cat(changed) for one in (plain, expected))
    assert odd.norm() < 0.2 * effect.norm()  # PEFT adds in float32, hooks in bfloat16
    assert base.modality.measure(base, examples, 64) == before


def test_linear_layers_are_in_few_bits_and_the_rest_is_not(load_in: LoadIn, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path, hidden=128)
    full, base = load(folder, None), load(folder, load_in)
    assert (base.dtype, base.input_dtype, base.device) == (load_in, torch.bfloat16, torch.device("cpu"))
    assert base.fingerprint == full.fingerprint
    assert base.model.lm_head.weight is base.model.get_input_embeddings().weight
    assert base.model.lm_head.weight.dtype is torch.bfloat16
    layers = [full.model.model.layers, base.model.model.layers]
    of_full, of_few = map(stored_bytes, layers)
    assert of_full / of_few > {"nf4": 7, "int8": 3.8}[load_in]  # of float32, scales and norms included


def test_a_head_that_the_files_lack_stays_out_of_few_bits(load_in: LoadIn, tmp_path: Path) -> None:
    folder = write_bert_without_head(tmp_path)
    found = replace(inspect_base(LABEL, folder), load_in=load_in, task_type="SEQ_CLS")
    base = modality_of(found).load(found, device=torch.device("cpu"))
    assert base.made_up >= {"classifier.weight", "classifier.bias"}
    assert base.model.classifier.weight.dtype is torch.bfloat16
    assert not base.model.classifier.weight.any()


def test_an_adapter_that_replaces_a_packed_tensor_is_refused(load_in: LoadIn, tmp_path: Path) -> None:
    base = load(write_tiny_base(tmp_path), load_in)
    name = LLAMA.modules[0]
    module = LoraModule(name, torch.ones(1, 32), torch.ones(32, 1))
    adapter = RunnableAdapter(Adapter(LABEL, None, (name,), (module,)), values={f"{name}.weight": torch.zeros(32, 32)})
    with pytest.raises(BaseModelMismatch, match=f"loads in {load_in}"), adapted(base, adapter):
        pass


def test_dora_runs_and_leaves_the_base_model_as_it_was(load_in: LoadIn, tmp_path: Path) -> None:
    base = load(write_tiny_base(tmp_path), load_in)
    name, (ids,) = LLAMA.modules[0], base.tokenizer(["some text"], return_tensors="pt")["input_ids"]
    module = LoraModule(name, torch.ones(1, 32), torch.ones(32, 1))
    adapter = RunnableAdapter(Adapter(LABEL, None, (name,), (module,)), magnitudes={name: torch.ones(32)})
    with torch.no_grad():
        before = base.model(input_ids=ids[None]).logits
        for _ in range(2):
            with adapted(base, adapter) as model:
                assert not torch.equal(model(input_ids=ids[None]).logits, before)
            assert torch.equal(base.model(input_ids=ids[None]).logits, before)


@pytest.mark.slow
def test_loading_prints_nothing(load_in: LoadIn, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path)
    script = f"""
import torch
from dataclasses import replace
import icmlora.base_models.running.attach
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.finding.lookup import inspect_base
from pathlib import Path
base = CausalLM().load(replace(inspect_base("a", Path({str(folder)!r})), load_in={load_in!r}))
base.modality.measure(base, base.modality.probes, 64)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")


def other_kinds(folder: Path) -> Iterator[FoundBase]:
    """Yield base models of which none can be loaded in few bits."""
    yield inspect_base(LABEL, write_tiny_gguf(folder / "tiny.gguf"))
    yield FoundBase(LABEL, folder, (), loader="my_models:load")
    yield FoundBase(LABEL, folder, (), is_pipeline=True)
    config = write_tiny_base(folder / "packed") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    yield inspect_base(LABEL, folder / "packed")


def test_what_cannot_be_loaded_in_few_bits_is_refused_by_its_files(tmp_path: Path) -> None:
    for found in other_kinds(tmp_path):
        check_load_in(found)  # in full precision it can
        with pytest.raises(BaseModelUnsuited, match="cannot be loaded in nf4"):
            check_load_in(replace(found, load_in="nf4"))


def test_only_nf4_and_int8_are_known(tmp_path: Path) -> None:
    found = inspect_base(LABEL, write_tiny_base(tmp_path))
    with pytest.raises(DataError, match="a base model cannot be loaded in"):
        check_load_in(replace(found, load_in="fp4"))  # type: ignore[arg-type]


def test_without_bitsandbytes_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(inspect_base(LABEL, write_tiny_base(tmp_path)), load_in="nf4")
    monkeypatch.setattr("icmlora.base_models.finding.lookup.find_spec", lambda name: None)
    with pytest.raises(BaseModelNotFound, match="needs bitsandbytes, which is not installed") as error:
        check_load_in(found)
    assert error.value.hint == "install the extra: pip install 'icm-lora[quantized]'"


def test_a_network_without_linear_layers_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    ResNetForImageClassification(ResNetConfig(**sizes, id2label=CLASSES)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(BaseModelUnsuited, match="no layer that nf4 can quantise"):
        load(tmp_path, "nf4")
