"""Convert the tensors of a single-file adapter to factors and back.

    down (r, in[, k, k]), up (out, r[, 1, 1]), alpha  ──▶  A (r, in k k), B (out, r) with alpha / r folded in
    up, mid (r, s, k, k), down (s, in, 1, 1)          ──▶  A[i, (in, k, k)] = sum_j mid[i, j, k, k] down[j, in]

A convolution in three factors is written in two equivalent factors (LyCORIS' `rebuild_tucker`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from operator import index
from typing import TYPE_CHECKING, cast

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused
from icmlora.formats.factors import fitted_parts, load_factors, unscaled
from icmlora.formats.file_header import HEADER
from icmlora.formats.format import LoadedAdapter, Template
from icmlora.formats.images.single_file_check import CheckedFile
from icmlora.formats.images.single_file_names import NUMBERS, Factors, Naming, Restated, Scales
from icmlora.formats.noted_form import bad_note, reading, types_of
from icmlora.io.safetensors import ITEM_BYTES, TENSOR_NAME, RawTensor, encode
from icmlora.io.strict_json import parse_object
from icmlora.io.tensors import dtype_name, raw_tensor

if TYPE_CHECKING:
    from icmlora.adapter.layout import ModuleShape

_MAX_KERNEL = 64


def read_adapter(weights: bytes, checked: CheckedFile, scales: Scales) -> LoadedAdapter:
    """Read the factors in float32 with the scale folded into B, and the extras unchanged.

    Raises:
        AdapterRefused: The adapter can have no code, or its scaled values exceed float32.
    """

    def module(one: Factors, values: Mapping[str, torch.Tensor]) -> LoraModule:
        scale = _scale(checked.alphas.get(one.module), one.shape, checked.metadata, scales)
        a, b = values[one.down.name].flatten(1), values[one.up.name].flatten(1) * scale
        if one.mid is not None:
            a = torch.einsum("ijk,jn->ink", values[one.mid.name].flatten(2), a).flatten(1)
        if not b.isfinite().all() or not a.isfinite().all():
            raise AdapterRefused(f"{one.module}: its factors times the scale exceed float32", kind="overflow")
        return LoraModule(one.module, a, b)

    tensors = (tensor for one in checked.factors for tensor in (one.down, one.up, one.mid) if tensor is not None)
    return load_factors(
        weights, checked.summary, tensors, lambda values: (module(one, values) for one in checked.factors)
    )


def named_factors(weights: bytes, checked: CheckedFile, scales: Scales) -> dict[str, torch.Tensor]:
    """Read the factors by name in the file, with the scale folded in; three-factor convolutions get two factors."""
    found: dict[str, torch.Tensor] = {}
    modules = read_adapter(weights, checked, scales).adapter.modules
    for one, module in zip(checked.factors, modules, strict=True):
        found[one.down.name] = module.a.reshape(len(module.a), -1, *one.kernel)
        found[one.up.name] = module.b.reshape(*module.b.shape, *(1 for _ in one.kernel))
    return found


def _scale(alpha: float | None, shape: ModuleShape, metadata: Mapping[str, str], scales: Scales) -> float:
    """Return the factor between up @ down and dW; as in kohya's programs, alpha 0 means alpha = r."""
    if alpha is None:
        return scales(metadata, shape.module, shape.rank)
    return alpha / shape.rank if alpha else 1.0


def write_like(
    adapter: Adapter,
    naming: Naming,
    scales: Scales,
    restated: Restated,
    like: Template,
    dtype: str | None,
    extras: Mapping[str, RawTensor],
) -> bytes:
    """Serialise an adapter in the form of another adapter; missing modules become zeros.

    Raises:
        AdapterRefused: The form does not fit, or a value overflows its type.
    """
    details, stated, kept = _Details.parse(like), *_split(extras)
    metadata = restated(stated, {shape.module: shape.rank for shape in like.layout})
    tensors: dict[str, RawTensor] = {}
    style = naming.styles[details.style] if details.style < len(naming.styles) else naming.styles[0]
    for shape, (module, (factors,)) in zip(like.layout, fitted_parts(adapter, like.layout, {}), strict=True):
        stem = naming.stem_of(module)
        alpha = details.alphas.get(module, details.alpha)
        a, b = unscaled(factors, _scale(None if alpha is None else alpha[0], shape, metadata, scales))
        kernel = details.kernels.get(module, ())
        if kernel:
            if shape.inputs % prod(kernel):
                raise bad_note()
            a = a.reshape(shape.rank, -1, *kernel)
            b = b if module in details.flat_up else b.reshape(*b.shape, *(1 for _ in kernel))
        names = details.names.get(module) or style.names(stem)
        for name, values in zip(names, (a, b), strict=True):
            if name in tensors or name in kept:
                raise bad_note()
            kind = details.type_of(name) if dtype is None else dtype_name(dtype)
            tensors[name] = raw_tensor(name, values, kind)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = _scalar(*alpha, details.alpha_shape)
    return encode(tensors | kept, metadata)


