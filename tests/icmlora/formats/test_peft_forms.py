"""A decoded PEFT adapter has the form of its original: same names, shapes, types, header and configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterBytes, LoadedAdapter, Template
from icmlora.formats.peft.peft import PEFT
from icmlora.formats.peft.tensors import rounded_like
from icmlora.io.safetensors import read_header
from tests.icmlora.adapter_files import INPUTS, OUTPUTS, Q0, V0, config, factors, key
from tests.icmlora.tiny_base import tiny_model

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def template_of(files: AdapterBytes) -> Template:
    summary = PEFT.inspect(files.config, files.weights)
    assert summary.original_only is None
    return Template(files.config, summary.layout, summary.dtype, summary.template)


def read(files: AdapterBytes) -> LoadedAdapter:
    return PEFT.read(files.config, files.weights)


def written(files: AdapterBytes, adapter: Adapter | None = None, **options: Any) -> AdapterBytes:
    """Write an adapter, or the original's own factors, in the form of an original."""
    loaded = read(files)
    options = {"like": template_of(files), "extras": loaded.extras, **options}
    return PEFT.encode(adapter or loaded.adapter, card="", metadata={"icm": "1"}, **options)


def form_of(weights: bytes) -> tuple[object, ...]:
    """Return everything of a tensor file except its values."""
    header = read_header(weights)
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors}, header.metadata


def original(
    tensors: dict[str, torch.Tensor] | None = None, *, metadata: dict[str, str] | None = None, **fields: Any
) -> AdapterBytes:
    chosen = factors() if tensors is None else tensors
    return AdapterBytes(save(chosen, {"format": "pt"} if metadata is None else metadata), config(**fields))


def conv(kernel: tuple[int, ...] = (3, 3)) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    b = (OUTPUTS, 2, *(1 for _ in kernel))
    return {
        key("features.conv", "A"): torch.randn(2, 4, *kernel, generator=random),
        key("features.conv", "B"): torch.randn(*b, generator=random),
    }


def embedding() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    return {
        f"{name}A": torch.randn(2, 50, generator=random),
        f"{name}B": torch.randn(OUTPUTS, 2, generator=random),
    }


def mixed() -> dict[str, torch.Tensor]:
    tensors = factors()
    tensors[key(V0, "A")] = tensors[key(V0, "A")].bfloat16()
    tensors[key(V0, "B")] = tensors[key(V0, "B")].double()
    return tensors


def extra_tensors() -> dict[str, torch.Tensor]:
    return {
        "base_model.model.score.weight": torch.randn(3, INPUTS).bfloat16(),
        f"base_model.model.{Q0}.lora_magnitude_vector": torch.randn(OUTPUTS),
        f"base_model.model.{Q0}.lora_B.bias": torch.randn(OUTPUTS).half(),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, INPUTS),
        "base_model.model.steps": torch.arange(3),
    }


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


