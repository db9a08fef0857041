"""Find the modules of a base model, and check whether an adapter fits them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelMismatch
from registry.names import escape

_WRAPPED = ".base_layer"  # part of PEFT's name for a module inside a wrapped one, such as an attention


def check_fits(base: BaseModel, layout: Sequence[tuple[str, int, int, int]]) -> None:
    """Raise `BaseModelMismatch` unless the base model has every module of an adapter in the same size."""
    # layout: name, rank, input size and output size of each module.
    modules = dict(base.model.named_modules())
    places = places_of(base, [entry[0] for entry in layout])
    hint = "run `icm base add NAME PATH` with the right base model"
    if layout and not places:
        fact = f"none of the adapter's {len(layout)} modules exists in base model {base.label!r}: "
        raise BaseModelMismatch(f"{fact}{escape(layout[0][0], 200)}, ...", hint=hint)
    for name, _, inputs, outputs in layout:
        place = places.get(name)
        if place is None:
            fact = f"module {escape(name, 200)!r} of the adapter does not exist in base model {base.label!r}"
            if len(places) < len(layout) - 1:
                fact += f", and {len(layout) - len(places) - 1} more"
            raise BaseModelMismatch(fact, hint=hint)
        module = modules[place.module]
        shape = layer_shape(module)
        if shape is not None and (groups := groups_of(module)) > 1 and place.module != name:
            shape = shape[0] // groups, shape[1]
        if shape is None and is_fused(module):
            continue  # PEFT fuses the factors of single experts on loading
        if shape is None:
            fact = f"module {name!r} of the adapter is not a layer of base model {base.label!r} that supports LoRA"
            raise BaseModelMismatch(fact, hint=hint)
        if shape != (outputs, inputs):
            raise BaseModelMismatch(
                f"module {name!r}: the adapter is for a weight of shape {(outputs, inputs)} (out, in), "
                f"base model {base.label!r} has {shape}",
                hint=hint,
            )


class Place(NamedTuple):
    """The place of one LoRA in a base model."""

    module: str
    parameter: str | None = None  # a parameter that is not a layer's weight: PEFT's `target_parameters`
    number: int | None = None  # of an expert in the parameter, or of a convolution's group, with factors of its own


def places_of(base: BaseModel, names: Sequence[str]) -> dict[str, Place]:
    """Map module names in an adapter to places in the base model; omit modules that the base model lacks.

    An adapter trained with an earlier transformers may use that version's names.
    """
    modules = dict(base.model.named_modules())
    found = {name: _place_of(modules, name) for name in names}
    places = {name: place for name, place in found.items() if place is not None}
    missing = [name for name in names if name not in places]
    if not missing:
        return places
    # PEFT's tables for adapters of earlier transformers versions rename tensors. Each tensor contains its own number,
    # to identify it under its new name, alone or stacked with others.
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    tensors = {f"{prefix}{name}{suffix}": torch.tensor([[float(number)]]) for number, name in enumerate(missing)}
    import icmlora.io.quiet_bitsandbytes  # noqa: F401  # isort: skip
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    try:
        renamed = convert_peft_adapter_state_dict_for_transformers(base.model, LoraConfig(), tensors)
    except (RuntimeError, ValueError, KeyError):  # experts of a module are missing
        return places
    for key, numbers in renamed.items():
        place = key.removeprefix(prefix).removesuffix(suffix).replace(_WRAPPED, "")
        if place in modules:
            places |= {missing[int(number)]: Place(place) for number in numbers.flatten().tolist()}
    return places


def _place_of(modules: Mapping[str, nn.Module], name: str) -> Place | None:
    head, _, last = name.rpartition(".")
    owner, _, parameter = head.rpartition(".")
    number = int(last) if last.isdecimal() and len(last) < 6 else None
    for place in (
        Place(name, "weight"),  # such as a router
        Place(head, last),
        *([] if number is None else [Place(owner, parameter, number)]),
    ):
        module = modules.get(place.module)
        weight = None if module is None else module._parameters.get(place.parameter or "")
        if module is None or weight is None or layer_shape(module) is not None:
            continue
        if weight.ndim == 2 and place.number is None:
            return place
        if weight.ndim == 3 and (place.number or 0) < len(weight) and (place.number is not None or len(weight) == 1):
            return place
    if (plain := name.replace(_WRAPPED, "")) in modules:
        return Place(plain)
    is_group = number is not None and head in modules and number < groups_of(modules[head])
    return Place(head, number=number) if is_group else None


def groups_of(module: nn.Module | None) -> int:
    """Return the number of groups of a convolution; 1 for any other module."""
    return int(module.groups) if kernel_shape(module) is not None else 1  # type: ignore[union-attr, arg-type]


def is_fused(module: nn.Module) -> bool:
    """Return whether a module fuses weights that were separate modules in earlier versions, such as experts."""
    return layer_shape(module) is None and any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def layer_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (out, in) of a layer that supports LoRA, as in an adapter's layout; None for any other module."""
    if (shape := linear_shape(module)) is not None:
        return shape
    if module is None:
        return None
    if hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim"):
        rows, dim = module.weight.shape  # type: ignore[misc]  # may have more rows than `num_embeddings`
        return int(dim), int(rows)
    if (kernel := kernel_shape(module)) is not None:
        return int(module.out_channels), int(module.in_channels) * prod(kernel)  # type: ignore[arg-type]
    if is_attention(module):
        return 3 * int(module.embed_dim), int(module.embed_dim)  # type: ignore[arg-type]
    return None


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is torch's own attention, with one weight for queries, keys and values."""
    return hasattr(module, "in_proj_weight") and hasattr(module, "embed_dim")


def kernel_shape(module: nn.Module | None) -> tuple[int, ...] | None:
    """Return the size of a convolution's kernel; None for any other module."""
    if module is None or not hasattr(module, "kernel_size") or not hasattr(module, "out_channels"):
        return None
    kernel = module.kernel_size
    return tuple(kernel) if isinstance(kernel, tuple) else None


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer from its attributes; None for any other module."""
    # The weight's shape is no use: a quantised weight is packed, and GPT-2's Conv1D stores it transposed.
    for outputs, inputs in (("out_features", "in_features"), ("nf", "nx")):
        if module is not None and hasattr(module, outputs) and hasattr(module, inputs):
            return int(getattr(module, outputs)), int(getattr(module, inputs))
    return None


def matrix_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer, or of a plain convolution over patches; None for any other module."""
    kernel = kernel_shape(module)
    if module is None or kernel is None:
        return linear_shape(module)
    # 2D, without groups, and with explicit zero padding
    is_padded = getattr(module, "padding_mode", "") == "zeros" and isinstance(module.padding, tuple)
    is_plain = len(kernel) == 2 and is_padded and module.groups == 1 and not getattr(module, "transposed", True)
    return layer_shape(module) if is_plain else None


def not_matrix(base: BaseModel, layout: Iterable[tuple[str, int, int, int]]) -> str | None:
    """Return the first module of an adapter that is neither a linear layer nor a plain convolution of its size."""
    # layout: name, rank, input size and output size of each module.
    modules = dict(base.model.named_modules())
    fit = ((name, matrix_shape(modules.get(name)) == (outputs, inputs)) for name, _, inputs, outputs in layout)
    return next((name for name, is_matrix in fit if not is_matrix), None)
