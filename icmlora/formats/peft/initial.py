"""PEFT adapters whose training first subtracted weights from the base model: PiSSA, OLoRA, CorDA.

    trained      W + dW = (W - scale * B0 @ A0) + scale * B @ A        A0, B0: the initial weights
    converted    dW = scale * [B, -B0] @ [A; A0]                       an ordinary LoRA of twice the rank

PEFT does the same conversion when saving (`path_initial_model_for_weight_conversion`, which calls
`LoraModel.subtract_mutated_init`), but needs the base model for it. This module needs only the files: rows and columns
are joined as bytes, so every number format stays exact. Unlike PEFT, it keeps heads and DoRA magnitudes. Never imports
torch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np

from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterSummary, Buffer, Template
from icmlora.formats.peft.config import AdapterConfig, fields_of
from icmlora.formats.peft.names import FactorPair, sort_tensors
from icmlora.io.safetensors import ITEM_BYTES, RawTensor, TensorHeader, encode, raw_tensors, read_header
from icmlora.io.strict_json import parse_object

# LoftQ also compensates for quantisation errors, so its adapters fit only the quantised model: PEFT warns and icm keeps
# the original. LoRA-GA changes the base model in training, but PEFT does not when it loads such an adapter.
_METHOD = re.compile(r"(pissa|olora|corda)(_niter_\d{1,6})?")
_MARK = "converted"


def changed_base(config: bytes) -> str | None:
    """Return the reversible method that changed an adapter's base model: pissa, olora or corda."""
    init = fields_of(config).get("init_lora_weights")
    found = _METHOD.fullmatch(init.lower()) if isinstance(init, str) else None
    return None if found is None else found[1]


def check_initial(config: bytes, header: TensorHeader, initial_config: bytes, initial: TensorHeader) -> None:
    """Refuse weights that cannot be an adapter's initial weights.

    Raises:
        AdapterRefused: Their modules, shapes, number formats, scales or base model differ, or they are damaged.
    """
    pairs = sort_tensors(header).pairs
    _check(config, pairs, sort_tensors(initial).pairs)
    one, other = AdapterConfig.read(config), AdapterConfig.read(initial_config)
    if None not in (one.base_model, other.base_model) and one.base_model != other.base_model:
        raise _unfit("they belong to another base model")
    if any(one.scale_of(pair.module) != other.scale_of(pair.module) for pair in pairs):
        raise _unfit("their scale differs from the adapter's")


def convert(config: bytes, weights: bytes, initial: bytes) -> tuple[bytes, bytes]:
    """Return configuration and weights of the equivalent LoRA for the unmodified base model.

    Raises:
        AdapterRefused: The initial weights do not fit, or PEFT would not convert such an adapter either.
    """
    header, initial_header = read_header(weights), read_header(initial)
    pairs, initial_pairs = sort_tensors(header).pairs, sort_tensors(initial_header).pairs
    _check(config, pairs, initial_pairs)
    tensors, began = raw_tensors(weights, header.tensors), raw_tensors(initial, initial_header.tensors)
    for pair, start in zip(pairs, initial_pairs, strict=True):
        a, a0 = tensors[pair.a.name], began[start.a.name]
        tensors[pair.a.name] = RawTensor(a.dtype, (2 * a.shape[0], a.shape[1]), a.data + a0.data)  # [A; A0] (2 r, in)
        tensors[pair.b.name] = _less_columns(tensors[pair.b.name], began[start.b.name])
    return convert_config(config), encode(tensors, header.metadata)


def convert_config(config: bytes) -> bytes:
    """Return the configuration of a converted adapter, as PEFT writes it.

    Raises:
        AdapterRefused: PEFT would not convert it.
    """
    fields = fields_of(config)
    patterns = {key: fields.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    if fields.get("use_rslora") and any(patterns.values()):
        raise _unfit("PEFT does not convert rank_pattern or alpha_pattern with use_rslora")
    parsed = AdapterConfig.read(config)
    alpha = fields.get("lora_alpha", parsed.alpha)
    changed: dict[str, Any] = {
        "init_lora_weights": True,
        "r": 2 * parsed.rank,
        "lora_alpha": alpha * math.sqrt(2) if parsed.use_rslora else alpha * 2,
    }
    doubled = {key: {name: 2 * value for name, value in found.items()} for key, found in patterns.items() if found}
    return json.dumps({**fields, **changed, **doubled}, indent=2, sort_keys=True).encode()


def marked(summary: AdapterSummary, weights: Buffer) -> AdapterSummary:
    """Return the summary of a converted adapter as a summary of the original, which has the same extras."""
    infos = {tensor.name: tensor for tensor in read_header(weights).tensors}
    extras = tuple(infos[extra.name] for extra in summary.extras)
    if summary.original_only is not None:
        return replace(summary, extras=extras)
    details = {**json.loads(summary.template or "{}"), _MARK: True}
    return replace(summary, extras=extras, template=json.dumps(details, sort_keys=True, separators=(",", ":")))


def converted_form(like: Template) -> Template:
    """Return the form of the converted adapter if a template is marked, else the template itself."""
    data = like.details.encode()
    details = parse_object(data, what="the template", max_bytes=len(data)) if data else {}
    if details.pop(_MARK, None) is not True:
        return like
    return replace(like, config=convert_config(like.config), details=json.dumps(details))


def _check(config: bytes, pairs: tuple[FactorPair, ...], initial: tuple[FactorPair, ...]) -> None:
    convert_config(config)
    if fields_of(config).get("target_parameters"):
        raise _unfit("it has fused experts")
    for pair in pairs:
        if len(pair.a.shape) != 2 or "lora_embedding_" in pair.a.name:
            raise _unfit(f"{pair.module} is not a linear layer")
    if _forms(pairs) != _forms(initial):
        raise _unfit("their modules, shapes or number formats do not match the adapter")


def _forms(pairs: tuple[FactorPair, ...]) -> list[tuple[object, ...]]:
    return [(pair.module, pair.a.dtype, pair.a.shape, pair.b.dtype, pair.b.shape) for pair in pairs]


def _less_columns(b: RawTensor, initial: RawTensor) -> RawTensor:
    """Return [B, -B0], of shape (out, 2 r)."""
    width = ITEM_BYTES[b.dtype]
    negated = np.frombuffer(initial.data, np.uint8).copy()
    negated[width - 1 :: width] ^= 0x80  # the sign of a little-endian number
    rows = (np.frombuffer(b.data, np.uint8).reshape(b.shape[0], -1), negated.reshape(b.shape[0], -1))
    return RawTensor(b.dtype, (b.shape[0], 2 * b.shape[1]), np.concatenate(rows, axis=1).tobytes())


def _unfit(why: str) -> AdapterRefused:
    return AdapterRefused(f"its initial weights cannot be subtracted: {why}", kind="initial")
