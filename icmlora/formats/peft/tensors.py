"""Convert the tensors of a PEFT adapter to factors and back.

tensor file, config ──▶ factors (r, in), (out, r) with the scale folded into B  +  extras
factors, template   ──▶ the same names, ranks, shapes and types as the original, with the scale divided out again
factors alone       ──▶ the form that every engine reads: one rank, alpha == rank, no patterns
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import index
from typing import TYPE_CHECKING, Any

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused
from icmlora.formats.factors import Factors, fitted, fitted_parts, load_factors, scaled, unscaled
from icmlora.formats.format import LoadedAdapter, Template
from icmlora.formats.noted_form import bad_note, reading, types_of
from icmlora.formats.peft.check import check_adapter
from icmlora.formats.peft.config import PREFIX, AdapterConfig, usual_names, with_ranks
from icmlora.formats.peft.names import without_wrappers
from icmlora.io.safetensors import MAX_DIMENSION, TENSOR_NAME, RawTensor, encode
from icmlora.io.tensors import dtype_name, raw_tensor, rounded

if TYPE_CHECKING:
    from icmlora.formats.peft.names import FactorPair

_METADATA = {"format": "pt"}
_MAX_PARTS = 1024  # experts or groups of one module


def read_adapter(config: bytes, weights: bytes) -> LoadedAdapter:
    """Read the factors in float32, and the extras unchanged.

    Raises:
        AdapterRefused: The adapter is damaged, or can have no code.
    """
    checked = check_adapter(config, weights)
    parsed, pairs = checked.config, () if checked.tensors is None else checked.tensors.pairs
    tensors = [tensor for pair in pairs for tensor in (pair.a, pair.b)]
    return load_factors(
        weights,
        checked.summary,
        tensors,
        lambda values: (module for pair in pairs if parsed for module in _modules(pair, values, parsed)),
    )


def _modules(pair: FactorPair, values: Mapping[str, torch.Tensor], config: AdapterConfig) -> list[LoraModule]:
    a, b = values[pair.a.name].flatten(1), values[pair.b.name].flatten(1)
    b = scaled(pair.module, b, config.scale_of(pair.target or pair.module))
    parts = _split(a, b, pair.experts, pair.groups)
    return [LoraModule(shape.module, *part) for shape, part in zip(pair.shapes, parts, strict=True)]


def _split(a: torch.Tensor, b: torch.Tensor, experts: int, groups: int) -> list[Factors]:
    """Split the factors of a module (r, in), (out, r) into factors of its experts or groups."""
    inputs, (outputs, columns) = a.shape[1], b.shape
    if experts > 1:
        # The columns of B cycle through the experts.
        by_expert = b.reshape(outputs, columns // experts, experts).permute(2, 0, 1).contiguous()
        return list(zip(a.reshape(experts, -1, inputs), by_expert, strict=True))
    return list(zip(a.reshape(groups, columns, inputs), b.reshape(groups, -1, columns), strict=True))


def joined(parts: Sequence[Factors], *, experts: bool) -> Factors:
    """Join the factors (r, in), (out, r) of n experts or groups of a module, in order.

    Returns:
        A (n r, in), and B (out, n r) for experts, or (n out, r) for groups.
    """
    a = torch.cat([a for a, _ in parts])
    if experts:
        b = torch.stack([b for _, b in parts], dim=2)  # (out, r, experts)
        return a, b.reshape(len(b), -1)
    return a, torch.cat([b for _, b in parts])


def write_like(
    adapter: Adapter, like: Template, dtype: str | None, extras: Mapping[str, RawTensor]
) -> tuple[bytes, bytes]:
    """Serialise an adapter in the form of another adapter: tensor file and configuration.

    Missing modules become zeros. Wrapper parts of names are removed. The configuration is copied from the other
    adapter, with new ranks if they differ from the layout.

    Raises:
        AdapterRefused: The form does not fit, or a value overflows its type.
    """
    config, details = AdapterConfig.read(like.config), _TensorDetails.parse(like)
    clean = {without_wrappers(name): tensor for name, tensor in extras.items()}
    extras = clean if len(clean) == len(extras) else extras
    tensors: dict[str, RawTensor] = {}
    written: dict[str, tuple[int, float]] = {}
    is_stated = True
    for module, parts in fitted_parts(adapter, like.layout, details.parts):
        target = details.targets.get(module, module)
        scale = config.scale_of(target)
        written[target] = len(parts[0][0]) * details.groups.get(module, 1), scale
        is_stated = is_stated and config.rank_of(target) == written[target][0]
        factors = unscaled(joined(parts, experts=module in details.experts), scale)
        names = details.names.get(module) or usual_names(module)
        for axis, (noted, factor) in enumerate(zip(names, factors, strict=True)):
            kind = details.type_of(noted) if dtype is None else dtype_name(dtype)
            size = details.shapes.get(noted, tuple(factor.shape))
            name = without_wrappers(noted)  # PEFT does not load tensors with wrapper parts in their names
            if not is_stated:
                size = *size[:axis], factor.shape[axis], *size[axis + 1 :]  # A (r, ...), B (out, r, ...)
            if prod(size) != factor.numel() or name in tensors or name in extras:
                raise bad_note()
            tensors[name] = raw_tensor(name, factor.reshape(size), kind)
    data = encode({**tensors, **extras}, details.metadata)
    return data, like.config if is_stated else with_ranks(like.config, written)


def rounded_like(adapter: Adapter, like: Template) -> Adapter:
    """Return the adapter as a file from `write_like` would contain it: rounded, with the ranks of the form.

    Raises:
        AdapterRefused: The form does not fit, or a value overflows its type.
    """
    config, details = AdapterConfig.read(like.config), _TensorDetails.parse(like)
    modules = []
    for module, parts in fitted_parts(adapter, like.layout, details.parts):
        scale = config.scale_of(details.targets.get(module, module))
        names = details.names.get(module) or usual_names(module)
        for part, factors in enumerate(parts):
            a, b = (
                rounded(name, factor, details.type_of(name)).float()
                for name, factor in zip(names, unscaled(factors, scale), strict=True)
            )
            modules.append(
                LoraModule(f"{module}.{part}" if module in details.parts else module, a, scaled(module, b, scale))
            )
    return replace(adapter, modules=tuple(modules))


@dataclass(frozen=True)
class _TensorDetails:
    """The template from `check_adapter`, parsed as untrusted input: it may come from a bundle."""

    experts: Mapping[str, int]  # module -> number of its modules in the layout
    groups: Mapping[str, int]  # likewise, for the groups of a convolution
    targets: Mapping[str, str]  # module -> the name that patterns match
    names: Mapping[str, tuple[str, str]]  # module -> its two tensors
    shapes: Mapping[str, tuple[int, ...]]
    type_of: Callable[[str], str]
    metadata: Mapping[str, str]

    @property
    def parts(self) -> dict[str, int]:
        """Experts or groups by module."""
        return {**self.experts, **self.groups}

    @classmethod
    def parse(cls, like: Template) -> _TensorDetails:
        with reading(like) as found:
            made = cls(
                experts={module: index(count) for module, count in found.pop("experts", {}).items()},
                groups={module: index(count) for module, count in found.pop("groups", {}).items()},
                targets={module: str(target) for module, target in found.pop("targets", {}).items()},
                names={module: (str(a), str(b)) for module, (a, b) in found.pop("names", {}).items()},
                shapes={name: tuple(map(index, sizes)) for name, sizes in found.pop("shapes", {}).items()},
                type_of=types_of(found, like),
                metadata=dict(found.pop("metadata", _METADATA)),
            )
            if not (
                all(TENSOR_NAME.fullmatch(name) for pair in made.names.values() for name in pair)
                and all(1 < count <= _MAX_PARTS for count in made.parts.values())
                and all(0 < size <= MAX_DIMENSION for sizes in made.shapes.values() for size in sizes)
                and all(isinstance(text, str) for text in made.metadata.values())
            ):
                raise bad_note()
        return made


def refuse_special(like: Template, extras: Mapping[str, RawTensor]) -> None:
    """Refuse to write an adapter with more than linear layers in the form that every engine reads.

    Raises:
        AdapterRefused: It has convolutions, fused experts or extras.
    """
    if extras:
        fact = f"{next(iter(extras))} cannot be written in the form that every engine reads"
        raise AdapterRefused(fact, kind="extras", hint="leave out --pad-rank")
    details = _TensorDetails.parse(like)
    if details.parts or details.shapes:
        fact = "its convolutions or fused experts cannot be written in the form that every engine reads"
        raise AdapterRefused(fact, kind="layers", hint="leave out --pad-rank")


def write_fresh(
    adapter: Adapter,
    dtype: str,
    metadata: Mapping[str, str],
    *,
    rank: int | None = None,
    magnitudes: Mapping[str, torch.Tensor] | None = None,
) -> tuple[bytes, bytes]:
    """Serialise a tensor file and its configuration in the form that every engine reads.

    Engines disagree on patterns and on alpha, but all agree on one rank for all modules with alpha == rank. With
    `magnitudes`, DoRA's lengths (out,) of the rows of W + dW by module, the result is a DoRA adapter.

    Raises:
        AdapterRefused: A module has a higher rank than `rank`, or a value overflows the type.
    """
    largest = max(module.a.shape[0] for module in adapter.modules)
    if rank is not None and rank < largest:
        raise AdapterRefused(f"rank {rank} is too small: a module has rank {largest}", kind="rank")
    rank = rank or largest
    tensors: dict[str, RawTensor] = {}
    for module in adapter.modules:
        factors = fitted(module, rank, module.a.shape[1], module.b.shape[0])
        for name, factor in zip(usual_names(module.name), factors, strict=True):
            tensors[name] = raw_tensor(name, factor, dtype_name(dtype))
    for module_name, lengths in (magnitudes or {}).items():
        name = f"{PREFIX}{module_name}.lora_magnitude_vector"
        tensors[name] = raw_tensor(name, lengths, dtype_name(dtype))
    return encode(tensors, {**_METADATA, **metadata}), _config(adapter, rank, use_dora=bool(magnitudes))


def _config(adapter: Adapter, rank: int, *, use_dora: bool) -> bytes:
    fields: dict[str, Any] = {
        "alpha_pattern": {},
        "base_model_name_or_path": adapter.base_model or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": adapter.revision,
        "target_modules": list(adapter.target_modules),
        "task_type": adapter.task_type,
        "use_dora": use_dora,
        "use_rslora": False,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
