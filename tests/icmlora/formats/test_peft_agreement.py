"""The configuration as PEFT itself reads it: patterns, ranks and scales; and what is refused where PEFT guesses."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from icmlora.errors import AdapterRefused
from icmlora.formats.peft.config import AdapterConfig
from icmlora.formats.peft.name_patterns import ModulePattern
from tests.icmlora.adapter_files import BASE, config

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 10)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
KEYS = st.sampled_from(
    [
        "q_proj",
        "v_proj",
        "self_attn.q_proj",
        "0.self_attn.q_proj",
        "layers.1.mlp.up_proj",
        "model.layers.10.self_attn.v_proj",
        "^model.layers.1.self_attn.q_proj",
        r"layers\.1\.self_attn\.v_proj",
        "proj",
        "layers",
        "...up_proj",
    ]
)
PATTERNS = st.dictionaries(KEYS, st.integers(1, 64), max_size=4)


@given(rank=st.integers(1, 64), alpha=st.integers(1, 64), ranks=PATTERNS, alphas=PATTERNS, rslora=st.booleans())
def test_rank_and_scale_of_every_module_are_those_that_peft_uses(
    rank: int, alpha: int, ranks: dict[str, int], alphas: dict[str, int], rslora: bool
) -> None:
    fields = {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    parsed = AdapterConfig.parse(config(**fields))
    for module in MODULES:
        # As in peft/tuners/lora/model.py.
        r = ranks.get(get_pattern_key(list(ranks), module), rank)
        scaling = alphas.get(get_pattern_key(list(alphas), module), alpha) / (math.sqrt(r) if rslora else r)
        assert parsed.rank_of(module) == r
        assert parsed.scale_of(module) == pytest.approx(scaling)


@given(key=st.text("q_proj.0^\\*+[]()|$", min_size=1, max_size=10))
def test_a_key_is_read_as_a_plain_name_or_not_at_all(key: str) -> None:
    pattern = ModulePattern.parse(key)
    if set(key) & set("*+[]()|$"):
        assert pattern is None
    elif pattern is not None:
        name = key.removeprefix("^").replace("\\.", ".")
        assert pattern.matches(name)
        assert pattern.matches(f"model.{name}") == (not key.startswith("^") or name.startswith("model."))


@given(prefix=st.text("ab.", max_size=6), name=st.text("ab", min_size=1, max_size=4))
def test_a_name_matches_the_end_of_a_module_only_after_a_dot(prefix: str, name: str) -> None:
    pattern = ModulePattern.parse(name)
    assert pattern is not None
    assert pattern.matches(prefix + name) == (not prefix or prefix.endswith("."))


# What PEFT writes for a plain LoRA, and values of another type in the fields that icm reads.
TYPED = {
    "r": [None, "8", 8.5, [], {}, True],
    "lora_alpha": [None, "8", [], {}, True],
    "use_rslora": ["yes", 1, [1], {"a": 1}],
    "rank_pattern": ["q_proj", 4, ["q_proj"], {"q_proj": "4"}, {"q_proj": None}, {"q_proj": 4.0}],
    "alpha_pattern": ["q_proj", 4, ["q_proj"], {"q_proj": "4"}, {"q_proj": None}, {"q_proj": [1]}],
    "base_model_name_or_path": [3, [BASE], {"name": BASE}, True],
    "revision": [3, ["main"], {"a": 1}],
    "task_type": [3, ["CAUSAL_LM"], {"a": 1}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in TYPED.items() for value in values])
def test_a_value_of_another_type_is_refused_with_its_field(field: str, value: Any) -> None:
    with pytest.raises(AdapterRefused) as caught:
        AdapterConfig.parse(config(**{field: value}))
    assert caught.value.kind == "config"
    assert field in caught.value.message


def test_every_field_of_pefts_own_default_configuration_is_accepted() -> None:
    fields = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=BASE).to_dict()
    for name, value in json.loads(json.dumps(fields, default=list)).items():
        if name not in ("peft_type", "base_model_name_or_path"):
            assert AdapterConfig.parse(config(**{name: value})).base_model == BASE, name


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(LoraConfig) if field.name.startswith("use_")]
)
def test_every_switch_that_peft_knows_is_understood_or_refused(field: str) -> None:
    if field == "use_rslora":
        assert AdapterConfig.parse(config(**{field: True})).use_rslora
    elif field == "use_dora":  # its magnitudes are extras
        assert AdapterConfig.parse(config(**{field: True})) == AdapterConfig.parse(config())
    else:
        with pytest.raises(AdapterRefused, match=field):
            AdapterConfig.parse(config(**{field: True}))


@given(
    st.dictionaries(st.from_regex(r"my_[a-z]{1,8}", fullmatch=True), st.none() | st.integers() | st.text(max_size=5))
)
def test_notes_of_other_programs_change_nothing(notes: dict[str, Any]) -> None:
    assert AdapterConfig.parse(config(**notes)) == AdapterConfig.parse(config())


@given(st.sampled_from(["use_", "{}_config"]), st.from_regex(r"[a-z]{3,10}", fullmatch=True), st.integers(1))
def test_a_switch_of_a_variant_that_is_not_known_is_refused(form: str, name: str, value: int) -> None:
    field = form.format(name) if "{}" in form else form + "new" + name
    if field in ("loftq_config", "eva_config", "corda_config"):
        return
    with pytest.raises(AdapterRefused) as caught:
        AdapterConfig.parse(config(**{field: value}))
    assert caught.value.kind in ("unknown-variant", "arrow", "kasa", "monteclora")
    assert field in caught.value.message


@given(order=st.permutations(["r", "lora_alpha", "base_model_name_or_path", "task_type", "peft_type"]))
def test_the_order_of_the_fields_does_not_matter(order: list[str]) -> None:
    fields = json.loads(config())
    turned = json.dumps({name: fields[name] for name in order}).encode()
    assert AdapterConfig.parse(turned) == AdapterConfig.parse(config())


@pytest.mark.parametrize("end", [b"", b"\n", b" \r\n\t "])
def test_space_around_the_object_does_not_matter(end: bytes) -> None:
    assert AdapterConfig.parse(end + config() + end) == AdapterConfig.parse(config())


@given(st.integers(0, 10_000))
def test_a_configuration_that_was_cut_is_refused(end: int) -> None:
    data = config()
    with pytest.raises(AdapterRefused):
        AdapterConfig.parse(data[: end % len(data)])


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_damaged_configuration_is_read_with_a_finite_scale_or_refused(at: int, junk: bytes) -> None:
    data = config(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3})
    place = at % len(data)
    try:
        parsed = AdapterConfig.parse(data[:place] + junk + data[place + len(junk) :])
    except AdapterRefused as error:
        refused = error
    else:
        assert all(math.isfinite(parsed.scale_of(module)) for module in MODULES)
        return
    assert refused.message.isprintable()
