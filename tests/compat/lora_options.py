"""Options of PEFT's `LoraConfig` that leave an adapter a plain LoRA: ranks, scales, patterns, targets, beginnings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.compat.bases import base_model, quiet
from tests.compat.building import (
    CONFIG,
    computed,
    converted_by_peft,
    fresh_model,
    from_plain,
    lora,
    save,
    set_fields,
    store_as,
    train_a_little,
    trained,
)
from tests.compat.case import Case, Outcome

_RANKS = "Ranks and scales"
_TARGETS = "Targets"
_STARTS = "Initialisation"
_NUMBERS = "Number formats"
_QV = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def _option(name: str, group: str, outcome: Outcome = "exact", remark: str = "", **options: Any) -> Case:
    return lora(name, "llama-deep", _QV | options, outcome, group, remark)


def _wide_rank(rank: int) -> Case:
    # Of its own base model: a rank far above the width would slow the generator of all others.
    options = _QV | {"target_modules": ["q_proj"], "r": rank, "lora_alpha": rank}
    return lora(
        f"rank-{rank}", "llama-wide", options, "exact", _RANKS, "above the width of the layer", dtype="bfloat16"
    )


def _start(name: str, init: Any, outcome: Outcome = "exact", remark: str = "") -> Case:
    return _option(f"init-{name}", _STARTS, outcome, remark, init_lora_weights=init)


def _eva(folder: Path) -> Any:
    import peft

    options = _QV | {"r": 4, "init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=2.0)}
    with quiet():
        model = trained(peft.LoraConfig(**options), "llama-deep", folder.name)
        peft.initialize_lora_eva_weights(model, [dict(base_model("llama-deep")[1])] * 3, show_progress_bar=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01).mul_(parameter.new_ones(parameter.shape).cumsum(0).sin())
    output = computed(model, "llama-deep")
    save(model, folder, "llama-deep")
    return output


def _begun(init: str, start: Path, **options: Any) -> Any:
    """Return a trained model of an adapter that changed its base, and save its initial weights as PEFT's guide does."""
    import peft

    # CorDA needs statistics of texts, and a library that is not installed; its files are like those of PiSSA.
    started = "pissa" if init == "corda" else init
    config = peft.LoraConfig(**_QV | {"r": 4, "init_lora_weights": started} | options)
    with quiet():
        model = peft.get_peft_model(fresh_model("llama-deep"), config)
        model.peft_config["default"].init_lora_weights = True
        save(model, start, "llama-deep")
        model.peft_config["default"].init_lora_weights = init
        train_a_little(model, 0.02)
    return model.eval()


def _converted(folder: Path, init: str) -> Any:
    """Convert an adapter that changed its base, as PEFT's documentation of PiSSA shows."""
    with tempfile.TemporaryDirectory() as name:
        start = Path(name, "start")
        model = _begun(init, start, lora_alpha=16)
        output = computed(model, "llama-deep")
        save(model, folder, "llama-deep", path_initial_model_for_weight_conversion=str(start))
    return output


def _with_initial(name: str, init: str, *, loads: bool = True, **options: Any) -> Case:
    """Describe an adapter that changed its base and has its initial weights in a folder inside its own."""

    def build(folder: Path) -> Any:
        start = folder / f"{init.partition('_')[0]}_init"
        model = _begun(init, start, **options)
        save(model, folder, "llama-deep")
        output = computed(model, "llama-deep")
        # PEFT changes the configuration of the initial weights too.
        save(model, converted_by_peft(folder), "llama-deep", path_initial_model_for_weight_conversion=str(start))
        _list_as_in(folder / CONFIG, converted_by_peft(folder) / CONFIG)
        return output

    return Case(name, _STARTS, build, "exact", _TAKEN_OFF, "llama-deep" if loads else None)


def _list_as_in(original: Path, converted: Path) -> None:
    """List the target modules in the original's order: PEFT writes a set, in any order each time."""
    fields = json.loads(converted.read_text()) | {"target_modules": json.loads(original.read_text())["target_modules"]}
    converted.write_text(json.dumps(fields, indent=2, sort_keys=True))


def _like_a_trainer(init: str) -> Callable[[Path], None]:
    """Name an initialisation whose library is not installed; the tensors are those of any LoRA."""

    def change(folder: Path) -> None:
        set_fields(folder, init_lora_weights=init)

    return change


def _f8(folder: Path) -> None:
    store_as(folder, "float8_e4m3fn")


_REGEX = {r"layers\.(0|1)\..*v_proj": 2}
_CHANGED = "fits a changed base model; a code needs its initial weights"
_TAKEN_OFF = "its initial weights are next to it and are taken off: comes back as an ordinary LoRA of twice the rank"
_OWN = r".*layers\.[01]\.self_attn\.(q|k)_proj"
_FIRST = [0, 1]
_NITER = {"init_lora_weights": "pissa_niter_4"}

