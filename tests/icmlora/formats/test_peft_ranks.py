"""PEFT folders whose modules have ranks of their own: what is written, and what PEFT makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.resize import RankedSlots
from icmlora.formats.format import AdapterBytes, Template
from icmlora.formats.peft.peft import PEFT
from tests.icmlora.adapter_files import Q0, V0, adapter, config, factors, key, weights
from tests.icmlora.formats.test_peft_experts import BOTH, Convolutions, made_by_peft, read as read_files
from tests.icmlora.formats.test_peft_forms import FORMS, PEFT_MADE, by_peft, conv, original
from tests.icmlora.tiny_base import tiny_model

# PEFT asks transformers for a property by its old name, and warns of the embeddings that it saves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
IDS = torch.arange(1, 20)[None]


def cut(files: AdapterBytes, share: float = 0.5, dtype: str | None = "float32") -> tuple[AdapterBytes, float]:
    """Write an adapter with a part of its slots; return its files and the squared error that it has in memory."""
    loaded, summary = PEFT.read(files.config, files.weights), PEFT.inspect(files.config, files.weights)
    slots = RankedSlots.of(loaded.adapter)
    small = slots.first(round(share * len(slots.order)))
    like = Template(files.config, small.layout, summary.dtype, summary.template)
    made = PEFT.encode(small, card="", metadata={}, like=like, dtype=dtype, extras=loaded.extras)
    return made, squared_error(loaded.adapter, small)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_every_form_takes_other_ranks(name: str, share: float) -> None:
    files = FORMS[name]
    made, error = cut(files, share)
    before, after = (PEFT.read(one.config, one.weights) for one in (files, made))
    assert squared_error(before.adapter, after.adapter) == pytest.approx(error, abs=1e-9)
    assert after.extras == before.extras
    assert len(load(made.weights)) == len(load(files.weights))


def test_nothing_but_ranks_and_scales_changes_in_the_configuration() -> None:
    files = original(my_note=[1, {"a": None}], use_rslora=True, lora_alpha=5, modules_to_save=["Grüße"])
    before, after = (json.loads(one.config) for one in (files, cut(files)[0]))
    changed = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    assert {name: value for name, value in after.items() if name not in changed} == {
        name: value for name, value in before.items() if name not in changed
    }


def test_one_rank_for_all_modules_needs_no_patterns() -> None:
    fields = json.loads(cut(original(factors(rank=4), r=4, lora_alpha=8), 0.0)[0].config)
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"], fields["alpha_pattern"]) == (1, 2, {}, {})


def test_a_pattern_is_for_one_module_only_though_another_name_ends_with_it() -> None:
    inner, outer = "layers.0.q_proj", "model.layers.0.q_proj"
    tensors = factors((inner, "layers.1.q_proj"), 3) | factors((outer,), 1, seed=1)
    source = PEFT.read(
        config(rank_pattern={"^layers.0.q_proj": 3, "layers.1.q_proj": 3, "q_proj": 1}), weights(tensors)
    )
    form = Template(config(), source.adapter.layout, "F32")
    made = PEFT.encode(source.adapter, card="", metadata={}, like=form)
    assert PEFT.inspect(made.config, made.weights).layout == source.adapter.layout


@pytest.mark.parametrize("fields", PEFT_MADE, ids=lambda fields: ",".join(fields) or "plain")
def test_peft_computes_with_the_cut_adapter_what_icm_does(tmp_path: Path, fields: dict[str, Any]) -> None:
    """The logits are those of the same dW at the full rank, filled with zeros."""
    files, _ = by_peft(tmp_path / "in", **fields)
    loaded, summary = PEFT.read(files.config, files.weights), PEFT.inspect(files.config, files.weights)
    several = (cut(files, share)[0] for share in (0.3, 0.4, 0.5, 0.6))
    made = next(one for one in several if json.loads(one.config)["rank_pattern"])
    like = Template(files.config, summary.layout, summary.dtype, summary.template)
    small = PEFT.read(made.config, made.weights).adapter
    padded = PEFT.encode(small, card="", metadata={}, like=like, dtype="float32", extras=loaded.extras)
    logits = []
    for name, one in (("padded", padded), ("cut", made)):
        (tmp_path / name).mkdir()
        for file, data in PEFT.lay_out(one, "").items():
            (tmp_path / name / file).write_bytes(data)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(tiny_model(), tmp_path / name).eval()(IDS).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_a_convolution_keeps_its_kernel() -> None:
    made, _ = cut(original(conv()), 0.0)
    before, after = load(original(conv()).weights), load(made.weights)
    assert {name: (1, *tensor.shape[1:]) for name, tensor in before.items() if "lora_A" in name} == {
        name: tuple(tensor.shape) for name, tensor in after.items() if "lora_A" in name
    }


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("what", ["experts", "experts with patterns", "groups"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_parts_of_one_tensor_get_the_largest_rank_of_them(tmp_path: Path, what: str, share: float) -> None:
    if what == "groups":
        torch.manual_seed(2)
        model = get_peft_model(Convolutions(), LoraConfig(r=4, lora_alpha=2, target_modules=["grouped", "plain"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape)
        model.save_pretrained(tmp_path)
    else:
        patterns = {"rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 6}}
        made_by_peft(tmp_path, **BOTH, **(patterns if what.endswith("patterns") else {}))
    files = AdapterBytes(*reversed(read_files(tmp_path)))
    made, error = cut(files, share)
    assert PEFT.inspect(made.config, made.weights).original_only is None
    before, after = (PEFT.read(one.config, one.weights).adapter for one in (files, made))
    assert squared_error(before, after) == pytest.approx(error, abs=1e-9)
    assert len(made.weights) <= len(files.weights)


@given(
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    alpha=st.integers(1, 32) | st.floats(0.1, 8),
    rslora=st.booleans(),
    own=st.dictionaries(st.sampled_from(["q_proj", V0, r".*\.v_proj"]), st.integers(1, 16), max_size=2),
)
def test_any_scale_stays(ranks: tuple[int, int], alpha: float, rslora: bool, own: dict[str, int]) -> None:
    tensors = factors((Q0,), 5) | factors((V0,), 5, seed=1)
    files = original(tensors, r=5, lora_alpha=alpha, use_rslora=rslora, alpha_pattern=own)
    source = PEFT.read(files.config, files.weights).adapter
    modules = [(one.name, one.a[:rank], one.b[:, :rank]) for one, rank in zip(source.modules, ranks, strict=True)]
    small = replace(adapter(*modules), base_model=source.base_model)
    made = PEFT.encode(small, card="", metadata={}, like=Template(files.config, small.layout, "F32"))
    assert PEFT.inspect(made.config, made.weights).layout == small.layout
    assert squared_error(small, PEFT.read(made.config, made.weights).adapter) < 1e-12
    assert torch.allclose(load(made.weights)[key(Q0, "B")], tensors[key(Q0, "B")][:, : ranks[0]], rtol=1e-5)
