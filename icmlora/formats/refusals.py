"""Refuse adapters that a generator cannot represent, by method, each with a remedy.

Only the original of such an adapter is kept; the refusal states the reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from icmlora.errors import AdapterRefused
from registry.names import escape

_MERGE = "merge it into the base model, extract a plain LoRA with mergekit-extract-lora, and ingest that"
_INITIAL = "use `icm ingest --initial FOLDER` to subtract its initial weights, if they were saved"
_LOFTQ = "keep it with its quantised base model"


@dataclass(frozen=True)
class _Refusal:
    kind: str
    what: str
    hint: str


_FIELDS: dict[str, _Refusal] = {
    "use_bdlora": _Refusal("bdlora", "a block-diagonal LoRA (BD-LoRA)", _MERGE),
    "use_qalora": _Refusal("qalora", "a quantisation-aware LoRA (QALoRA)", _MERGE),
    "arrow_config": _Refusal(
        "arrow", "routing between several adapters (Arrow)", "ingest the adapters that it routes between"
    ),
    "kasa_config": _Refusal("kasa", "a KaSA adapter, made for a truncated base model", "keep it with its base model"),
    "monteclora_config": _Refusal("monteclora", "a MonteCLoRA adapter", _MERGE),
}

_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
_CHANGED_BASE = re.compile(r"pissa(_niter_\d{1,6})?|olora|corda|loftq")

# Values in files for an unused feature.
_UNUSED: tuple[object, ...] = (None, False, "", [], {})

# Marks of other methods in tensor names. Tensors without such a mark are kept exactly, as extras.
_TENSORS: tuple[tuple[re.Pattern[str], _Refusal], ...] = (
    (re.compile(r"lora_diag"), _FIELDS["kasa_config"]),
    (re.compile(r"lora_monteclora"), _FIELDS["monteclora_config"]),
    (re.compile(r"lora_velora"), _Refusal("velora", "VeLoRA's training state", "save it again after training")),
    (re.compile(r"lora_[EAB]$|ranknum"), _Refusal("peft-method", "AdaLoRA", "train it as a plain LoRA")),
    (re.compile(r"lora_(down|up|mid)\b"), _Refusal("kohya", "kohya or diffusers names", "convert it with diffusers")),
    (re.compile(r"hada_|lokr_|oft_|boft_"), _Refusal("lycoris", "LyCORIS factors", "convert it where it was trained")),
    (re.compile(r"\blora_[ab]\b"), _Refusal("mlx", "MLX or torchtune names", "convert it to a PEFT folder")),
    (
        re.compile(r"lora_(?!magnitude_vector|B\.bias|[AB]\.(default\.)?bias)"),
        _Refusal("unknown-tensor", "a LoRA tensor that this icm does not support", _MERGE),
    ),
)


def refuse_unsupported(fields: dict[str, Any]) -> None:
    """Refuse a configuration that is not a plain LoRA."""
    method = fields.get("peft_type")
    if method is None:
        mlx = "fine_tune_type" in fields or "lora_parameters" in fields
        raise AdapterRefused(
            "adapter_config.json is MLX-LM's, not PEFT's" if mlx else "adapter_config.json has no peft_type",
            kind="mlx" if mlx else "peft-method",
            hint="convert it to a PEFT folder" if mlx else 'add "peft_type": "LORA" if it is a plain PEFT LoRA',
        )
    if method != "LORA":
        message = f"peft_type is {escape(repr(method), 48)}, not LORA"
        raise AdapterRefused(message, kind="peft-method", hint="only a LORA can have a code")
    for key, refusal in _FIELDS.items():
        if fields.get(key) not in _UNUSED:
            raise AdapterRefused(f"{key} is set: {refusal.what}", kind=refusal.kind, hint=refusal.hint)
    _check_init(fields.get("init_lora_weights", True))
    for key, value in fields.items():  # icm could not reproduce the effect of an unknown switch
        if key not in _KNOWN and value not in _UNUSED and _SWITCH.fullmatch(key):
            message = f"{escape(key, 120)!r} is set, a LoRA variant that this icm does not support"
            raise AdapterRefused(message, kind="unknown-variant", hint=_MERGE)


def refuse_tensor(name: str) -> None:
    """Refuse a tensor of another method; skip tensors that can be kept as extras."""
    for pattern, refusal in _TENSORS:
        if pattern.search(name):
            raise AdapterRefused(f"{name}: {refusal.what}", kind=refusal.kind, hint=refusal.hint)


def _check_init(init: object) -> None:
    if init is None or isinstance(init, bool):
        return
    name = init.lower() if isinstance(init, str) else ""
    if name in _PLAIN_INITS:
        return
    if _CHANGED_BASE.fullmatch(name):
        way_out = _LOFTQ if name == "loftq" else _INITIAL
        message = f"init_lora_weights is {name}: its weights fit a modified base model, not the named one"
        raise AdapterRefused(f"{message}; {way_out}", kind="init")
    raise AdapterRefused(f"init_lora_weights is {escape(repr(init), 48)}, which this icm does not support", kind="init")


# Keys that look like switches, but are read here or have no effect after training.
_SWITCH = re.compile(r"use_.*|.*_config")
_KNOWN = frozenset(
    {
        *("use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        *("megatron_config", "runtime_config"),
    }
)
