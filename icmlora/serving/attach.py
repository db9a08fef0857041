"""Attach a fleet's adapters to a model in this process, one at a time, without writing files.

    model = attach(model, fleet, "dog-detection")     the first call inserts PEFT's layers
    model = attach(model, fleet, "cat-detection")     later calls only replace their values

Loading many adapters slows down every step of a model (peft#981), so there is a single slot. It has the modules of all
adapters attached so far; modules missing from the current adapter are zero. The scale is folded into B, so adapters can
differ in rank and scaling, which PEFT does not support when it swaps adapters from files.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import icmlora.io.quiet_bitsandbytes  # noqa: F401  # isort: skip
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, LoraLayer
from torch import nn

from icmlora.base_models.finding.tensors import BaseTensors
from icmlora.errors import BaseModelMismatch, BaseModelNotFound, DataError
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.resources.code_source import open_codes
from icmlora.fleet.resources.decoding import read_context
from icmlora.fleet.write.sources import ResolvedSource, resolve_source
from icmlora.formats.peft.initial import converted_form
from icmlora.formats.peft.tensors import rounded_like
from icmlora.io.safetensors import encode
from icmlora.io.tensors import decode_torch
from icmlora.serving.tasks import key_of, open_tasks, tasks_of
from registry.errors import StoreUnavailable

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.base_models.examples.context import TaskContext
    from icmlora.fleet.api import Fleet

Layers = Mapping[str, nn.Linear | LoraLayer]
"""Name without PEFT's parts -> linear layer of a model, wrapped by PEFT or not."""

_OTHER = 0.01
"""Relative difference that means different weights: larger than rounding, smaller than the effect of training."""
_KEPT = 256 << 20
"""Size limit in bytes of the cache of decoded adapters. The latest adapter is always kept."""
decoded_last: WeakKeyDictionary[nn.Module, OrderedDict[str, Adapter]] = WeakKeyDictionary()
"""The decoded adapters of each model, by `key_of`, oldest first."""
_FLEETS = 8
"""Maximum number of stores with cached tasks."""
SLOT = "icm"
"""PEFT's name of the adapter in a model."""


def attach(model: nn.Module, fleet: Fleet | Bundle, task: str) -> PeftModel:
    """Attach a task's adapter to a model, replacing the adapter from an earlier call.

    Warns if the model's weights differ from the task's base model, which must be on this machine for this check.
    `model.unload()` removes PEFT's layers and returns the original model.

    Outputs equal those with the adapter written by `materialize`, up to the order of sums: an adapter with a smaller
    rank than the slot is padded with zeros. For `torch.compile`, attach the largest adapter, call PEFT's
    `prepare_model_for_compiled_hotswap` and compile. Then attach the others.

    Args:
        model: A transformers model, or the result of an earlier call for it, on any device. It is changed in place.
        fleet: The store or bundle with the task. It caches the generator, so reuse the same object. Up to 256 MiB of
            recently attached adapters stay decoded for the lifetime of the model.
        task: The task's name.

    Returns:
        The model with PEFT's layers, in evaluation mode; the same object for each call. Its `task_context` is the
        context to prepend to the task's requests (`TaskContext`), or None.

    Raises:
        DataError: The adapter has more than factors of linear layers, such as a head or a bias: load its folder. Or the
            previous adapter is merged into the model: call `model.unmerge_adapter()`.
        BaseModelMismatch: The model lacks a module of the adapter. Nothing was changed.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapter, context = _plain_adapter(base, fleet, task)
    layers = dict(_linear_layers(base))
    _check_modules(layers, adapter)
    if any(SLOT in layer.merged_adapters for layer in _slot(layers).values()):
        raise DataError("the attached adapter is merged into the model", hint="call `model.unmerge_adapter()` first")
    slotted = model if isinstance(model, PeftModel) else None
    if slotted is None:
        _warn_if_other(layers, fleet, task, adapter)
    if slotted is None or not _slot(layers).keys() >= {module.name for module in adapter.modules}:
        slotted = _with_slot(model, adapter)
        layers = dict(_linear_layers(slotted.get_base_model()))
    _exchange(layers, adapter)
    vars(slotted)["task_context"] = context  # torch's types know modules and tensors only
    return slotted.eval() if slotted.training else slotted


def _plain_adapter(model: nn.Module, fleet: Fleet | Bundle, task: str) -> tuple[Adapter, TaskContext | None]:
    """Read the same adapter that `materialize` would write, and the context of the task.

    A decoded adapter is rounded to the number format of its original.
    """
    with _chosen(fleet, task) as chosen:
        codes = chosen.codes
        if (problem := _problem(chosen)) is not None:
            hint = "write it with `materialize` and load the folder"
            raise DataError(f"task {chosen.task.name!r} {problem}", hint=hint)
        context = _context_of(chosen)
        recent, key = decoded_last.setdefault(model, OrderedDict()), key_of(chosen)
        if key in recent:
            recent.move_to_end(key)
            return recent[key], context
        read, form = chosen.reader(), codes.form(chosen.task).template
    adapter = read() if chosen.source == "original" else rounded_like(read(), converted_form(form))
    recent[key] = adapter
    while len(recent) > 1 and sum(map(_bytes, recent.values())) > _KEPT:
        recent.popitem(last=False)
    return adapter, context


def _context_of(chosen: ResolvedSource) -> TaskContext | None:
    try:
        return read_context(chosen.codes.read, chosen.task.final)
    except DataError as error:  # the user's own file of the same name
        warnings.warn(f"cannot read the context of {chosen.task.name!r}: {error}", stacklevel=4)
        return None


_served = lru_cache(maxsize=_FLEETS)(tasks_of)


def _bytes(adapter: Adapter) -> int:
    return sum(module.a.nbytes + module.b.nbytes for module in adapter.modules)


@contextmanager
def _chosen(fleet: Fleet | Bundle, task: str) -> Iterator[ResolvedSource]:
    """Yield the sources of a task's adapter."""
    if isinstance(fleet, Bundle):
        with open_codes(fleet.context) as codes:
            yield resolve_source(codes, codes.get(task))
    else:
        yield _served(fleet.context).chosen(task)


