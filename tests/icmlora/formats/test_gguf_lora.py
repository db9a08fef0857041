"""Adapters for llama.cpp: what the file says, that it computes what PEFT computes, and what is refused.

That llama.cpp itself agrees is shown by `tests/benchmarks/llama_cpp.py`, which needs it to be installed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.base_models.finding.lookup import read_config
from icmlora.base_models.load import load_gguf
from icmlora.errors import AdapterRefused, BaseModelMismatch, BaseModelUnsuited, DataError
from icmlora.formats.format import RunnableAdapter
from icmlora.formats.pairs.gguf import GgufFormat, architecture_of
from icmlora.formats.pairs.gguf_lora import GgufBase, encode_gguf, with_base_names
from icmlora.formats.peft.peft import PEFT
from tests.benchmarks.llama_cpp.tiny_models import MODELS, adapted, write_model
from tests.icmlora import adapter_files as make
from tests.icmlora.base_models.test_gguf import write_tiny_gguf
from tests.icmlora.tiny_base import tiny_model, write_tiny_base

TINY = GgufBase("llama", 2, heads=(4, 2))
PLAIN = GgufBase("qwen2", 2)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "llama_cpp_architectures.json"
KINDS = ("q_proj", "k_proj", "v_proj")


def read(data: bytes, folder: Path) -> gguf.GGUFReader:
    """Open the bytes of a file as other programs do."""
    path = folder / f"{hashlib.sha256(data).hexdigest()}.gguf"  # a reader maps the file, which must not change then
    path.write_bytes(data)
    return gguf.GGUFReader(path)


def facts(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Return the keys of a header that are about the adapter."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def values(tensor: Any) -> torch.Tensor:
    """Return a tensor of a file as float32."""
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def updates(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """Return what llama.cpp adds to each weight: alpha / r * B @ A, with the r of each module."""
    alpha = facts(reader)["adapter.lora.alpha"]
    tensors = {tensor.name: values(tensor) for tensor in reader.tensors}
    names = sorted({name.rpartition(".")[0] for name in tensors})
    pairs = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}
    return {name: alpha / len(a) * b @ a for name, (a, b) in pairs.items()}


def in_order(update: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a query or key projection into the order of transformers: halves of a head, not pairs."""
    half = len(update) // heads // 2
    places = [(2 * head + part) * half + row for head in range(heads) for row in range(half) for part in (0, 1)]
    ordered = torch.empty_like(update)
    ordered[places] = update
    return ordered


def runnable(*modules: tuple[str, torch.Tensor, torch.Tensor]) -> RunnableAdapter:
    return RunnableAdapter(make.adapter(*modules))