CASES: tuple[Case, ...] = (
    _option("rank-1", _RANKS, r=1, lora_alpha=2),
    _option("rank-2", _RANKS, remark="comes back with rank 2", r=2),
    _option("rank-3", _RANKS, r=3),
    _option("rank-64", _RANKS, remark="above the width of the layer", r=64),
    _wide_rank(254),
    _wide_rank(256),
    _wide_rank(1024),
    _option("alpha-float", _RANKS, lora_alpha=0.5),
    _option("alpha-zero", _RANKS, "original", "does nothing: the scale is zero", lora_alpha=0),
    _option("alpha-negative", _RANKS, lora_alpha=-8),
    _option("rslora", _RANKS, use_rslora=True),
    _option("dropout", _RANKS, lora_dropout=0.1),
    _option("rank-pattern", _RANKS, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 32}),
    _option("rank-pattern-full-name", _RANKS, rank_pattern={"model.layers.1.self_attn.v_proj": 2}),
    _option("rank-pattern-caret", _RANKS, rank_pattern={"^model.layers.1.self_attn.v_proj": 2}),
    _option("rank-pattern-regex", _RANKS, rank_pattern=_REGEX, alpha_pattern={r".*q_proj": 8}),
    _option("alpha-pattern-float", _RANKS, alpha_pattern={"q_proj": 7.5}),
    _option("rslora-patterns", _RANKS, use_rslora=True, rank_pattern={"v_proj": 9}, alpha_pattern={"v_proj": 3}),
    _option("all-linear", _TARGETS, target_modules="all-linear"),
    _option("regex-targets", _TARGETS, target_modules=_OWN),
    _option("exclude", _TARGETS, target_modules="all-linear", exclude_modules=["down_proj", "lm_head"]),
    _option("exclude-regex", _TARGETS, exclude_modules=r".*layers\.3.*"),
    _option("first-layers", _TARGETS, remark="no LoRA appears elsewhere", layers_to_transform=_FIRST),
    _option("last-layer", _TARGETS, layers_to_transform=[3], layers_pattern="layers"),
    _option("full-names", _TARGETS, target_modules=["model.layers.0.self_attn.q_proj"]),
    _option("layer-replication", _TARGETS, layer_replication=[[0, 2], [1, 4]]),
    _option("task-type-none", _TARGETS, remark="`auto_mapping` is kept", task_type=None),
    _option("revision", _TARGETS, remark="a generator of its own", revision="step1000"),
    _option("alora", _TARGETS, remark="`alora_invocation_tokens` is kept", alora_invocation_tokens=[5, 6]),
    _option("qalora", _TARGETS, outcome="original", use_qalora=True, qalora_group_size=16),
    _start("gaussian", "gaussian"),
    _start("orthogonal", "orthogonal"),
    _start("mica", "mica"),
    _start("false", False),
    _start("lora-ga", "lora_ga"),
    Case("init-eva", _STARTS, _eva, "exact", base="llama-deep"),
    _start("pissa", "pissa", "original", _CHANGED),
    # PEFT draws its approximate singular vectors anew when it loads, so it does not load what it saved.
    lora("init-pissa-niter-4", "llama-deep", _QV | _NITER, "original", _STARTS, _CHANGED, loads=False),
    _start("olora", "olora", "original", _CHANGED),
    from_plain("init-corda", _like_a_trainer("corda"), "original", _STARTS, _CHANGED),
    from_plain("init-loftq", _like_a_trainer("loftq"), "original", _STARTS, "fits its quantised base model only"),
    _with_initial("pissa-with-initial", "pissa"),
    _with_initial("pissa-rslora-with-initial", "pissa", use_rslora=True),
    _with_initial("pissa-patterns-with-initial", "pissa", rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 6}),
    # PEFT does not load what it saved of these two.
    _with_initial("pissa-niter-4-with-initial", "pissa_niter_4", loads=False),
    _with_initial("corda-with-initial", "corda", loads=False),
    _with_initial("olora-with-initial", "olora"),
    Case("pissa-converted", _STARTS, lambda folder: _converted(folder, "pissa"), "exact", "by PEFT", base="llama-deep"),
    Case("olora-converted", _STARTS, lambda folder: _converted(folder, "olora"), "exact", "by PEFT", base="llama-deep"),
    from_plain("float16", lambda folder: store_as(folder, "float16"), "exact", _NUMBERS, loads=True),
    from_plain("bfloat16", lambda folder: store_as(folder, "bfloat16"), "exact", _NUMBERS, loads=True),
    from_plain(
        "float16-and-float32", lambda folder: store_as(folder, "float16", "float32"), "exact", _NUMBERS, loads=True
    ),
    from_plain("float64", lambda folder: store_as(folder, "float64"), "exact", _NUMBERS),
    from_plain("float8", _f8, "original", _NUMBERS),
)