def _problem(chosen: ResolvedSource) -> str | None:
    """Return why an adapter does not fit into a slot; None if it does."""
    final = chosen.task.final
    if final.format != "peft":
        return "cannot be attached: it is not in PEFT format"
    if (reason := chosen.task.not_encodable) is not None:
        return f"cannot be attached: {reason}"
    if all(extra.file is not None for extra in final.extras):
        return None
    return f"has tensors besides its LoRA factors ({', '.join(sorted(chosen.codes.form(chosen.task).tensors)[:3])})"


def _check_modules(layers: Layers, adapter: Adapter) -> None:
    for module in adapter.modules:
        found = layers.get(module.name)
        if found is None:
            raise BaseModelMismatch(f"the model has no linear layer {module.name!r}")
        linear, widths = _inner(found), (module.a.shape[1], module.b.shape[0])
        if (here := (linear.in_features, linear.out_features)) != widths:
            raise BaseModelMismatch(f"{module.name!r} has widths {widths} in the adapter but {here} in the model")


@torch.no_grad()
def _exchange(layers: Layers, adapter: Adapter) -> None:
    """Overwrite the adapter in the slot. PEFT's hotswap is slower: it walks through the model several times."""
    modules = {module.name: module for module in adapter.modules}
    for name, layer in _slot(layers).items():
        a, b = (cast(nn.Linear, factors[SLOT]).weight for factors in (layer.lora_A, layer.lora_B))
        module = modules.get(name)
        rank = 0 if module is None else len(module.a)
        if rank > len(a):
            a.data, b.data = a.new_empty(rank, a.shape[1]), b.new_empty(len(b), rank)
        if module is not None:
            a[:rank].copy_(module.a)
            b[:, :rank].copy_(module.b)
        a[rank:].zero_()
        b[:, rank:].zero_()
        scale = layer.scaling[SLOT]
        if isinstance(scale, torch.Tensor):  # PEFT makes one for `torch.compile`
            scale.fill_(1)
        else:
            layer.scaling[SLOT] = 1.0


def _warn_if_other(layers: Layers, fleet: Fleet | Bundle, task: str, adapter: Adapter) -> None:
    """Compare one layer of a model with the files of the task's base model, if they are on this machine."""
    tasks = open_tasks(None, fleet.path, command="attach") if isinstance(fleet, Bundle) else _served(fleet.context)
    try:
        found = tasks.find(task)
        if found is None:
            return
        files = BaseTensors(tasks.locate(found.base_model))
    except (BaseModelNotFound, StoreUnavailable):
        return
    name = adapter.modules[0].name
    weight = _inner(layers[name]).weight.detach()
    place = files.counterpart(f"{name}.weight", tuple(weight.shape))
    stored = None if place is None else files.read(place)
    if stored is None or not weight.is_floating_point():  # quantised weights are rounded too much to compare
        return
    expected = decode_torch(encode({"weight": stored}, {}))[1]["weight"]
    if (weight.float().cpu() - expected).norm() > _OTHER * expected.norm():
        fact = f"the model's weights differ from {found.base_model!r}, the base model of {task!r}"
        warnings.warn(f"{fact}, so its output may be meaningless", stacklevel=3)


def _linear_layers(base: nn.Module) -> Iterable[tuple[str, nn.Linear | LoraLayer]]:
    waiting = [("", base)]
    while waiting:
        prefix, module = waiting.pop()
        if isinstance(module, LoraLayer):  # do not descend: these hold two thirds of all modules
            if not isinstance(module, Embedding) and isinstance(module.get_base_layer(), nn.Linear):
                yield prefix, module
        elif isinstance(module, nn.Linear):
            yield prefix, module
        else:
            waiting += [(f"{prefix}.{name}" if prefix else name, child) for name, child in module.named_children()]


def _inner(layer: nn.Linear | LoraLayer) -> nn.Linear:
    """Return a layer without PEFT's parts."""
    return cast(nn.Linear, layer.get_base_layer()) if isinstance(layer, LoraLayer) else layer


def _slot(layers: Layers) -> dict[str, LoraLayer]:
    """Return the layers of a model's slot; empty if it has no slot."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, LoraLayer) and SLOT in layer.lora_A}


def _with_slot(model: nn.Module, adapter: Adapter) -> PeftModel:
    """Add a slot to a model, for the modules of an adapter and of the current slot."""
    known = _slot(dict(_linear_layers(model.get_base_model()))) if isinstance(model, PeftModel) else {}
    rank = max(shape.rank for shape in adapter.layout)
    names = sorted(known.keys() | {module.name for module in adapter.modules})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a second configuration: the slot is replaced
        if not isinstance(model, PeftModel):
            slotted = cast(PeftModel, get_peft_model(model, config, adapter_name=SLOT))
            return slotted.requires_grad_(False).eval()
        if SLOT in model.peft_config:
            model.delete_adapter(SLOT)
        model.add_adapter(SLOT, config)
        model.set_adapter(SLOT)
    return model.requires_grad_(False).eval()
