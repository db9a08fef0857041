"""Assign tensors to modules and factors by PEFT's names.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    |-- prefix -----|-- module, as in the base model -------|-- half --|

    linear         lora_A.weight      (r, in)         lora_B.weight      (out, r)
    convolution    lora_A.weight      (r, in, k...)   lora_B.weight      (out, r, 1...)
    embedding      lora_embedding_A   (r, rows)       lora_embedding_B   (dim, r)
    G groups       lora_A.weight      (r, in, k...)   lora_B.weight      (out, r / G, 1...)
    E experts      lora_A.weight      (E r, in)       lora_B.weight      (out, E r)

All other tensors are extras: heads, biases, DoRA's magnitudes, token rows, copies of base layers.

Source: huggingface/peft, utils/save_and_load.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import AdapterRefused
from icmlora.formats.peft.config import PREFIX, usual_names
from icmlora.formats.refusals import refuse_tensor
from icmlora.io.safetensors import TensorHeader, TensorInfo
from registry.names import is_module_name, natural_key, some

_HALF = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<half>[AB])(?:\.(?P<adapter>[\w-]+))?\.weight"
    r"|embedding_(?P<row_half>[AB])(?:\.(?P<of_rows>[\w-]+))?)",
    re.ASCII,
)
_MAX_GROUPS = 256
# Names that torch.compile, FSDP and activation checkpointing insert between two modules.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class FactorPair:
    """Both factors of one module in the file."""

    module: str
    a: TensorInfo
    b: TensorInfo
    target: str = ""
    """Name that patterns of the configuration match, if it is a parameter instead of the module."""
    experts: int = 1
    """Number of experts with joint factors (icmlora/formats/peft/experts.py)."""
    groups: int = 1
    """Groups of a convolution: each has its own rows of A, the same number of columns of B, and its own outputs."""

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        """The module, or each of its experts or groups, with rank and widths.

        A convolution's kernel counts as part of its input.
        """
        parts = self.experts * self.groups
        rank, outputs = self.a.shape[0] // parts, self.b.shape[0] // self.groups
        names = [self.module] if parts == 1 else [f"{self.module}.{number}" for number in range(parts)]
        return tuple(ModuleShape(name, rank, prod(self.a.shape[1:]), outputs) for name in names)

    @property
    def has_usual_names(self) -> bool:
        """Whether the tensors have the names of a linear layer's factors."""
        return (self.a.name, self.b.name) == usual_names(self.module)


@dataclass(frozen=True)
class SortedTensors:
    """The tensors of a file: pairs of factors in natural order of their modules, and everything else."""

    pairs: tuple[FactorPair, ...]
    extras: tuple[TensorInfo, ...]


def sort_tensors(header: TensorHeader) -> SortedTensors:
    """Match every A with its B; other tensors are extras.

    Raises:
        AdapterRefused: A tensor belongs to another method, a factor is missing, or shapes do not fit.
    """
    halves: dict[str, dict[str, TensorInfo]] = {}
    extras: list[TensorInfo] = []
    adapters: set[str] = set()
    for tensor in header.tensors:
        found = _parse_key(tensor.name)
        if found is None:
            extras.append(tensor)
            continue
        module, half, adapter = found
        adapters.add(adapter)
        known = halves.setdefault(module, {})
        if half in known:
            message = f"{tensor.name} and {known[half].name} are the same factor"
            raise AdapterRefused(message, kind="duplicate-key")
        known[half] = tensor
    if len(adapters) > 1:
        raise AdapterRefused(f"it holds several adapters: {some(sorted(adapters))}", kind="several")
    pairs = tuple(_pair(module, halves[module]) for module in sorted(halves, key=natural_key))
    return SortedTensors(pairs, tuple(extras))


def _parse_key(name: str) -> tuple[str, str, str] | None:
    """Return module and half of a factor and the name of its adapter, or None for an extra."""
    match = _HALF.fullmatch(name)
    if match is None:
        refuse_tensor(name)
        return None
    module = unwrapped(match["module"])
    # Some tools save without the prefix, and transformers loads such files.
    module = module.removeprefix(PREFIX)
    if not is_module_name(module):
        raise AdapterRefused(f"{name} does not name a module", kind="unknown-tensor")
    return module, match["half"] or match["row_half"], match["adapter"] or match["of_rows"] or "default"


def unwrapped(module: str) -> str:
    """Return a name without the parts inserted by torch.compile, FSDP and similar wrappers."""
    plain = without_wrappers(module)
    # DistributedDataParallel names the wrapped module `module`; deeper down that may be a real name.
    for prefix in ("module.", PREFIX + "module."):
        if plain.startswith(prefix):
            return prefix.removesuffix("module.") + plain.removeprefix(prefix)
    return plain


def without_wrappers(name: str) -> str:
    """Return a name without unambiguous wrapper parts; `module` stays, because base models may use it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def wrapper_in(name: str) -> str | None:
    """Return the part that a wrapper inserted into a tensor name; None if there is none."""
    if name == unwrapped(name):
        return None
    return next((part for part in name.split(".") if part in _WRAPPERS), "module")


def _pair(module: str, halves: dict[str, TensorInfo]) -> FactorPair:
    if len(halves) == 1:
        (present,) = halves.values()
        missing = "lora_B" if "A" in halves else "lora_A"
        raise AdapterRefused(f"{present.name} has no {missing}", kind="missing-half")
    a, b, groups = halves["A"], halves["B"], 1
    for tensor in (a, b):
        if len(tensor.shape) < 2 or 0 in tensor.shape:
            hint = "gather the weights of a ZeRO-3 or FSDP run before saving"
            message = f"{tensor.name} has the invalid shape {list(tensor.shape)}"
            raise AdapterRefused(message, kind="shape", hint=hint)
    if len(a.shape) == len(b.shape) > 2:  # in a grouped convolution, B has the columns of one group
        groups = max(1, a.shape[0] // b.shape[1])
    if groups > _MAX_GROUPS:
        raise AdapterRefused(f"{module} is a convolution of {groups:,} groups", kind="grouped-convolution")
    if a.shape[0] != groups * b.shape[1] or b.shape[0] % groups or prod(b.shape[2:]) != 1:
        message = f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} do not fit together"
        raise AdapterRefused(message, kind="shape")
    return FactorPair(module, a, b, groups=groups)
