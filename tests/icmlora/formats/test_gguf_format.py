"""GGUF adapters: what llama.cpp would add to the weights, their form, and what is refused or kept as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.metrics import squared_error
from icmlora.errors import AdapterRefused
from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.format import Template
from icmlora.formats.pairs.gguf import GgufFormat, architecture_of
from icmlora.formats.pairs.gguf_file import read_gguf
from tests.icmlora.formats.llama_files import DOWN1, LABEL, Q0, gguf_file, random_tensors
from tests.icmlora.formats.test_gguf_lora import facts, read, updates

GGUF = GgufFormat()
HUB = "https://huggingface.co/"


def template(data: bytes) -> Template:
    summary = GGUF.inspect(b"", data)
    assert summary.original_only is None
    return Template(b"", summary.layout, summary.dtype, summary.template)


def again(data: bytes, **options: Any) -> bytes:
    """Read an adapter and write it in its own form."""
    loaded = GGUF.read(b"", data)
    like = template(data)
    return GGUF.encode(loaded.adapter, card="", metadata={}, like=like, extras=loaded.extras, **options).weights


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 2.0), (1.0, 0.5), (0.0, 1.0), (None, 1.0)])
def test_the_update_is_what_llama_cpp_adds(alpha: float | None, scale: float) -> None:
    tensors = random_tensors(rank=2)
    modules = {one.name: one.b @ one.a for one in GGUF.read(b"", gguf_file(tensors, alpha=alpha)).adapter.modules}
    assert modules.keys() == {Q0, DOWN1}
    for name, update in modules.items():
        a, b = (tensors[f"{name}.weight.lora_{half}"] for half in "ab")
        torch.testing.assert_close(update, scale * b @ a)


def test_the_rank_of_each_module_counts(tmp_path: Path) -> None:
    tensors = random_tensors(rank=2) | {f"{DOWN1}.weight.lora_a": torch.randn(5, 8)}
    data = gguf_file(tensors | {f"{DOWN1}.weight.lora_b": torch.randn(6, 5)})
    wanted = updates(read(data, tmp_path))
    for module in GGUF.read(b"", data).adapter.modules:
        torch.testing.assert_close(module.b @ module.a, wanted[f"{module.name}.weight"])


def test_an_embedding_has_its_rows_as_input() -> None:
    tensors = {"token_embd.weight.lora_a": torch.randn(20, 2), "token_embd.weight.lora_b": torch.randn(8, 2)}
    data = gguf_file(tensors, alpha=2.0)
    (module,) = GGUF.read(b"", data).adapter.modules
    assert module.shape == ("token_embd", 2, 20, 8)
    torch.testing.assert_close(module.b @ module.a, tensors["token_embd.weight.lora_b"] @ module.a)
    assert again(data) == data


def test_experts_are_modules_of_their_own_and_are_joined_again() -> None:
    name = "blk.0.ffn_up_exps.weight"
    tensors = {f"{name}.lora_a": torch.randn(3, 2, 8), f"{name}.lora_b": torch.randn(3, 6, 2)}
    data = gguf_file(tensors, alpha=2.0)
    modules = {one.name: one for one in GGUF.read(b"", data).adapter.modules}
    assert list(modules) == [f"blk.0.ffn_up_exps.{expert}" for expert in range(3)]
    for expert in range(3):
        module = modules[f"blk.0.ffn_up_exps.{expert}"]
        torch.testing.assert_close(
            module.b @ module.a, tensors[f"{name}.lora_b"][expert] @ tensors[f"{name}.lora_a"][expert]
        )
    assert again(data) == data


def test_a_summary_says_what_llama_cpp_is_told() -> None:
    summary = GGUF.inspect(b"", gguf_file())
    assert (summary.base_model, summary.task_type, summary.rank_max, summary.dtype) == (LABEL, "CAUSAL_LM", 2, "F32")
    assert [shape.module for shape in summary.layout] == [Q0, DOWN1]
    assert architecture_of(gguf_file(architecture="qwen2")) == "qwen2"


@pytest.mark.parametrize(
    ("address", "label"),
    [
        (HUB + "org/model", "org/model"),
        (HUB + "org/model/", "org/model"),
        (HUB + "/models/llama", "/models/llama"),
        ("https://example.org/a/b", LABEL),
        (HUB + "org/model/tree/main?x=\x1b", LABEL),
    ],
)
def test_the_address_of_the_base_model_counts_before_its_name(address: str, label: str) -> None:
    data = gguf_file(general__base_model__0__repo_url=address)
    assert GGUF.inspect(b"", data).base_model == label


def test_without_a_base_model_there_is_no_label() -> None:
    assert GGUF.inspect(b"", gguf_file(base="")).base_model is None


@given(rank=st.integers(1, 6), seed=st.integers(0, 3), alpha=st.sampled_from([None, 0.0, 1.0, 2.0, 8.0]))
def test_an_adapter_in_its_own_form_has_the_same_keys_and_values(rank: int, seed: int, alpha: float | None) -> None:
    data = gguf_file(random_tensors(rank, seed), alpha=alpha, general__license="mit")
    written = again(data)
    assert read_gguf(written).values == read_gguf(data).values
    assert squared_error(GGUF.read(b"", data).adapter, GGUF.read(b"", written).adapter) < 1e-12


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_the_type_of_each_tensor_stays(kind: str) -> None:
    data = gguf_file(kind=gguf.GGMLQuantizationType[kind])
    assert again(data) == data
    assert {tensor.dtype for tensor in read_gguf(again(data, dtype="float32")).tensors} == {"F32"}


def test_one_rank_for_all_modules_has_the_scale_in_its_factors(tmp_path: Path) -> None:
    data = gguf_file(alpha=8.0)
    padded = again(data, pad_rank=5)
    assert facts(read(padded, tmp_path))["adapter.lora.alpha"] == 5.0
    assert {tensor.shape[-2] for tensor in read_gguf(padded).tensors if tensor.name.endswith("lora_a")} == {5}
    for name, update in updates(read(data, tmp_path)).items():
        torch.testing.assert_close(updates(read(padded, tmp_path))[name], update)
    with pytest.raises(AdapterRefused, match="rank 1 is too small"):
        again(data, pad_rank=1)


def test_tensors_that_llama_cpp_passes_over_are_kept_exactly() -> None:
    data = gguf_file(random_tensors(**{"blk.0.attn_norm.weight": (8,)}))
    assert [extra.name for extra in GGUF.inspect(b"", data).extras] == ["blk.0.attn_norm.weight"]
    assert [one.name for one in read_gguf(again(data)).tensors][-1] == "blk.0.attn_norm.weight"


def test_no_code_holds_a_quantised_adapter() -> None:
    tensors = {f"{Q0}.weight.lora_a": torch.randn(2, 64), f"{Q0}.weight.lora_b": torch.randn(64, 32)}
    tensors[f"{Q0}.weight.lora_a"] = torch.randn(32, 64)
    summary = GGUF.inspect(b"", gguf_file(tensors, kind=gguf.GGMLQuantizationType.Q8_0))
    assert summary.original_only == "it holds tensors of the type Q8_0, which icm does not decode"
    assert (summary.layout, summary.parameters) == ((), 2 * 32 * 64)


def test_an_adapter_that_does_nothing_is_named_as_such() -> None:
    dead = {name: 0 * tensor if name.endswith("b") else tensor for name, tensor in random_tensors().items()}
    assert GGUF.inspect(b"", gguf_file(dead)).does_nothing
    summary = GGUF.inspect(b"", gguf_file({"x_norm.weight": torch.ones(3)}))
    assert (summary.original_only, summary.does_nothing) == ("does nothing: it holds no LoRA factors", False)


def without(half: str) -> bytes:
    return gguf_file({name: tensor for name, tensor in random_tensors().items() if name != f"{Q0}.weight.{half}"})


def turned() -> bytes:
    return gguf_file({name: tensor.T.contiguous() for name, tensor in random_tensors().items()})


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (without("lora_a"), "missing-half"),
        (without("lora_b"), "missing-half"),
        (turned(), "shape"),
        (gguf_file(random_tensors(**{"blk.0.attn_k.weight.lora_m": (8,)})), "unknown-tensor"),
        (gguf_file(random_tensors(**{"blk.0.attn_k.lora_a": (2, 8), "blk.0.attn_k.lora_b": (6, 2)})), "unknown-tensor"),
        (gguf_file(alpha=float("nan")), "config"),
        (gguf_file(alpha=float("inf")), "config"),
        (gguf_file(general_type="model"), "gguf"),
        (gguf_file()[:-100], "damaged"),
        (gguf_file().replace(b"general.architecture", b"general.architectuur"), "damaged"),
        # A header that names two base models: llama.cpp would believe one of them.
        (gguf_file(general__architectura="qwen2").replace(b"architectura", b"architecture"), "duplicate-key"),
    ],
    ids=["no-a", "no-b", "turned", "other-half", "no-weight", "nan", "inf", "model", "cut", "no-base", "two-bases"],
)
def test_what_llama_cpp_would_not_load_is_refused(data: bytes, kind: str) -> None:
    with pytest.raises(AdapterRefused) as error:
        GGUF.inspect(b"", data, path="some/file")
    assert (error.value.kind, error.value.path) == (kind, "some/file")


def test_turned_factors_of_square_layers_are_refused_too() -> None:
    tensors = {f"{Q0}.weight.lora_a": torch.randn(8, 2), f"{Q0}.weight.lora_b": torch.randn(2, 8)}
    with pytest.raises(AdapterRefused, match="would have rank 8, which is above both widths"):
        GGUF.inspect(b"", gguf_file(tensors))


def test_another_kind_of_adapter_is_kept_as_it_is() -> None:
    assert GGUF.inspect(b"", gguf_file(adapter__type="control")).original_only == "adapter.type is 'control', not lora"


def test_it_cannot_be_run_without_its_base_model() -> None:
    with pytest.raises(AdapterRefused, match="icm cannot run it") as error:
        GGUF.runnable(b"", gguf_file())
    assert (error.value.kind, "--format peft" in (error.value.hint or "")) == ("cannot-run", True)


@pytest.mark.parametrize(
    "details", ["", "{}", '{"header": 3}', '{"header": "!"}', '{"header": "AAAA"}', '{"experts": 1}']
)
def test_a_form_that_was_not_noted_by_icm_is_refused(details: str) -> None:
    data = gguf_file()
    with pytest.raises(AdapterRefused):
        GGUF.encode(GGUF.read(b"", data).adapter, card="", metadata={}, like=replace(template(data), details=details))


def test_whole_models_and_other_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "poems.gguf").write_bytes(gguf_file())
    (tmp_path / "model.gguf").write_bytes(gguf_file(general_type="model"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    (tmp_path / ".gguf").write_bytes(gguf_file())
    found = find_adapters([tmp_path])
    assert ([task.name for task in found.tasks], found.refused) == (["poems"], ())