def module(name: str, outputs: int = 8, inputs: int = 6, rank: int = 2) -> tuple[str, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(outputs * 100 + rank)
    return name, torch.randn(rank, inputs, generator=random), torch.randn(outputs, rank, generator=random)


def encoded(adapter: RunnableAdapter, base: GgufBase = TINY, **options: Any) -> bytes:
    return encode_gguf(adapter, base, metadata={}, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT wrote: all linear layers, several ranks and alphas, rsLoRA."""
    place = tmp_path_factory.mktemp("peft")
    torch.manual_seed(3)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=ALL,
        use_rslora=True,
        rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 8},
        alpha_pattern={"v_proj": 1},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_model(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def saved(folder: Path) -> RunnableAdapter:
    """The same adapter, read."""
    files = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    return PEFT.runnable(*(file.read_bytes() for file in files))


def test_added_to_a_gguf_model_it_gives_the_weights_that_peft_merges(
    folder: Path, saved: RunnableAdapter, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf")
    weights = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}  # changes go to the file
    for name, update in updates(read(encoded(saved), tmp_path)).items():
        weights[name].data[:] += update.numpy()
        weights[name].data.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, _ = load_gguf(path, torch.float32)  # transformers puts the rows back into its own order
        theirs = PeftModel.from_pretrained(tiny_model(), folder).merge_and_unload()
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert len(wanted) > 2 * len(ALL)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)


def test_the_header_says_what_llama_cpp_asks_for(saved: RunnableAdapter, tmp_path: Path) -> None:
    adapter = replace(saved, adapter=replace(saved.adapter, base_model="org/model"))
    found = facts(read(encode_gguf(adapter, TINY, task="poems", metadata={"icm.rung": "code"}), tmp_path))
    assert found == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "poems",
        "general.base_model.count": 1,
        "general.base_model.0.name": "org/model",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "adapter.lora.task_name": "poems",
        "icm.rung": "code",
    }


def test_factors_are_named_as_their_weight_and_have_its_widths(saved: RunnableAdapter, tmp_path: Path) -> None:
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in read(encoded(saved), tmp_path).tensors}
    assert len(shapes) == 2 * 2 * len(ALL)
    assert shapes["blk.0.attn_q.weight.lora_a"] == (3, 32)
    assert shapes["blk.0.attn_k.weight.lora_b"] == (16, 4)
    assert shapes["blk.1.ffn_down.weight.lora_a"] == (8, 64)


@pytest.mark.one_case
@pytest.mark.parametrize("base", [TINY, PLAIN], ids=lambda base: base.architecture)
@given(data=st.data())
def test_any_ranks_and_heads_survive_the_way(
    base: GgufBase, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    half = data.draw(st.integers(1, 3))  # of a head
    ranks = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
    outputs = [2 * half * heads[0], 2 * half * heads[1], 5]
    names = [f"model.layers.{layer}.self_attn.{kind}" for layer, kind in zip((0, 1, 1), KINDS, strict=True)]
    adapter = make.adapter(
        *(module(name, *shape) for name, *shape in zip(names, outputs, (6, 6, 6), ranks, strict=True))
    )
    base = replace(base, heads=base.heads and heads)
    reader = read(encoded(RunnableAdapter(adapter), base), tmp_path_factory.mktemp("gguf"))
    for made in adapter.modules:
        layer, kind = made.name.split(".")[2], made.name.rpartition(".")[2]
        found = updates(reader)[f"blk.{layer}.attn_{kind[0]}.weight"]
        if base.heads is not None and kind != "v_proj":
            found = in_order(found, heads[0] if kind == "q_proj" else heads[1])
        torch.testing.assert_close(found, made.b @ made.a, rtol=1e-5, atol=1e-5)


@pytest.mark.one_case
@pytest.mark.parametrize("name", list(MODELS))
def test_names_and_rows_come_back_from_llama_cpps_to_those_of_transformers(name: str, tmp_path: Path) -> None:
    adapted(write_model(name, tmp_path / "base"), tmp_path / "peft")
    files = tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / "adapter_model.safetensors"
    adapter = PEFT.runnable(*(file.read_bytes() for file in files))
    base = GgufBase.of_config(read_config(tmp_path / "base"))
    data = encoded(adapter, base)
    back = with_base_names(GgufFormat().read(b"", data).adapter, architecture_of(data), base)
    wanted = {module.name: module.b @ module.a for module in adapter.adapter.modules}
    assert {module.name for module in back.adapter.modules} == wanted.keys()
    for module in back.adapter.modules:
        torch.testing.assert_close(module.b @ module.a, wanted[module.name])


def read_back(*modules: tuple[str, torch.Tensor, torch.Tensor], architecture: str = "llama") -> RunnableAdapter:
    return with_base_names(make.adapter(*modules), architecture, TINY)


def test_an_adapter_of_another_architecture_does_not_fit_the_base_model() -> None:
    with pytest.raises(BaseModelMismatch, match="the adapter is for 'qwen2', but its base model is 'llama'"):
        read_back(module("blk.0.attn_v"), architecture="qwen2")


@pytest.mark.parametrize("name", ["token_embd", "output", "blk.2.attn_v", "blk.0.ffn_up_exps.0", "blk.0.attn_rot"])
def test_a_module_that_transformers_calls_nobody_knows_what_is_refused_by_name(name: str) -> None:
    with pytest.raises(AdapterRefused, match=f"{name}: icm does not know the transformers name of this") as error:
        read_back(module("blk.0.attn_v"), module(name))
    assert error.value.kind == "layers"


@pytest.mark.parametrize("name", ["blk.0.attn_q", "blk.0.attn_k"])
def test_heads_that_do_not_divide_the_rows_of_a_gguf_adapter_are_a_mismatch(name: str) -> None:
    with pytest.raises(BaseModelMismatch, match="has 10 outputs, which do not divide into"):
        read_back(module(name, outputs=10))


def test_the_same_adapter_gives_the_same_bytes(saved: RunnableAdapter) -> None:
    again = replace(saved, adapter=replace(saved.adapter, modules=saved.adapter.modules[::-1]))
    assert encoded(saved) == encoded(again)


@pytest.mark.parametrize(("dtype", "kind", "error"), [("bfloat16", "BF16", 1e-2), ("float16", "F16", 1e-3)])
def test_a_smaller_number_format_is_rounded_to(
    saved: RunnableAdapter, tmp_path: Path, dtype: str, kind: str, error: float
) -> None:
    reader = read(encoded(saved, dtype=dtype), tmp_path)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {kind}
    exact = updates(read(encoded(saved), tmp_path))
    rounded = updates(reader)
    assert all(0 < (rounded[name] - exact[name]).norm() / exact[name].norm() < error for name in exact)


def test_a_number_that_the_format_cannot_hold_is_refused() -> None:
    name, a, b = module("model.layers.0.self_attn.v_proj")
    with pytest.raises(AdapterRefused, match=r"blk.0.attn_v.weight.lora_b contains a value that F16 cannot represent"):
        encoded(runnable((name, a, 1e6 * b)), dtype="float16")


def test_an_unknown_number_format_is_refused(saved: RunnableAdapter) -> None:
    with pytest.raises(DataError, match="unknown number format 'q8_0'"):
        encoded(saved, dtype="q8_0")


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.embed_tokens",
        "model.layers.2.self_attn.q_proj",  # the base has two layers
        "model.layers.0.mlp.experts.3.gate_proj",
        "transformer.encoder.block.0.attn",
        "model.vision_tower.layers.0.self_attn.q_proj",
        "\x1b[2Jmodel",
    ],
)
def test_a_module_without_a_place_is_refused_by_name(name: str) -> None:
    with pytest.raises(AdapterRefused, match="a GGUF adapter for llama cannot hold this module") as error:
        encoded(runnable(module("model.layers.0.self_attn.v_proj"), module(name)))
    assert error.value.kind == "layers"
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_model_of_a_larger_model_has_the_names_that_it_has_alone(prefix: str, tmp_path: Path) -> None:
    base = replace(PLAIN, architecture="gemma3")
    reader = read(encoded(runnable(module(f"{prefix}layers.1.self_attn.q_proj")), base), tmp_path)
    assert [tensor.name for tensor in reader.tensors] == ["blk.1.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b"]


def test_two_modules_of_one_place_are_refused() -> None:
    twins = module("model.layers.0.self_attn.v_proj"), module("language_model.model.layers.0.self_attn.v_proj")
    with pytest.raises(AdapterRefused, match=r"two modules would both be blk\.0\.attn_v\.weight"):
        encoded(runnable(*twins))


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_heads_that_do_not_divide_the_rows_are_a_mismatch(name: str) -> None:
    with pytest.raises(BaseModelMismatch, match="has 10 outputs, which do not divide into"):
        encoded(runnable(module(f"model.layers.0.self_attn.{name}", outputs=10)))


@pytest.mark.parametrize(
    ("part", "fact"),
    [
        ({"values": {"score.weight": torch.ones(2)}}, "the whole tensor score.weight"),
        ({"rows": {"model.embed_tokens": ([1], torch.ones(1, 2))}}, "single rows of model.embed_tokens"),
        ({"magnitudes": {make.V0: torch.ones(5)}}, "DoRA magnitudes"),
        ({"biases": {make.V0: torch.ones(5)}}, "biases of LoRA's B"),
    ],
)
def test_what_is_not_a_lora_factor_is_refused_and_never_dropped(part: dict[str, Any], fact: str) -> None:
    with pytest.raises(AdapterRefused, match=f"holds only LoRA factors, but this one also has {fact}") as error:
        encoded(replace(runnable(module(make.V0)), **part))
    assert error.value.kind == "extras"


def config(**fields: object) -> dict[str, object]:
    plain = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**plain, "num_key_value_heads": 2, **fields}


def test_a_configuration_and_a_gguf_file_of_one_model_say_the_same(tmp_path: Path) -> None:
    from_file = GgufBase.of_file(write_tiny_gguf(tmp_path / "model.gguf"))
    from_folder = GgufBase.of_config(read_config(write_tiny_base(tmp_path / "base")))
    assert from_file == from_folder == GgufBase.of_config(config()) == TINY


@pytest.mark.parametrize("left_out", [{}, {"num_key_value_heads": None}])
def test_without_a_count_of_key_heads_there_are_as_many_as_of_queries(left_out: dict[str, object]) -> None:
    fields = {name: value for name, value in config().items() if name != "num_key_value_heads"}
    assert GgufBase.of_config({**fields, **left_out}).heads == (4, 4)


def test_the_counts_of_a_text_model_are_in_its_own_configuration() -> None:
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "num_hidden_layers": 99}
    assert GgufBase.of_config({**outer, "text_config": {"num_hidden_layers": 2}}) == GgufBase("gemma3", 2)


@pytest.mark.parametrize("named", [["GPT2LMHeadModel"], [], None, "LlamaForCausalLM", [["x"]], ["\x1b[2J"]])
def test_an_architecture_that_is_not_written_is_refused_with_those_that_are(named: object) -> None:
    with pytest.raises(BaseModelUnsuited, match="cannot write GGUF adapters") as error:
        GgufBase.of_config(config(architectures=named))
    assert "LlamaForCausalLM" in (error.value.hint or "")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads"])
@pytest.mark.parametrize("value", [0, -1, "4", True, 10**9, [4, 4], 2.0])
def test_a_count_that_is_none_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(BaseModelUnsuited, match=f"the base model's {key} is"):
        GgufBase.of_config(config(**{key: value}))


def test_every_architecture_was_run_with_llama_cpp() -> None:
    with pytest.raises(BaseModelUnsuited) as error:
        GgufBase.of_config({})
    written = set((error.value.hint or "").removeprefix("supported architectures: ").split(", "))
    ran = json.loads(RESULTS.read_text())["architectures"]
    assert written == ran.keys()
    assert all(found["adapter_equal"] and found["adapter_changes"] for found in ran.values())


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"not one" * 9])
def test_a_file_that_is_not_gguf_is_no_base(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BaseModelUnsuited, match="the GGUF file cannot be read"):
        GgufBase.of_file(path)


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_tensor("x", np.zeros(4, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(BaseModelUnsuited, match="'gpt2'"):
        GgufBase.of_file(tmp_path / "model.gguf")


def test_nothing_is_lost_with_one_rank_for_all(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    adapter = runnable(*(module(name) for name in names))
    found = updates(read(encoded(adapter), tmp_path))
    made: Adapter = make.adapter(
        *((name, torch.eye(6), found[f"blk.{layer}.ffn_up.weight"]) for layer, name in enumerate(names))
    )
    assert squared_error(adapter.adapter, made) < 1e-12