def write_fresh(adapter: Adapter, naming: Naming, dtype: str, metadata: Mapping[str, str]) -> bytes:
    """Serialise linear layers in the naming's first style, with alpha = r.

    Raises:
        AdapterRefused: The naming has no name for a module, or a value overflows the type.
    """
    tensors: dict[str, RawTensor] = {}
    for module in adapter.modules:
        stem = naming.stem_of(module.name)
        if not naming.stem.fullmatch(stem):
            fact = f"{module.name} has no name in this format"
            hint = "run `icm convert --list-formats` to see which programs read a format"
            raise AdapterRefused(fact, kind="layers", hint=hint)
        for name, values in zip(naming.styles[0].names(stem), (module.a, module.b), strict=True):
            tensors[name] = raw_tensor(name, values, dtype_name(dtype))
        alpha = torch.tensor(float(module.a.shape[0]))
        tensors[f"{stem}.alpha"] = raw_tensor(f"{stem}.alpha", alpha, dtype_name(dtype))
    return encode(tensors, {"format": "pt", **metadata})


def _split(extras: Mapping[str, RawTensor]) -> tuple[dict[str, str], dict[str, RawTensor]]:
    """Return the metadata of the header and all other extras."""
    kept = dict(extras)
    header = kept.pop(HEADER, None)
    if header is None:
        return {}, kept
    found = parse_object(header.data, what="the metadata of the header", max_bytes=len(header.data))
    if not all(isinstance(value, str) for value in found.values()):
        raise bad_note()
    return found, kept


def _scalar(value: float, dtype: str, shape: tuple[int, ...]) -> RawTensor:
    if dtype.startswith("I"):
        return RawTensor(dtype, shape, int(value).to_bytes(ITEM_BYTES[dtype], "little", signed=True))
    return raw_tensor("alpha", torch.full(shape, value, dtype=torch.float64), dtype)


_Alpha = tuple[float, str]  # value and type


@dataclass(frozen=True)
class _Details:
    """The template from `SingleFileFormat.inspect`, parsed as untrusted input: it may come from a bundle."""

    style: int
    alpha: _Alpha | None
    alphas: Mapping[str, _Alpha | None]
    alpha_shape: tuple[int, ...]
    kernels: Mapping[str, tuple[int, ...]]
    flat_up: frozenset[str]  # convolutions whose up has two dimensions
    type_of: Callable[[str], str]
    names: Mapping[str, tuple[str, str]]

    @classmethod
    def parse(cls, like: Template) -> _Details:
        with reading(like) as found:
            made = cls(
                style=index(found.pop("style", 0)),
                alpha=_alpha(found.pop("alpha", None)),
                alphas={module: _alpha(alpha) for module, alpha in found.pop("alphas", {}).items()},
                alpha_shape=tuple(map(index, found.pop("alpha_shape", []))),
                kernels={module: tuple(map(index, sizes)) for module, sizes in found.pop("kernels", {}).items()},
                flat_up=frozenset(found.pop("flat_up", [])),
                type_of=types_of(found, like),
                names={module: (str(down), str(up)) for module, (down, up) in found.pop("names", {}).items()},
            )
            if not (
                made.style >= 0
                and made.alpha_shape in ((), (1,))
                and all(0 < size <= _MAX_KERNEL for sizes in made.kernels.values() for size in sizes)
                and all(TENSOR_NAME.fullmatch(name) for pair in made.names.values() for name in pair)
            ):
                raise bad_note()
        return made


def _alpha(value: object) -> _Alpha | None:
    if value is None:
        return None
    number, dtype = cast("Sequence[object]", value)
    if not isinstance(dtype, str) or not isinstance(number, float) or not isfinite(number) or dtype not in NUMBERS:
        raise ValueError("not an alpha")
    return number, dtype
