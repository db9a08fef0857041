"""Assign the tensors of a single-file adapter to modules and their parts.

    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight
    |---------------- stem ----------------|--- part -------|

    down    (r, in[, k, k])      mid     (r, r, k, k), if a convolution is split in three
    up      (out, r[, 1, 1])     alpha   one number; dW = alpha / r * up @ down

Programs differ in stems and parts; a `Naming` describes one of them. Tensors that match none of its styles are extras.

Sources: kohya-ss/sd-scripts, networks/lora.py; KohakuBlueleaf/LyCORIS, lycoris/modules.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import AdapterRefused
from icmlora.formats.peft.config import MAX_RANK
from icmlora.io.safetensors import FLOAT_TYPES, TensorHeader, TensorInfo
from registry.names import is_module_name, natural_key

NUMBERS = FLOAT_TYPES | {"I64", "I32", "I16"}
"""Types of an alpha: some trainers save it as the integer from their settings."""

FactorPart = Literal["down", "up", "mid", "alpha"]

Scales = Callable[[Mapping[str, str], str, int], float]
"""Metadata of the header, module and rank -> the factor between up @ down and dW, if the file has no alpha."""

Restated = Callable[[Mapping[str, str], Mapping[str, int]], Mapping[str, str]]
"""Metadata of the header, module -> the rank to write -> the metadata to write."""

# A LoRA factor in any naming; if the file's own naming does not match it, it belongs to another naming.
_FACTOR = re.compile(r"(?P<stem>.+?)[._](lora\d?[._](down|up|[AB])|lora_linear_layer\.(down|up))(\.default)?\.weight")
# Factors of methods other than LoRA, as LyCORIS names them.
_OTHER_METHODS: Mapping[re.Pattern[str], str] = {
    re.compile(r".+\.hada_(w1_[ab]|w2_[ab]|t[12])"): "LoHa",
    re.compile(r".+\.lokr_(w1|w2|w1_[ab]|w2_[ab]|t[12])"): "LoKr",
    re.compile(r".+\.(oft_blocks|oft_diag|oft_R(\.weight)?)"): "OFT",
    re.compile(r".+\.(b1|bm)\.weight"): "GLoRA",
    re.compile(r".+\.on_input"): "IA3",
}


def other_method(key: str) -> str | None:
    """Return the method of a tensor name, if it is not LoRA; None otherwise."""
    return next((name for pattern, name in _OTHER_METHODS.items() if pattern.fullmatch(key)), None)


@dataclass(frozen=True)
class Style:
    """Names of the two factors of a module; `{}` is its stem, or `{parent}` and `{leaf}` are the parts of the stem."""

    down: str
    up: str

    def names(self, stem: str) -> tuple[str, str]:
        """Return the names of both factors."""
        parent, _, leaf = stem.rpartition(".")
        return tuple(name.format(stem, parent=parent, leaf=leaf) for name in (self.down, self.up))  # type: ignore[return-value]

    def split(self, key: str) -> tuple[str, FactorPart] | None:
        """Return the stem and the part of a factor, or None for another tensor."""
        for part, pattern in self._patterns.items():
            if (match := pattern.fullmatch(key)) is not None:
                return ".".join(match.groups()), part
        return None

    @cached_property
    def _patterns(self) -> dict[FactorPart, re.Pattern[str]]:
        def pattern(name: str) -> re.Pattern[str]:
            parts = re.split(r"\{\}|\{parent\}|\{leaf\}", name)
            return re.compile("(.+)".join(map(re.escape, parts)))

        return {"down": pattern(self.down), "up": pattern(self.up)}


@dataclass(frozen=True)
class Naming:
    """A program's names for the tensors of an adapter.

    Attributes:
        stem: Pattern of a module's stem.
        styles: Names of factors, the usual style first.
        module: Converts a stem to a dotted name with separate layer numbers.
        stem_of: Inverse of `module`.
        is_mark: Returns whether a tensor name identifies this naming. Default: names of factors do.
    """

    stem: re.Pattern[str]
    styles: tuple[Style, ...]
    module: Callable[[str], str] = str
    stem_of: Callable[[str], str] = str
    is_mark: Callable[[str], bool] | None = None

    def owns(self, keys: Iterable[str]) -> bool:
        """Return whether a file with these tensor names uses this naming."""
        return any(map(self.is_mark or self._split, keys))

    def split(self, key: str) -> tuple[str, FactorPart, int] | None:
        """Return stem, part and style number of a tensor; None if it is not a factor."""
        for suffix, part in _SCALARS.items():
            stem = key.removesuffix(suffix)
            if stem != key and self.stem.fullmatch(stem):
                return stem, part, 0
        return self._split(key)

    def _split(self, key: str) -> tuple[str, FactorPart, int] | None:
        for number, style in enumerate(self.styles):
            found = style.split(key)
            if found is not None and self.stem.fullmatch(found[0]):
                return *found, number
        return None


_SCALARS: Mapping[str, FactorPart] = {".alpha": "alpha", ".lora_mid.weight": "mid"}


@dataclass(frozen=True)
class Factors:
    """The tensors of one module in the file."""

    module: str
    style: int
    down: TensorInfo
    up: TensorInfo
    mid: TensorInfo | None = None
    alpha: TensorInfo | None = None

    @property
    def shape(self) -> ModuleShape:
        """Name, rank and widths; a convolution's kernel counts as part of its input."""
        inputs = prod(self.down.shape[1:]) * (1 if self.mid is None else prod(self.mid.shape[2:]))
        return ModuleShape(self.module, self.up.shape[1], inputs, self.up.shape[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution, empty for a linear layer."""
        return self.down.shape[2:] if self.mid is None else self.mid.shape[2:]


@dataclass(frozen=True)
class SortedFile:
    """The tensors of a file: factors in natural order of their modules, and everything else."""

    factors: tuple[Factors, ...]
    extras: tuple[TensorInfo, ...]
    other_method: str | None = None
    """Another method that the file uses in addition to or instead of LoRA, and that cannot have a code."""


def sort_file(header: TensorHeader, naming: Naming) -> SortedFile:
    """Match the factors of each module.

    Raises:
        AdapterRefused: A factor is missing or belongs to another naming, or shapes do not fit.
    """
    parts: defaultdict[str, dict[FactorPart, TensorInfo]] = defaultdict(dict)
    styles: dict[str, int] = {}
    extras: list[TensorInfo] = []
    methods: dict[str, None] = {}
    foreign: TensorInfo | None = None
    for tensor in header.tensors:
        found = naming.split(tensor.name)
        if found is None:
            method = other_method(tensor.name)
            methods |= {} if method is None else {method: None}
            foreign = foreign or (tensor if method is None and _FACTOR.fullmatch(tensor.name) else None)
            extras.append(tensor)
            continue
        stem, part, style = found
        if part in parts[stem]:
            message = f"{tensor.name} and {parts[stem][part].name} are the same part of a module"
            raise AdapterRefused(message, kind="duplicate-key")
        parts[stem][part] = tensor
        if part in ("down", "up"):
            styles[stem] = style
    own = next((tensor.name for some in parts.values() for tensor in some.values()), None)
    if foreign is not None and own is not None:
        fact = f"it mixes two naming schemes: {own} and {foreign.name}"
        raise AdapterRefused(fact, kind="two-namings", hint="save it with one program, or split it into two files")
    lonely = {stem: some for stem, some in parts.items() if some.keys() == {"alpha"} and methods}
    extras += [some["alpha"] for some in lonely.values()]
    stems = sorted(parts.keys() - lonely.keys(), key=natural_key)
    factors = tuple(_factors(naming.module(stem), styles.get(stem, 0), parts[stem]) for stem in stems)
    _check_modules(factors)
    return SortedFile(factors, tuple(extras), " and ".join(methods) or None)


def _check_modules(factors: tuple[Factors, ...]) -> None:
    names = [factor.module for factor in factors]
    for name in names:
        if not is_module_name(name):
            raise AdapterRefused(f"{name} does not name a module", kind="unknown-tensor")
    if len(set(names)) < len(names):
        raise AdapterRefused("two modules have the same name", kind="duplicate-key")
    # Transposed factors of square layers also fit together; then all ranks exceed the widths.
    if factors and all(one.shape.rank > max(one.shape.inputs, one.shape.outputs) for one in factors):
        down, up = factors[0].down, factors[0].up
        raise AdapterRefused(f"{_shown(down)} and {_shown(up)} are transposed", kind="shape", hint=_ORIENTATION)
    with_alpha = [factor for factor in factors if factor.alpha is not None]
    if with_alpha and len(with_alpha) < len(factors):
        without = next(factor for factor in factors if factor.alpha is None)
        fact = f"{without.down.name} has no alpha but other modules have one, so its scale is unknown"
        raise AdapterRefused(fact, kind="alpha", hint="download the file again, or save it again where it was trained")


def _factors(module: str, style: int, parts: Mapping[FactorPart, TensorInfo]) -> Factors:
    for part, other in (("down", "up"), ("up", "down")):
        if part not in parts:
            present = next(iter(parts.values()))
            fact = f"{present.name} has no lora_{part} of the same module"
            raise AdapterRefused(fact, kind="missing-half", hint=f"it needs lora_{part} and lora_{other}")
    down, up, mid, alpha = parts["down"], parts["up"], parts.get("mid"), parts.get("alpha")
    for tensor in (down, up):
        if len(tensor.shape) < 2 or 0 in tensor.shape:
            raise AdapterRefused(f"{tensor.name} has the invalid shape {list(tensor.shape)}", kind="shape")
        if tensor.dtype not in FLOAT_TYPES:
            raise AdapterRefused(f"{tensor.name} has the unsupported type {tensor.dtype}", kind="dtype")
    inner = down.shape[0] if mid is None else mid.shape[0]
    if inner != up.shape[1] or prod(up.shape[2:]) != 1 or (mid is not None and not _is_core(mid, down)):
        if mid is None and down.shape[-1] == up.shape[0] and len(down.shape) == 2:
            fact = f"{_shown(down)} and {_shown(up)} are transposed or swapped"
            raise AdapterRefused(fact, kind="shape", hint=_ORIENTATION)
        fact = f"{_shown(down)} and {_shown(up)} do not fit together"
        raise AdapterRefused(fact, kind="shape", hint=_ORIENTATION)
    if up.shape[1] > MAX_RANK:
        raise AdapterRefused(f"{up.name} has rank {up.shape[1]:,}, more than {MAX_RANK:,}", kind="rank")
    if alpha is not None and (alpha.shape not in ((), (1,)) or alpha.dtype not in NUMBERS):
        fact = f"{alpha.name} is {alpha.dtype} {list(alpha.shape)}, not one number"
        raise AdapterRefused(fact, kind="alpha")
    return Factors(module, style, down, up, mid, alpha)


_ORIENTATION = "down is (r, in) and up is (out, r)"


def _shown(tensor: TensorInfo) -> str:
    return f"{tensor.name} {list(tensor.shape)}"


def _is_core(mid: TensorInfo, down: TensorInfo) -> bool:
    """Return whether a tensor can be the core between the factors of a convolution."""
    return len(mid.shape) > 2 and mid.shape[1] == down.shape[0] and prod(down.shape[2:]) == 1
