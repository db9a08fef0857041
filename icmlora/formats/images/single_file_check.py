"""Check a single-file adapter completely during `icm ingest`, with numpy only. Never imports torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np

from icmlora.adapter.module_groups import blocks_of
from icmlora.errors import AdapterRefused
from icmlora.formats.file_header import HEADER
from icmlora.formats.format import AdapterSummary, Buffer
from icmlora.formats.images.families import base_of
from icmlora.formats.images.single_file_names import Factors, Naming, sort_file
from icmlora.formats.noted_form import commonest, note, types_to_note
from icmlora.io.finite import bits, check_finite, is_zero
from icmlora.io.safetensors import TensorHeader, TensorInfo, header_text, read_header

NOTHING = "does nothing"


@dataclass(frozen=True)
class CheckedFile:
    """A checked adapter.

    Attributes:
        factors: Its modules, without modules of other methods than LoRA.
        alphas: Module to alpha, if the file has one.
        metadata: Metadata of the header.
        summary: Its summary.
    """

    factors: tuple[Factors, ...]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]
    summary: AdapterSummary


def check_file(weights: Buffer, naming: Naming) -> CheckedFile:
    """Check a file.

    Raises:
        AdapterRefused: It is damaged, or its scale is unknown; `kind` states the reason.
        UnsafeInput: Hostile names, or exceeded limits.
    """
    header = read_header(weights)
    found = sort_file(header, naming)
    _check_stated_alpha(header.metadata, found.factors)
    alphas = {one.module: scalar(weights, one.alpha) for one in found.factors if one.alpha is not None}
    reason, does_nothing = None, not header.tensors
    if does_nothing:
        reason = f"{NOTHING}: it holds no tensors"
    elif found.other_method is not None:
        reason = f"it is {found.other_method}, not plain LoRA"
    elif not found.factors:
        reason = "it has no LoRA factors"
    try:
        check_finite(weights, header)
    except AdapterRefused as refusal:
        reason, does_nothing = reason or refusal.message, True
    if reason is None and all(is_zero(weights, one.up) or is_zero(weights, one.down) for one in found.factors):
        reason, does_nothing = f"{NOTHING}: up @ down is zero in every module", True
    coded = () if reason is not None else found.factors
    tensors = [tensor for factors in found.factors for tensor in (factors.down, factors.up)] or header.tensors
    # Tensors of other methods are named after their modules too.
    widths = {one.module: one.shape.inputs for one in found.factors}
    widths = widths or {tensor.name.rpartition(".")[0]: 0 for tensor in header.tensors}
    base = base_of(header.metadata, widths)
    summary = AdapterSummary(
        base_model=base.label,
        base_is_guess=base.is_guess,
        revision=None,
        task_type=None,
        dtype="+".join(sorted({tensor.dtype for tensor in tensors})) or "none",
        rank_max=max((factors.shape.rank for factors in found.factors), default=0),
        parameters=sum(prod(tensor.shape) for tensor in tensors),
        target_modules=blocks_of(widths),
        layout=tuple(factors.shape for factors in coded),
        extras=(*found.extras, *_metadata_tensor(weights, header)) if coded else (),
        original_only=reason,
        does_nothing=does_nothing,
        template=_template(coded, alphas, naming) if coded else "",
    )
    return CheckedFile(found.factors, alphas, header.metadata, summary)


def scalar(data: Buffer, info: TensorInfo) -> float:
    """Read a tensor of one finite number.

    Raises:
        AdapterRefused: It is not finite.
    """
    raw = bits(data, info.dtype, info.begin, info.end)
    if info.dtype == "BF16":
        value = float((raw.astype(np.uint32) << 16).view(np.float32)[0])
    else:
        value = float(raw.view(f"<{'i' if info.dtype.startswith('I') else 'f'}{raw.itemsize}")[0])
    if not isfinite(value):
        raise AdapterRefused(f"{info.name} is {value}, not a finite number", kind="alpha")
    return value


def _check_stated_alpha(metadata: Mapping[str, str], factors: tuple[Factors, ...]) -> None:
    """Refuse a file without alphas whose header states an alpha other than the rank."""
    if not factors or any(factor.alpha is not None for factor in factors):
        return
    alpha, rank = (_number(metadata.get(f"ss_network_{key}")) for key in ("alpha", "dim"))
    if alpha is not None and rank is not None and alpha not in (0.0, rank):
        fact = (
            f"it has no alpha tensors, but its header states alpha {alpha:g} at rank {rank:g}, so its scale is unknown"
        )
        raise AdapterRefused(fact, kind="alpha", hint="download the file again, or save it again where it was trained")


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _metadata_tensor(weights: Buffer, header: TensorHeader) -> tuple[TensorInfo, ...]:
    """Return the header's metadata as a tensor of bytes in the file."""
    if not header.metadata:
        return ()
    text = header_text(weights).decode()
    for match in re.finditer(r'"__metadata__"\s*:\s*', text):
        try:
            value, end = json.JSONDecoder().raw_decode(text, match.end())
        except ValueError:
            continue
        if value == header.metadata:
            begin = 8 + len(text[: match.end()].encode())
            size = len(text[match.end() : end].encode())
            return (TensorInfo(HEADER, "U8", (size,), begin, begin + size),)
    raise AdapterRefused("__metadata__ cannot be located in the header", kind="damaged")


def _template(factors: tuple[Factors, ...], alphas: Mapping[str, float], naming: Naming) -> str:
    """Return a note of differences from linear factors of one type, one alpha and the naming's first style."""
    noted = {one.module: None if one.alpha is None else [alphas[one.module], one.alpha.dtype] for one in factors}
    alpha = json.loads(commonest(json.dumps(found) for found in noted.values()))
    style = commonest(one.style for one in factors)
    details = {
        "style": style,
        "alpha": alpha,
        "alphas": {module: found for module, found in noted.items() if found != alpha},
        "alpha_shape": [1] if any(one.alpha and one.alpha.shape for one in factors) else [],
        "kernels": {one.module: list(one.kernel) for one in factors if one.kernel},
        "flat_up": [one.module for one in factors if one.kernel and len(one.up.shape) == 2],
        **types_to_note([tensor for one in factors for tensor in (one.down, one.up)]),
        "names": {
            one.module: [one.down.name, one.up.name]
            for one in factors
            if (one.down.name, one.up.name) != naming.styles[style].names(naming.stem_of(one.module))
        },
    }
    return note(details, {}) or "{}"
