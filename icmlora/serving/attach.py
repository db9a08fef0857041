"""Put the adapters of a fleet into a model of this process, one after the other in one slot, without any folder.

    model = attach(model, fleet, "dog-detection")     the first time, PEFT's layers are put in
    model = attach(model, fleet, "cat-detection")     from then on their values are exchanged

Adapters that pile up in a model make each of its steps slower (peft#981), so there is one slot. It has the modules of
all adapters that were in it; those that an adapter does not have are zero meanwhile. The scale is folded into B, so
adapters of different ranks and scalings take turns, which PEFT refuses of folders.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import icmlora.io.quiet_bitsandbytes  # noqa: F401  # isort: skip
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, LoraLayer
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn

from icmlora.base_models.finding.tensors import BaseTensors
from icmlora.errors import BaseModelMismatch, BaseModelNotFound, DataError
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.formats.peft.peft import CONFIG_NAME, PEFT, WEIGHTS_NAME
from icmlora.io.safetensors import encode
from icmlora.io.tensors import decode_torch
from icmlora.serving.tasks import open_tasks

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.fleet.api import Fleet

_OTHER = 0.01
"""From which relative difference on weights are others: more than rounding makes, less than a training does."""
SLOT = "icm"
"""PEFT's name of the adapter in a model."""


def attach(model: nn.Module, fleet: Fleet | Bundle, task: str) -> PeftModel:
    """Put the adapter of a task into a model, in place of the one that this function put there before.

    It warns if the model's weights are not those of the task's base model, where that is on this machine: the widths
    alone may fit. `model.unload()` takes PEFT's layers out again and returns the model as it was.

    The outputs are those of the model with the folder that `materialize` writes, up to the order of sums: an adapter of
    a smaller rank than the slot's is filled with zeros. For `torch.compile`, attach the largest adapter, call PEFT's
    `prepare_model_for_compiled_hotswap`, compile, and go on.

    Args:
        model: A transformers model, or what this function returned for it, on any device. It is changed in place.
        fleet: Where the task is.
        task: Its name.

    Returns:
        The model with PEFT's layers, in evaluation mode; the same object again and again.

    Raises:
        DataError: The adapter has more than factors of linear layers, such as a head or a bias: load its folder.
        BaseModelMismatch: The model does not have a module of the adapter. Nothing was changed.
    """
    adapter = _plain_adapter(fleet, task)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_modules(base, adapter)
    slotted = model if isinstance(model, PeftModel) else None
    if slotted is None:
        _warn_if_other(base, fleet, task, adapter)
    if slotted is None or not _slot_modules(slotted) >= {module.name for module in adapter.modules}:
        slotted = _with_slot(model, adapter)
    state = {}
    for module in adapter.modules:
        place = f"base_model.model.{module.name}"
        state[f"{place}.lora_A.{SLOT}.weight"] = module.a
        state[f"{place}.lora_B.{SLOT}.weight"] = module.b
    # Of the configuration it reads the scaling alone.
    hotswap_adapter_from_state_dict(slotted, state, SLOT, LoraConfig(r=1, lora_alpha=1))
    return slotted.eval()


def _plain_adapter(fleet: Fleet | Bundle, task: str) -> Adapter:
    """Read the very adapter that `materialize` would write: a code is rounded to the number format of its original."""
    files = fleet.read_files(task)
    hint = "write it with `materialize`, and load the folder"
    if WEIGHTS_NAME not in files:
        raise DataError(f"task {task!r} cannot be attached: it is not in PEFT's format", hint=hint)
    config, weights = files[CONFIG_NAME], files[WEIGHTS_NAME]
    found = PEFT.inspect(config, weights)
    if found.original_only is not None:
        raise DataError(f"task {task!r} cannot be attached: {found.original_only}", hint=hint)
    loaded = PEFT.read(config, weights)
    if loaded.extras:
        names = ", ".join(sorted(loaded.extras)[:3])
        raise DataError(f"task {task!r} has more than factors of LoRA ({names})", hint=hint)
    return loaded.adapter


def _check_modules(base: nn.Module, adapter: Adapter) -> None:
    linear = dict(_linear_layers(base))
    for module in adapter.modules:
        found = linear.get(module.name)
        if found is None:
            raise BaseModelMismatch(f"the model has no linear layer {module.name!r}")
        if (found.in_features, found.out_features) != (module.a.shape[1], module.b.shape[0]):
            widths = module.a.shape[1], module.b.shape[0]
            fact = f"{module.name!r} has widths {widths} in the adapter, {found.in_features, found.out_features} here"
            raise BaseModelMismatch(fact)


def _warn_if_other(base: nn.Module, fleet: Fleet | Bundle, task: str, adapter: Adapter) -> None:
    """Compare one layer of a model with the files of the task's base model, if they are on this machine."""
    tasks = open_tasks(*((None, fleet.path) if isinstance(fleet, Bundle) else (fleet.path, None)), command="attach")
    if (found := tasks.find(task)) is None:
        return
    try:
        files = BaseTensors(tasks.locate(found.base_model))
    except BaseModelNotFound:
        return
    linear, name = dict(_linear_layers(base)), adapter.modules[0].name
    weight = linear[name].weight.detach()
    place = files.counterpart(f"{name}.weight", tuple(weight.shape))
    stored = None if place is None else files.read(place)
    if stored is None or not weight.is_floating_point():  # in few bits it is rounded too much to tell
        return
    expected = decode_torch(encode({"weight": stored}, {}))[1]["weight"]
    if (weight.float().cpu() - expected).norm() > _OTHER * expected.norm():
        fact = f"the weights of the model are not those of {found.base_model!r}, which {task!r} is for"
        warnings.warn(f"{fact}: its answers may make no sense", stacklevel=3)


def _linear_layers(base: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    """Yield the linear layers by their names without PEFT's parts."""
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, Embedding):
            inner = module.get_base_layer()
            if isinstance(inner, nn.Linear):
                yield name, inner
        elif isinstance(module, nn.Linear) and ".base_layer" not in name and ".lora_" not in name:
            yield name, module


def _slot_modules(model: PeftModel) -> set[str]:
    """Return the modules that the slot of a model has; none if it has no slot."""
    layers = model.get_base_model().named_modules()
    return {name for name, module in layers if isinstance(module, LoraLayer) and SLOT in module.lora_A}


def _with_slot(model: nn.Module, adapter: Adapter) -> PeftModel:
    """Give a model a slot with the modules of an adapter, and those of the slot that it had."""
    known = _slot_modules(model) if isinstance(model, PeftModel) else set()
    rank = max(shape.rank for shape in adapter.layout)
    names = sorted(known | {module.name for module in adapter.modules})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a second configuration: the slot is made anew
        if not isinstance(model, PeftModel):
            slotted = cast(PeftModel, get_peft_model(model, config, adapter_name=SLOT))
            return slotted.requires_grad_(False)
        if SLOT in model.peft_config:
            model.delete_adapter(SLOT)
        model.add_adapter(SLOT, config)
        model.set_adapter(SLOT)
    return model.requires_grad_(False)
