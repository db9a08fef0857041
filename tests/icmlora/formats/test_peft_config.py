"""adapter_config.json: the scale, and everything of which there can be no code, by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, strategies as st
from peft import LoraConfig

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.format import ConfigFacts
from icmlora.formats.peft.config import MAX_CONFIG_BYTES, AdapterConfig, read_facts, stated_rank, stated_targets
from tests.icmlora.adapter_files import BASE, Q0, V0, config


def parse(**fields: Any) -> AdapterConfig:
    return AdapterConfig.parse(config(**fields))


def refusal(**fields: Any) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        parse(**fields)
    return caught.value


def test_the_fields_that_matter_are_read() -> None:
    parsed = parse(r=4, lora_alpha=16, revision="abc")
    assert (parsed.base_model, parsed.revision, parsed.task_type) == (BASE, "abc", "CAUSAL_LM")
    assert (parsed.rank, parsed.alpha) == (4, 16.0)


def test_what_peft_writes_is_accepted(tmp_path: Any) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=BASE).save_pretrained(tmp_path)
    assert AdapterConfig.parse((tmp_path / "adapter_config.json").read_bytes()).rank == 4


def test_the_scale_is_alpha_over_rank() -> None:
    assert parse(r=8, lora_alpha=16).scale_of(Q0) == 2.0


def test_the_scale_of_rslora_is_alpha_over_the_root_of_the_rank() -> None:
    assert parse(r=16, lora_alpha=32, use_rslora=True).scale_of(Q0) == 8.0


def test_patterns_change_rank_and_alpha_of_a_module() -> None:
    parsed = parse(r=8, lora_alpha=16, rank_pattern={"q_proj": 4}, alpha_pattern={Q0: 6})
    assert (parsed.rank_of(Q0), parsed.scale_of(Q0)) == (4, 1.5)
    assert (parsed.rank_of(V0), parsed.scale_of(V0)) == (8, 2.0)


def test_the_rank_under_the_root_is_the_modules_own() -> None:
    parsed = parse(r=8, lora_alpha=3, use_rslora=True, rank_pattern={"q_proj": 9})
    assert parsed.scale_of(Q0) == 1.0


def test_the_first_pattern_that_matches_wins() -> None:
    assert parse(rank_pattern={"self_attn.q_proj": 3, "q_proj": 5}).rank_of(Q0) == 3


def test_left_out_rank_and_alpha_are_pefts_defaults() -> None:
    data = json.dumps({"peft_type": "LORA", "base_model_name_or_path": BASE}).encode()
    parsed = AdapterConfig.parse(data)
    assert (parsed.rank, parsed.alpha) == (LoraConfig().r, LoraConfig().lora_alpha)


REFUSED: list[tuple[str, Any, str]] = [
    ("use_bdlora", {"nblocks": 2}, "bdlora"),
    ("use_qalora", True, "qalora"),
    ("arrow_config", {"top_k": 3}, "arrow"),
    ("kasa_config", {"x": 1}, "kasa"),
    ("monteclora_config", {"x": 1}, "monteclora"),
    ("target_parameters", "experts.gate_up_proj", "config"),
    ("init_lora_weights", "pissa", "init"),
    ("init_lora_weights", "pissa_niter_16", "init"),
    ("init_lora_weights", "olora", "init"),
    ("init_lora_weights", "CORDA", "init"),
    ("init_lora_weights", "loftq", "init"),
    ("init_lora_weights", "something_new", "init"),
    ("init_lora_weights", 3, "init"),
    ("peft_type", "ADALORA", "peft-method"),
    ("peft_type", "\x1b[2J", "peft-method"),
    ("peft_type", None, "peft-method"),
    ("use_newlora", True, "unknown-variant"),
    ("newlora_config", {"a": 1}, "unknown-variant"),
    ("r", 0, "config"),
    ("r", -8, "config"),
    ("r", 8.0, "config"),
    ("r", True, "config"),
    ("r", "8", "config"),
    ("r", None, "config"),
    ("r", 5000, "rank"),
    ("lora_alpha", "16", "config"),
    ("lora_alpha", None, "config"),
    ("lora_alpha", True, "config"),
    ("lora_alpha", 10**400, "config"),
    ("use_rslora", 1, "config"),
    ("rank_pattern", [1], "config"),
    ("rank_pattern", {"q_proj": 0}, "config"),
    ("rank_pattern", {"q_proj": 10**6}, "rank"),
    ("rank_pattern", {"(a|a)*b(": 8}, "pattern"),
    ("alpha_pattern", {"(?i)q.*": 8}, "pattern"),
    ("alpha_pattern", {"q_proj": "8"}, "config"),
    ("base_model_name_or_path", ["a"], "config"),
    ("base_model_name_or_path", "x" * 5000, "limits"),
    ("revision", 5, "config"),
]


@pytest.mark.parametrize(("field", "value", "kind"), REFUSED)
def test_a_field_is_refused_by_kind_and_the_message_can_be_shown(field: str, value: Any, kind: str) -> None:
    error = refusal(**{field: value})
    assert error.kind == kind
    assert error.message.isprintable()


# What these add to the factors is in extras or in the configuration, and both are kept exactly.
KEPT: list[tuple[str, Any]] = [
    ("use_dora", True),
    ("modules_to_save", ["lm_head"]),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("lora_bias", True),
    ("trainable_token_indices", [1]),
    ("layer_replication", [[0, 4], [2, 5]]),
    ("alora_invocation_tokens", [5]),
    ("auto_mapping", {"base_model_class": "X", "parent_library": "y"}),
]


@pytest.mark.parametrize(("field", "value"), KEPT)
def test_a_field_whose_meaning_is_kept_exactly_changes_no_rank_and_no_scale(field: str, value: Any) -> None:
    assert parse(**{field: value}) == parse()


@pytest.mark.parametrize("label", [None, ""])
def test_a_configuration_may_name_no_base_model(label: str | None) -> None:
    assert parse(base_model_name_or_path=label).base_model is None


@pytest.mark.parametrize("alpha", [0, -4, 0.5, 1e12, 2**80])
def test_alpha_may_be_zero_negative_a_fraction_or_large(alpha: float) -> None:
    assert parse(r=8, lora_alpha=alpha).scale_of(Q0) == alpha / 8


def test_the_message_names_the_field() -> None:
    assert "use_bdlora" in refusal(use_bdlora=True).message


@pytest.mark.parametrize("field", ["base_model_name_or_path", "revision", "task_type"])
def test_a_label_of_the_wrong_kind_is_damage_for_every_method(field: str) -> None:
    with pytest.raises(AdapterRefused, match=field):
        read_facts(config(peft_type="LOHA", **{field: ["a"]}))


def test_the_facts_of_another_method_are_read() -> None:
    assert read_facts(config(peft_type="LOHA", revision="abc")) == ConfigFacts(BASE, "abc", "CAUSAL_LM")


@pytest.mark.parametrize(("stated", "rank"), [(8, 8), (5000, 5000), (0, 0), (-1, 0), ("8", 0), (None, 0), (2**40, 0)])
def test_the_stated_rank_is_a_whole_number_or_zero(stated: Any, rank: int) -> None:
    assert stated_rank(config(r=stated)) == rank


@pytest.mark.parametrize(
    ("stated", "names"), [(["v", "q"], ("q", "v")), ("all-linear", ()), (None, ()), ([1, "../x", "ok.w"], ("ok.w",))]
)
def test_the_stated_targets_are_names_of_modules(stated: Any, names: tuple[str, ...]) -> None:
    assert stated_targets(config(target_modules=stated)) == names


def test_a_converted_init_tells_how_to_convert() -> None:
    assert "--initial FOLDER" in refusal(init_lora_weights="pissa").message


def test_the_configuration_of_mlx_is_recognised() -> None:
    data = json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}).encode()
    with pytest.raises(AdapterRefused) as caught:
        AdapterConfig.parse(data)
    assert caught.value.kind == "mlx"


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga"])
def test_an_init_that_leaves_the_base_alone_is_accepted(init: object) -> None:
    assert parse(init_lora_weights=init).rank == 2


@pytest.mark.parametrize("unused", [None, False, [], {}])
def test_a_switch_that_is_off_is_accepted(unused: object) -> None:
    assert parse(use_dora=unused, modules_to_save=unused, use_newlora=unused, newlora_config=unused).rank == 2


def test_fields_that_change_nothing_after_training_are_ignored() -> None:
    parsed = parse(lora_dropout=0.1, target_modules="(a|a)*b", exclude_modules="x", layers_pattern="(", my_note="hello")
    assert parsed.rank == 2


def test_a_base_label_is_opaque_text() -> None:
    assert parse(base_model_name_or_path="../../etc/passwd").base_model == "../../etc/passwd"


def test_a_configuration_over_a_megabyte_is_refused() -> None:
    with pytest.raises(UnsafeInput, match="bytes"):
        AdapterConfig.parse(b" " * MAX_CONFIG_BYTES + config())


FIELDS = st.dictionaries(
    st.sampled_from(sorted({field for field, _, _ in REFUSED} | {"task_type", "x"})),
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers() | st.none(), max_size=2),
)


@given(FIELDS)
def test_any_fields_give_a_finite_scale_or_one_of_our_errors(fields: dict[str, Any]) -> None:
    try:
        parsed = parse(**fields)
    except AdapterRefused:
        return
    assert math.isfinite(parsed.scale_of(Q0))