FORMS: dict[str, AdapterBytes] = {
    "usual": original(),
    "rank pattern": original(factors((Q0,), 3) | factors((V0,), 2), rank_pattern={"q_proj": 3}),
    "alpha pattern": original(alpha_pattern={"q_proj": 7}),
    "rslora": original(use_rslora=True, lora_alpha=5),
    "negative alpha": original(lora_alpha=-3),
    "fraction of alpha": original(lora_alpha=0.25),
    "half": original({name: tensor.half() for name, tensor in factors().items()}),
    "bfloat16": original({name: tensor.bfloat16() for name, tensor in factors().items()}),
    "double": original({name: tensor.double() for name, tensor in factors().items()}),
    "mixed types": original(mixed()),
    "convolution": original(factors() | conv()),
    "convolution in one dimension": original(conv((5,))),
    "embedding": original(factors() | embedding()),
    "default names": original(renamed(factors(), "lora_A.weight", "lora_A.default.weight")),
    "the name of an adapter": original(renamed(factors(), ".weight", ".my-adapter.weight")),
    "hyphens": original(renamed(factors(), ".layers.", ".layers-of-experts.en-de."), rank_pattern={"en-de.0": 2}),
    "extras": original(factors() | extra_tensors(), use_dora=True, modules_to_save=["score"]),
    "other metadata": original(metadata={"format": "pt", "trainer": "mine", "note": "x" * 50}),
    "metadata in other letters": original(metadata={"note": "Grüße, 日本"}),
    "no metadata": original(metadata={}),
    "odd fields": original(my_note=[1, {"a": None}], auto_mapping={"x": "y"}, target_modules="all-linear"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_that_of_the_original_and_has_no_more_bytes(name: str) -> None:
    files = FORMS[name]
    done = written(files)
    assert done.config == files.config
    assert form_of(done.weights) == form_of(files.weights)
    assert len(done.weights) <= len(files.weights)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_names_of_a_wrapper_are_told_and_not_written_again(wrapper: str) -> None:
    clean = original(factors() | extra_tensors() | conv(), modules_to_save=["score"])
    tensors = renamed(factors() | extra_tensors() | conv(), "base_model.model.", f"base_model.model.{wrapper}.")
    wrapped = original(tensors, modules_to_save=["score"])
    assert PEFT.inspect(wrapped.config, wrapped.weights).wrapper == wrapper
    assert PEFT.inspect(clean.config, clean.weights).wrapper is None
    assert form_of(written(wrapped).weights) == form_of(clean.weights)


def test_a_name_that_may_be_the_base_models_own_is_told_and_written_again() -> None:
    files = original(renamed(factors(), "base_model.model.", "base_model.model.module."))
    assert PEFT.inspect(files.config, files.weights).wrapper == "module"
    assert form_of(written(files).weights) == form_of(files.weights)


@pytest.mark.parametrize("name", FORMS)
def test_the_factors_mean_the_same_and_extras_are_bit_equal(name: str) -> None:
    before, after = read(FORMS[name]), read(written(FORMS[name]))
    assert squared_error(before.adapter, after.adapter) < 1e-4
    assert after.extras == before.extras
    assert after.adapter.layout == before.adapter.layout


@pytest.mark.parametrize("name", FORMS)
def test_a_canonical_adapter_fits_the_form_of_its_original(name: str) -> None:
    before = read(FORMS[name]).adapter
    done = written(FORMS[name], canonicalize(before))
    assert squared_error(before, read(done).adapter) < 1e-4
    assert form_of(done.weights) == form_of(FORMS[name].weights)


@pytest.mark.parametrize("name", FORMS)
def test_an_adapter_rounded_in_memory_is_the_one_in_its_file(name: str) -> None:
    made = canonicalize(read(FORMS[name]).adapter)
    in_file = read(written(FORMS[name], made)).adapter
    rounded = rounded_like(made, template_of(FORMS[name]))
    assert rounded.layout == in_file.layout
    for one, other in zip(rounded.modules, in_file.modules, strict=True):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)


@pytest.mark.parametrize("name", ["usual", "rank pattern", "rslora", "mixed types", "embedding", "default names"])
def test_a_padded_adapter_means_the_same(name: str) -> None:
    before = read(FORMS[name]).adapter
    done = written(FORMS[name], dtype="float32", pad_rank=8)
    fields = json.loads(done.config)
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"]) == (8, 8, {})
    after = read(done).adapter
    assert {module.a.shape[0] for module in after.modules} == {8}
    assert squared_error(before, after) < 1e-9


def test_a_padded_adapter_names_the_base_model_of_its_original() -> None:
    files = original(base_model_name_or_path="mirror/model", revision="v1")
    decoded = replace(read(files).adapter, base_model="acme/model", revision=None)
    fields = json.loads(written(files, decoded, pad_rank=8).config)
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("mirror/model", "v1")


def test_a_rank_below_that_of_a_module_is_refused() -> None:
    with pytest.raises(AdapterRefused, match="rank 2 is too small") as caught:
        written(FORMS["rank pattern"], pad_rank=2)
    assert caught.value.kind == "rank"


def test_extras_have_no_place_in_the_padded_form() -> None:
    with pytest.raises(AdapterRefused, match="cannot be written") as caught:
        written(FORMS["extras"], pad_rank=8)
    assert "--pad-rank" in (caught.value.hint or "")


@pytest.mark.parametrize(("dtype", "name"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_another_number_format_changes_the_factors_and_no_extra(dtype: str, name: str) -> None:
    before = read(FORMS["extras"])
    done = written(FORMS["extras"], dtype=dtype)
    after = {tensor.name: tensor.dtype for tensor in read_header(done.weights).tensors}
    assert {after[key(module, half)] for module in (Q0, V0) for half in "AB"} == {name}
    assert read(done).extras == before.extras
    assert form_of(done.weights)[1] == form_of(FORMS["extras"].weights)[1]


def test_modules_that_an_adapter_lacks_become_zeros() -> None:
    before = read(FORMS["usual"]).adapter
    one = Adapter(before.base_model, before.task_type, before.target_modules, before.modules[:1])
    done = load(written(FORMS["usual"], one).weights)
    assert done[key(V0, "A")].count_nonzero() == done[key(V0, "B")].count_nonzero() == 0
    assert done[key(Q0, "B")].count_nonzero() > 0


def test_a_smaller_rank_is_filled_with_zeros() -> None:
    before = read(FORMS["usual"]).adapter
    first = before.modules[0]
    smaller = type(first)(first.name, first.a[:1], first.b[:, :1])
    one = Adapter(before.base_model, before.task_type, before.target_modules, (smaller,))
    done = load(written(FORMS["usual"], one).weights)
    assert done[key(Q0, "A")].shape == (2, INPUTS)
    assert done[key(Q0, "A")][1].count_nonzero() == 0


def test_a_module_of_another_adapter_is_a_bug_of_the_caller() -> None:
    other = read(original(conv())).adapter
    with pytest.raises(ValueError, match="has no module"):
        written(FORMS["usual"], other)


@pytest.mark.parametrize(
    "details",
    [
        {"names": []},
        {"names": {Q0: ["a"]}},
        {"names": {Q0: ["a", "a"]}},
        {"names": {Q0: ["a", "../b"]}},
        {"names": {Q0: [key(V0, "A"), key(V0, "B")]}},
        {"names": {Q0: ["base_model.model.score.weight", "b"]}},
        {"shapes": {key(Q0, "A"): [5]}},
        {"shapes": {key(Q0, "A"): [-1, -12]}},
        {"shapes": {key(Q0, "A"): [2.0, 6]}},
        {"shapes": {key(Q0, "A"): 12}},
        {"dtypes": {key(Q0, "A"): "I8"}},
        {"dtypes": {key(Q0, "A"): ["F32"]}},
        {"dtype": "F8_E4M3"},
        {"dtype": None},
        {"metadata": {"a": 1}},
        {"metadata": "pt"},
        {"more": 1},
    ],
    ids=json.dumps,
)
def test_a_template_that_does_not_fit_is_refused(details: dict[str, Any]) -> None:
    files = FORMS["extras"]
    like = replace(template_of(files), details=json.dumps(details))
    with pytest.raises(AdapterRefused) as caught:
        written(files, like=like)
    assert caught.value.kind == "template"


@pytest.mark.parametrize("details", ["[]", "{", '{"a":NaN}', '{"dtype":"F32","dtype":"F16"}'])
def test_a_template_that_is_not_an_object_is_refused(details: str) -> None:
    with pytest.raises(AdapterRefused):
        written(FORMS["usual"], like=replace(template_of(FORMS["usual"]), details=details))


@given(
    rank=st.integers(1, 5),
    alpha=st.integers(-8, 32).filter(bool) | st.floats(0.1, 8),
    rslora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(["q_proj", "v_proj", Q0]), st.integers(1, 5), max_size=2),
    alphas=st.dictionaries(st.sampled_from(["q_proj", "self_attn.v_proj"]), st.integers(1, 16), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_plain_configuration_comes_back(
    rank: int, alpha: float, rslora: bool, ranks: dict[str, int], alphas: dict[str, int], dtype: torch.dtype
) -> None:
    of_q = next((ranks[name] for name in ranks if name in ("q_proj", Q0)), rank)
    tensors = factors((Q0,), of_q) | factors((V0,), ranks.get("v_proj", rank), seed=1)
    fields = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": ranks, "alpha_pattern": alphas}
    files = original({name: tensor.to(dtype) for name, tensor in tensors.items()}, **fields)
    done = written(files)
    assert (done.config, form_of(done.weights)) == (files.config, form_of(files.weights))
    assert len(done.weights) <= len(files.weights)
    assert squared_error(read(files).adapter, read(done).adapter) < 1e-3


PEFT_MADE: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"bias": "lora_only", "lora_bias": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"trainable_token_indices": {"embed_tokens": [0, 3]}},
]
IDS = torch.arange(1, 20)[None]


def by_peft(folder: Path, **fields: Any) -> tuple[AdapterBytes, torch.Tensor]:
    """Write a random adapter with PEFT; return its files and the logits of the model that has it."""
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(**{**plain, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(std=0.2)
        model.peft_config["default"].base_model_name_or_path = "tiny/llama"
        model.save_pretrained(str(folder), save_embedding_layers=False)
        logits = torch.as_tensor(model.eval()(IDS).logits)
    content = [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]
    return AdapterBytes(*content), logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fields", PEFT_MADE, ids=lambda fields: ",".join(fields) or "plain")
def test_peft_makes_the_same_of_what_was_taken_apart_and_written_again(tmp_path: Path, fields: dict[str, Any]) -> None:
    files, before = by_peft(tmp_path / "in", **fields)
    done = written(files)
    assert form_of(done.weights) == form_of(files.weights)
    assert len(done.weights) == len(files.weights)
    (tmp_path / "out").mkdir()
    for name, data in PEFT.lay_out(done, "").items():
        (tmp_path / "out" / name).write_bytes(data)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(tiny_model(), tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(torch.as_tensor(logits), before, rtol=1e-4, atol=1e-5)
