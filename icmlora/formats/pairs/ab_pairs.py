"""Pairs of factors as MLX-LM and llama.cpp store them: `M.lora_a` and `M.lora_b`. Never imports torch.

    linear layer    lora_a (in, r) or (r, in)    lora_b (r, out) or (out, r), depending on the format
    E experts       lora_a (E, r, in)            lora_b (E, out, r); each expert is a separate module: M.0, M.1 ...

All other tensors of a file are extras. `PairForm` holds the notes on a file's form, with which `ab_tensors.write_pairs`
writes a decoded adapter in that form.

Sources: ml-explore/mlx-lm, tuner/lora.py and models/switch_layers.py; ggml-org/llama.cpp, convert_lora_to_gguf.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import index
from typing import Any

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterSummary, Buffer, ConfigFacts, Template
from icmlora.formats.noted_form import bad_note, note, reading, types_of, types_to_note
from icmlora.formats.peft.config import MAX_RANK
from icmlora.io.safetensors import FLOAT_TYPES, ITEM_BYTES, TensorHeader, TensorInfo
from registry.names import is_module_name, natural_key

TASK_TYPE = "CAUSAL_LM"
"""Both programs run language models."""
_MAX_EXPERTS = 1024
_MAX_MODULES = 50_000


@dataclass(frozen=True)
class LoraPair:
    """Both factors of one module, or of all its experts, in the file.

    Attributes:
        module: Name of the module, without the format's own parts.
        a: The first factor.
        b: The second factor.
        a_is_turned: Whether A is stored as (in, r) instead of (r, in).
        b_is_turned: Whether B is stored as (r, out) instead of (out, r).
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    a_is_turned: bool = False
    b_is_turned: bool = False

    @property
    def experts(self) -> int:
        """Number of its modules in the layout."""
        return self.a.shape[0] if len(self.a.shape) == 3 else 1

    @property
    def rank(self) -> int:
        """The rank of each module."""
        return self.a.shape[-1] if self.a_is_turned else self.a.shape[-2]

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        """The module, or each of its experts, with rank and widths."""
        inputs = self.a.shape[-2] if self.a_is_turned else self.a.shape[-1]
        outputs = self.b.shape[-1] if self.b_is_turned else self.b.shape[-2]
        names = [self.module] if len(self.a.shape) == 2 else [f"{self.module}.{part}" for part in range(self.experts)]
        return tuple(ModuleShape(name, self.rank, inputs, outputs) for name in names)

    def check(self) -> None:
        """Refuse shapes that do not form a factor pair."""
        a, b = self.a, self.b
        if len(a.shape) not in (2, 3) or len(a.shape) != len(b.shape) or 0 in (*a.shape, *b.shape):
            raise AdapterRefused(f"{self._shapes} are not a pair of factors", kind="shape")
        ranks = self.rank, b.shape[-2] if self.b_is_turned else b.shape[-1]
        if ranks[0] != ranks[1] or a.shape[:-2] != b.shape[:-2]:
            raise AdapterRefused(f"{self._shapes} do not fit together", kind="shape", hint=_TURNED)
        if self.experts > _MAX_EXPERTS or self.rank > MAX_RANK:
            raise AdapterRefused(f"{self._shapes} have more experts or a higher rank than icm supports", kind="rank")

    @property
    def _shapes(self) -> str:
        return f"{self.a.name} {list(self.a.shape)} and {self.b.name} {list(self.b.shape)}"


_TURNED = "its factors are swapped; convert it again"


def check_orientation(pairs: Sequence[LoraPair]) -> None:
    """Refuse factors whose ranks all exceed both widths: transposed factors of square layers fit together, too.

    A single module may have such a rank if training used one rank for all modules.
    """
    if pairs and all(pair.rank > max(pair.shapes[0][2:]) for pair in pairs):
        fact = f"{pairs[0].a.name} {list(pairs[0].a.shape)} would have rank {pairs[0].rank}, which is above both widths"
        raise AdapterRefused(fact, kind="shape", hint=_TURNED)


@dataclass(frozen=True)
class SortedPairs:
    """The tensors of a file: pairs of factors in natural order of their modules, and everything else."""

    pairs: tuple[LoraPair, ...]
    extras: tuple[TensorInfo, ...]


