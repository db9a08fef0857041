"""The tensors of a PEFT adapter, from a file to factors and back.

tensor file, config ──▶ factors (r, in), (out, r) with the scale folded into B  +  extras
factors, template   ──▶ the same names, ranks, shapes and types as the original, with the scale taken out again
factors alone       ──▶ the form that every engine reads: one rank, alpha == rank, no patterns
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused
from icmlora.formats.format import LoadedAdapter, Template
from icmlora.formats.peft.config import PREFIX, AdapterConfig, usual_names, with_ranks
from icmlora.formats.peft.names import without_wrappers
from icmlora.io.safetensors import FLOAT_TYPES, MAX_DIMENSION, TENSOR_NAME, RawTensor, TensorHeader, encode, raw_tensors
from icmlora.io.strict_json import parse_object
from icmlora.io.tensors import decode_float32, dtype_name, raw_tensor

if TYPE_CHECKING:
    from icmlora.formats.peft.names import FactorPair

_METADATA = {"format": "pt"}
_MAX_TEMPLATE = 64 << 20  # it names every tensor of a file, and holds the metadata of its header
_MOST_PARTS = 1024  # experts or groups of one module
_Factors = tuple[torch.Tensor, torch.Tensor]


def read_adapter(config: bytes, weights: bytes) -> LoadedAdapter:
    """Read the factors in float32 and the extras as they are."""
    from icmlora.formats.peft.check import check_adapter  # needed to read only

    checked = check_adapter(config, weights)
    summary, parsed, tensors = checked.summary, checked.config, checked.tensors
    if parsed is None or tensors is None:
        fact = f"only its original can be used: {summary.original_only}"
        raise AdapterRefused(fact, kind="original-only")
    factors = [tensor for pair in tensors.pairs for tensor in (pair.a, pair.b)]
    in_file = sorted(factors, key=lambda tensor: tensor.begin)
    values = decode_float32(weights, TensorHeader(tuple(in_file), {}))
    modules = [module for pair in tensors.pairs for module in _modules(pair, values, parsed)]
    extras = raw_tensors(weights, tensors.extras)
    label = summary.base_model or ""
    targets = summary.target_modules
    return LoadedAdapter(Adapter(label, summary.task_type, targets, tuple(modules), summary.revision), extras)


def _modules(pair: FactorPair, values: Mapping[str, torch.Tensor], config: AdapterConfig) -> list[LoraModule]:
    a, b = values[pair.a.name].flatten(1), values[pair.b.name].flatten(1)
    # The scale goes into B, as A may be the initial one, whose bits the seed search needs.
    b = b * config.scale_of(pair.target or pair.module)
    if not b.isfinite().all():
        message = f"{pair.module}: B times the scale exceeds float32"
        raise AdapterRefused(message, kind="overflow", hint="the training run diverged: take an earlier checkpoint")
    parts = _split(a, b, pair.experts, pair.groups)
    return [LoraModule(shape.module, *part) for shape, part in zip(pair.shapes, parts, strict=True)]


def _split(a: torch.Tensor, b: torch.Tensor, experts: int, groups: int) -> list[_Factors]:
    """Split the factors of a module (r, in), (out, r) into those of its experts or groups."""
    inputs, (outputs, columns) = a.shape[1], b.shape
    if experts > 1:
        # The columns of B belong to the experts in turn.
        by_expert = b.reshape(outputs, columns // experts, experts).permute(2, 0, 1).contiguous()
        return list(zip(a.reshape(experts, -1, inputs), by_expert, strict=True))
    return list(zip(a.reshape(groups, columns, inputs), b.reshape(groups, -1, columns), strict=True))


def joined(parts: Sequence[_Factors], *, experts: bool) -> _Factors:
    """Join the factors of the experts or groups of a module, in their order."""
    a = torch.cat([a for a, _ in parts])
    if experts:
        b = torch.stack([b for _, b in parts], dim=2)  # (out, r, experts)
        return a, b.reshape(len(b), -1)
    return a, torch.cat([b for _, b in parts])


def write_like(
    adapter: Adapter, like: Template, dtype: str | None, extras: Mapping[str, RawTensor]
) -> tuple[bytes, bytes]:
    """Write a tensor file and its configuration in the form of another adapter.

    Modules that `adapter` lacks become zeros. Names that a wrapper put in are left out. The configuration is the other
    one's, unless that states other ranks than the layout of the form.
    """
    config, details = AdapterConfig.read(like.config), _Details.parse(like)
    extras = _without_wrappers(extras)
    modules = {module.name: module for module in adapter.modules}
    tensors: dict[str, RawTensor] = {}
    whole = {f"{name}.{part}": name for name, count in details.parts.items() for part in range(count)}
    parts: defaultdict[str, list[ModuleShape]] = defaultdict(list)
    written: dict[str, tuple[int, float]] = {}
    is_stated = True
    for shape in like.layout:  # the parts of a module are in the order of their numbers
        parts[whole.get(shape.module, shape.module)].append(shape)
    for module, shapes in parts.items():
        if len(shapes) != details.parts.get(module, 1) or len({shape[2:] for shape in shapes}) > 1:
            raise _bad_template()
        rank = max(shape.rank for shape in shapes)  # one tensor holds all parts
        of_parts = [fitted(modules.pop(shape.module, None), rank, *shape[2:]) for shape in shapes]
        factors = joined(of_parts, experts=module in details.experts)
        target = details.targets.get(module, module)
        scale = config.scale_of(target)
        written[target] = rank * details.groups.get(module, 1), scale
        is_stated = is_stated and config.rank_of(target) == written[target][0]
        # An adapter of scale 0 does nothing, whatever its factors are.
        unscaled = factors[0], factors[1] / scale if scale else torch.zeros_like(factors[1])
        names = details.names.get(module) or usual_names(module)
        for axis, (noted, factor) in enumerate(zip(names, unscaled, strict=True)):
            kind = details.dtypes.get(noted, details.dtype) if dtype is None else dtype_name(dtype)
            size = details.shapes.get(noted, tuple(factor.shape))
            name = without_wrappers(noted)  # PEFT finds no module for the others, and loads nothing
            if not is_stated:
                size = *size[:axis], factor.shape[axis], *size[axis + 1 :]  # A (r, ...), B (out, r, ...)
            if prod(size) != factor.numel() or name in tensors or name in extras:
                raise _bad_template()
            tensors[name] = raw_tensor(name, factor.reshape(size), kind)
    if modules:
        raise ValueError(f"the template has no module {next(iter(modules))}")
    data = encode({**tensors, **extras}, details.metadata)
    return data, like.config if is_stated else with_ranks(like.config, written)


def _without_wrappers(extras: Mapping[str, RawTensor]) -> Mapping[str, RawTensor]:
    clean = {without_wrappers(name): tensor for name, tensor in extras.items()}
    return clean if len(clean) == len(extras) else extras


@dataclass(frozen=True)
class _Details:
    """The template that `check_adapter` noted, read as hostile input: a bundle may come from anywhere."""

    experts: Mapping[str, int]  # module -> how many modules of the layout it is
    groups: Mapping[str, int]  # likewise, for the groups of a convolution
    targets: Mapping[str, str]  # module -> the name that patterns match
    names: Mapping[str, tuple[str, str]]  # module -> its two tensors
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    dtype: str
    metadata: Mapping[str, str]

    @property
    def parts(self) -> dict[str, int]:
        """Experts or groups by module."""
        return {**self.experts, **self.groups}

    @classmethod
    def parse(cls, like: Template) -> _Details:
        found = parse_object((like.details or "{}").encode(), what="the template", max_bytes=_MAX_TEMPLATE)
        try:
            made = cls(
                experts={module: index(count) for module, count in found.pop("experts", {}).items()},
                groups={module: index(count) for module, count in found.pop("groups", {}).items()},
                targets={module: str(target) for module, target in found.pop("targets", {}).items()},
                names={module: (str(a), str(b)) for module, (a, b) in found.pop("names", {}).items()},
                shapes={name: tuple(map(index, sizes)) for name, sizes in found.pop("shapes", {}).items()},
                dtypes=dict(found.pop("dtypes", {})),
                dtype=found.pop("dtype", like.dtype),
                metadata=dict(found.pop("metadata", _METADATA)),
            )
            good = (
                all(TENSOR_NAME.fullmatch(name) for pair in made.names.values() for name in pair)
                and all(1 < count <= _MOST_PARTS for count in made.parts.values())
                and all(0 < size <= MAX_DIMENSION for sizes in made.shapes.values() for size in sizes)
                and {made.dtype, *made.dtypes.values()} <= FLOAT_TYPES
                and all(isinstance(text, str) for text in made.metadata.values())
            )
        except (AttributeError, TypeError, ValueError):
            raise _bad_template() from None
        if found or not good:
            raise _bad_template()
        return made


def _bad_template() -> AdapterRefused:
    return AdapterRefused("what is noted of the original's form does not fit it", kind="template")


def refuse_special(like: Template, extras: Mapping[str, RawTensor]) -> None:
    """Refuse the form that every engine reads for an adapter with more than the factors of linear layers.

    Raises:
        AdapterRefused: It has convolutions, fused experts or extras.
    """
    if extras:
        fact = f"{next(iter(extras))} has no place in the form that every engine reads"
        raise AdapterRefused(fact, kind="extras", hint="write it without --pad-rank")
    details = _Details.parse(like)
    if details.parts or details.shapes:
        fact = "its convolutions or fused experts have no place in the form that every engine reads"
        raise AdapterRefused(fact, kind="layers", hint="write it without --pad-rank")


def write_fresh(
    adapter: Adapter,
    dtype: str,
    metadata: Mapping[str, str],
    *,
    rank: int | None = None,
    magnitudes: Mapping[str, torch.Tensor] | None = None,
) -> tuple[bytes, bytes]:
    """Write a tensor file and its configuration in the form that every engine reads.

    Engines disagree on patterns and on alpha: one rank for all modules and alpha == rank mean the same to all. With
    `magnitudes`, DoRA's lengths of the rows of W + dW by module, it is a DoRA adapter.
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


def fitted(module: LoraModule | None, rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the wanted rank, filled up with zeros: (rank, in) and (out, rank)."""
    if module is None:
        return torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    missing = rank - module.a.shape[0]
    if missing < 0 or (module.a.shape[1], module.b.shape[0]) != (inputs, outputs):
        raise ValueError(f"{module.name} does not fit the template")
    return pad(module.a, (0, 0, 0, missing)), pad(module.b, (0, missing))


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
