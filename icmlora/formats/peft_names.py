"""PEFT's names for tensors: which module each belongs to, and which half of it.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
|-- prefix -----|-- module, as the base model calls it -|-- half --|
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from icmlora.adapter.layout import PEFT_PREFIX, ModuleShape
from icmlora.errors import AdapterRefused
from icmlora.formats.refusals import refuse_tensor
from icmlora.io.safetensors import TensorHeader, TensorInfo
from registry.names import is_module_name, natural_key

_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
# Names that torch.compile, FSDP and activation checkpointing put between two modules.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class FactorPair:
    """Both factors of one module, as the file has them: `a` is (r, in), `b` is (out, r)."""

    module: str
    a: TensorInfo
    b: TensorInfo

    @property
    def shape(self) -> ModuleShape:
        """The module with its rank and widths."""
        return ModuleShape(self.module, self.a.shape[0], self.a.shape[1], self.b.shape[0])


def pair_factors(header: TensorHeader) -> tuple[FactorPair, ...]:
    """Match every `lora_A` with its `lora_B`, in natural order of the modules."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        module, half = _parse_key(tensor.name)
        known = halves.setdefault(module, {})
        if half in known:
            message = f"{tensor.name} and {known[half].name} are the same factor"
            raise AdapterRefused(message, kind="duplicate-key")
        known[half] = tensor
    return tuple(_pair(module, halves[module]) for module in sorted(halves, key=natural_key))


def _parse_key(name: str) -> tuple[str, str]:
    match = _HALF.fullmatch(name)
    module = _unwrapped(match["module"]) if match else ""
    if match is None or "base_layer" in module.split(".") or module.rpartition(".")[2] == "experts":
        refuse_tensor(name)
    if not module.startswith(PEFT_PREFIX):
        message = f"{name} does not start with {PEFT_PREFIX}"
        hint = "save it again with PEFT: icm does not guess the names that other trainers use"
        raise AdapterRefused(message, kind="prefix", hint=hint)
    module = module.removeprefix(PEFT_PREFIX)
    if not is_module_name(module):
        raise AdapterRefused(f"{name} does not name a module", kind="unknown-tensor")
    return module, match["half"]


def _unwrapped(module: str) -> str:
    plain = ".".join(part for part in module.split(".") if part not in _WRAPPERS)
    # DistributedDataParallel calls what it wraps `module`; deeper down that may be a real name.
    for prefix in ("module.", PEFT_PREFIX + "module."):
        if plain.startswith(prefix):
            return prefix.removesuffix("module.") + plain.removeprefix(prefix)
    return plain


def _pair(module: str, halves: dict[str, TensorInfo]) -> FactorPair:
    if len(halves) == 1:
        (present,) = halves.values()
        missing = "lora_B" if "A" in halves else "lora_A"
        raise AdapterRefused(f"{present.name} has no {missing}", kind="missing-half")
    a, b = halves["A"], halves["B"]
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            kind, hint = "shape", "gather the weights of a ZeRO-3 or FSDP run before saving"
            if len(tensor.shape) > 2:
                kind, hint = "conv", "train linear layers only"
            message = f"{tensor.name} has the shape {list(tensor.shape)}, not two dimensions"
            raise AdapterRefused(message, kind=kind, hint=hint)
    if a.shape[0] != b.shape[1]:
        message = f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} differ in rank"
        raise AdapterRefused(message, kind="shape")
    return FactorPair(module, a, b)