def sort_pairs(
    tensors: Iterable[TensorInfo], suffix: str, pair: Callable[[str, TensorInfo, TensorInfo], LoraPair]
) -> SortedPairs:
    """Match every `lora_a` with its `lora_b`; other tensors are extras.

    Args:
        tensors: The tensors of a file.
        suffix: Text between a module's name and `.lora_a`.
        pair: Builds a pair from the module's name, A and B.

    Raises:
        AdapterRefused: A factor is missing, shapes do not fit, or there are other LoRA tensors.
    """
    halves: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
    extras: list[TensorInfo] = []
    for tensor in tensors:
        name, _, half = tensor.name.rpartition(".")
        if half in ("lora_a", "lora_b"):
            module = name.removesuffix(suffix)
            if module + suffix != name or not is_module_name(module):
                raise AdapterRefused(f"{tensor.name} does not name a module", kind="unknown-tensor")
            halves[module][half] = tensor
        elif "lora_" in tensor.name:
            raise AdapterRefused(f"{tensor.name}: not a tensor of this format", kind="unknown-tensor")
        else:
            extras.append(tensor)
    for found in halves.values():
        if len(found) == 1:
            (present,) = found.values()
            missing = "lora_b" if "lora_a" in found else "lora_a"
            raise AdapterRefused(f"{present.name} has no {missing}", kind="missing-half")
    ordered = ((name, halves[name]) for name in sorted(halves, key=natural_key))
    pairs = tuple(pair(name, found["lora_a"], found["lora_b"]) for name, found in ordered)
    for one in pairs:
        one.check()
    if sum(one.experts for one in pairs) > _MAX_MODULES:
        raise AdapterRefused("it has too many experts", kind="rank")
    names = Counter(shape.module for one in pairs for shape in one.shapes)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise AdapterRefused(f"{twice} is present twice", kind="duplicate-key")
    return SortedPairs(pairs, tuple(extras))


def summary_of(
    facts: ConfigFacts,
    header: TensorHeader,
    sorted_pairs: SortedPairs,
    weights: Buffer,
    *,
    form: Mapping[str, object],
    does_nothing: bool = False,
) -> AdapterSummary:
    """Check the values of an adapter, and return its summary.

    Args:
        facts: The adapter's facts about its base model.
        header: The file's header.
        sorted_pairs: Its factors and extras.
        weights: The whole file.
        form: Additional notes of the format on its form.
        does_nothing: Its scale is zero.
    """
    from icmlora.io.finite import check_finite, is_zero  # imports numpy, which listing formats does not need

    pairs = sorted_pairs.pairs
    types = {tensor.dtype for pair in pairs for tensor in (pair.a, pair.b)}
    others = {tensor.dtype for tensor in sorted_pairs.extras}
    if odd := sorted((types - FLOAT_TYPES) | (others - ITEM_BYTES.keys())):
        fact = f"it holds tensors of the type {odd[0]}, which icm does not decode"
        return original_only(facts, header, pairs, fact)
    try:
        check_finite(weights, header)
    except AdapterRefused as refusal:
        return original_only(facts, header, pairs, refusal.message, does_nothing=True)
    if does_nothing or all(is_zero(weights, pair.a) or is_zero(weights, pair.b) for pair in pairs):
        left = bool(sorted_pairs.extras)
        what = "its LoRA does nothing" if left else "does nothing"
        fact = f"{what}: B @ A is zero in every module"
        return original_only(facts, header, pairs, fact, does_nothing=not left)
    layout = tuple(shape for pair in pairs for shape in pair.shapes)
    return AdapterSummary(
        **vars(facts),
        dtype="+".join(sorted(types)),
        rank_max=max(shape.rank for shape in layout),
        parameters=sum(shape.parameters for shape in layout),
        target_modules=target_modules(shape.module for shape in layout),
        layout=layout,
        extras=sorted_pairs.extras,
        template=_noted(pairs, form),
    )


def original_only(
    facts: ConfigFacts,
    header: TensorHeader,
    pairs: Sequence[LoraPair],
    reason: str,
    *,
    does_nothing: bool = False,
) -> AdapterSummary:
    """Summarise an adapter that can have no code."""
    return AdapterSummary(
        **vars(facts),
        dtype="+".join(sorted({tensor.dtype for tensor in header.tensors})) or "none",
        rank_max=max((pair.rank for pair in pairs), default=0),
        parameters=sum(prod(tensor.shape) for tensor in header.tensors),
        target_modules=target_modules(pair.module for pair in pairs),
        layout=(),
        original_only=reason,
        does_nothing=does_nothing,
    )


def _noted(pairs: Sequence[LoraPair], form: Mapping[str, object]) -> str:
    experts = {pair.module: pair.experts for pair in pairs if len(pair.a.shape) == 3}
    return note({"experts": experts, **types_to_note([one for pair in pairs for one in (pair.a, pair.b)])}, form)


@dataclass(frozen=True)
class PairForm:
    """The note from `summary_of`, parsed as untrusted input.

    Attributes:
        experts: Module -> number of its modules in the layout.
        type_of: Returns the type of a factor by its name.
        own: The format's own notes.
    """

    experts: Mapping[str, int]
    type_of: Callable[[str], str]
    own: Mapping[str, Any]

    @classmethod
    def parse(cls, like: Template) -> PairForm:
        """Read a template.

        Raises:
            AdapterRefused: It is damaged.
        """
        with reading(like) as found:
            experts = {module: index(count) for module, count in found.pop("experts", {}).items()}
            made = cls(experts, types_of(found, like), dict(found))
            if not all(0 < count <= _MAX_EXPERTS for count in experts.values()):
                raise bad_note()
            found.clear()
        return made
