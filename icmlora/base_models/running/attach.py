"""Attach one adapter to the base model temporarily, and restore the model afterwards.

    with adapted(base, adapter) as model:   base.model + adapter, through PeftModel.from_pretrained
        ...                                 on exit: the adapter is removed; the base model's own tensors never change

The adapter is never merged, because merging and subtracting does not restore the same bits. Whole parameters of an
adapter, such as heads and biases, replace the base model's while it is attached. PEFT is imported with the first
adapter, which takes seconds.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.modules import is_attention
from icmlora.base_models.running.peft_copy import write_running_copy
from icmlora.errors import BaseModelMismatch
from icmlora.formats.format import RunnableAdapter

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def adapted(base: BaseModel, adapter: RunnableAdapter | Path) -> Iterator[PeftModel]:
    """Attach an adapter to the base model inside the block; yield the model in evaluation mode.

    Pass an adapter read by a format, or a folder written by this package, never an untrusted one: PEFT evaluates
    patterns in its configuration.

    Raises:
        BaseModelMismatch: The adapter does not fit. The base model is unchanged.
    """
    with ExitStack() as stack:
        folder = adapter if isinstance(adapter, Path) else None
        if isinstance(adapter, RunnableAdapter):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="icm-")))
            write_running_copy(base, adapter, folder)
            _replace(base, adapter, stack)
            # PEFT merges into torch's attention modules and subtracts again, changing the last bits.
            names = {module.name for module in adapter.adapter.modules}
            for name, module in base.model.named_modules():
                if name in names and is_attention(module):
                    values = {key: value.clone() for key, value in module.state_dict().items()}
                    stack.callback(module.load_state_dict, values)
        assert folder is not None
        model = _attach(base, folder)
        try:
            _check_every_tensor_landed(model, base, folder)
            yield model
        finally:
            model.unload()


def _attach(base: BaseModel, folder: Path) -> PeftModel:
    import icmlora.io.quiet_bitsandbytes  # noqa: F401  # isort: skip
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # `_check_every_tensor_landed` raises errors for real problems; other warnings concern only the libraries.
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(base.model, folder, local_files_only=True).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        # The library may have inserted its layers before it failed.
        for name, module in list(base.model.named_modules()):
            inner = module
            while hasattr(inner, "base_layer"):  # two parameters of one module are wrapped twice
                inner = inner.base_layer
            if inner is not module and ".base_layer" not in name:
                parent, _, child = name.rpartition(".")
                setattr(base.model.get_submodule(parent), child, inner)
        if hasattr(base.model, "peft_config"):
            del base.model.peft_config
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BaseModelMismatch(f"the adapter cannot be applied to base model {base.label!r}: {reason}") from error


def _check_every_tensor_landed(model: PeftModel, base: BaseModel, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    # The library drops unmatched keys, so the adapter could silently equal the base model.
    tensors = load_file(folder / WEIGHTS)
    stored = {name.replace(".default.", ".") for name in tensors}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about biases of factors
        # save_embedding_layers: the default "auto" asks the hub for the base model's vocabulary size.
        present = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if stored != present:  # names from an earlier transformers
        stored = set(convert_peft_adapter_state_dict_for_transformers(base.model, LoraConfig(), tensors))
    stray = sorted(stored ^ present)
    if stray:
        where = "the adapter" if stray[0] in stored else "the adapted model"
        raise BaseModelMismatch(
            f"tensor {stray[0]!r} is only in {where}, of {len(stray)} that do not match base model {base.label!r}"
        )


def _replace(base: BaseModel, adapter: RunnableAdapter, stack: ExitStack) -> None:
    """Replace the base model's tensors with the adapter's own until the stack is closed."""
    ends = []  # input and output embeddings, whose row count depends on the vocabulary; some models have none
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError, AttributeError):
            ends.append(getattr(base.model, name)())
    for name, value in adapter.values.items():
        owner, child, old = _tensor(base, name)
        if value.is_floating_point() and not old.is_floating_point():
            fact = f"the adapter replaces {name}, which base model {base.label!r} loads in {base.load_in}"
            hint = "run `icm base add NAME PATH` without --load-in to load it in full precision"
            raise BaseModelMismatch(fact, hint=hint)
        is_larger = any(end is owner for end in ends) and old.shape[1:] == value.shape[1:]
        if not (old.shape == value.shape or is_larger or name in base.made_up):
            fact = f"{name} has the shape {list(value.shape)}, in base model {base.label!r} it is {list(old.shape)}"
            raise BaseModelMismatch(
                fact, hint="use the base model with the head and vocabulary that the adapter was trained for"
            )
        home: dict[str, Any] = owner._buffers if child in owner._buffers else owner._parameters
        stack.callback(home.__setitem__, child, old)
        new = value.to(old)
        home[child] = new if home is owner._buffers else nn.Parameter(new, requires_grad=False)
    for module, (numbers, rows) in adapter.rows.items():
        _, _, old = _tensor(base, f"{module}.weight")
        if max(numbers, default=0) >= len(old) or rows.shape[1:] != old.shape[1:]:
            fact = f"the adapter's rows for {module} do not fit base model {base.label!r}"
            raise BaseModelMismatch(fact)
        new = old.detach().clone()
        new[list(numbers)] = rows.to(old)
        new = nn.Parameter(new, requires_grad=False)
        # A head tied to the embedding gets the new rows too.
        for owner in list(base.model.modules()):
            if owner._parameters.get("weight") is old:
                stack.callback(owner._parameters.__setitem__, "weight", old)
                owner._parameters["weight"] = new


def _tensor(base: BaseModel, name: str) -> tuple[nn.Module, str, torch.Tensor]:
    place, _, child = name.rpartition(".")
    try:
        owner = base.model.get_submodule(place)
    except AttributeError:
        owner = None
    tensors = {} if owner is None else owner._parameters | owner._buffers
    if owner is None or tensors.get(child) is None:
        raise BaseModelMismatch(f"base model {base.label!r} has no {name}, which the adapter replaces")
    return owner, child, tensors[child]
