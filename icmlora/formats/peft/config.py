"""Parse `adapter_config.json` as untrusted input: the few relevant fields, and the scale.

    dW = scale * B @ A,   scale = alpha / r,   or alpha / sqrt(r) with rsLoRA,   r and alpha per module by pattern

Regular expressions in the file are never passed to `re` for matching (icmlora/formats/peft/name_patterns.py). The store
keeps the file byte for byte.

Sources: huggingface/peft, tuners/lora/config.py; rsLoRA, Kalajdzievski 2023 (arXiv 2312.03732).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.format import ConfigFacts
from icmlora.formats.peft.name_patterns import NamePattern, PatternRefused, Steps, parse_pattern
from icmlora.formats.refusals import refuse_unsupported
from icmlora.io.strict_json import parse_object
from registry.names import escape, is_module_name

PREFIX = "base_model.model."  # PEFT's prefix to a module's name in the base model
MAX_CONFIG_BYTES = 1024 * 1024
MAX_RANK = 4096
MAX_LABEL = 1024
MAX_TARGETS = 10_000

_Number = TypeVar("_Number", int, float)

# PEFT's defaults for missing keys.
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8
# B times the scale must stay within float32, whose maximum is 3e38.
_MAX_SCALE = 1e30


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a PEFT LoRA configuration that define the meaning of its tensors."""

    base_model: str | None  # the label of the base model: opaque text, never opened or fetched
    revision: str | None
    task_type: str | None
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[NamePattern, int], ...]
    alpha_pattern: tuple[tuple[NamePattern, float], ...]
    target_parameters: tuple[str, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> AdapterConfig:
        """Read a configuration; refuse it unless it is a plain LoRA's."""
        refuse_unsupported(fields_of(data))
        return cls.read(data)

    @classmethod
    def read(cls, data: bytes) -> AdapterConfig:
        """Read a configuration that `parse` has already accepted."""
        fields = fields_of(data)
        reader = _Reader(fields)
        return cls(
            base_model=reader.text("base_model_name_or_path"),
            revision=reader.text("revision"),
            task_type=reader.text("task_type"),
            rank=reader.rank("r", fields.get("r", _DEFAULT_RANK)),
            alpha=reader.number("lora_alpha", fields.get("lora_alpha", _DEFAULT_ALPHA)),
            use_rslora=reader.flag("use_rslora"),
            rank_pattern=tuple((key, reader.rank("rank_pattern", value)) for key, value in reader.map("rank_pattern")),
            alpha_pattern=tuple(
                (key, reader.number("alpha_pattern", value)) for key, value in reader.map("alpha_pattern")
            ),
            target_parameters=reader.names("target_parameters"),
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, named as in the base model."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor between B @ A and dW for a module, named as in the base model."""
        alpha, rank = _first_match(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _first_match(patterns: Sequence[tuple[NamePattern, _Number]], module: str, default: _Number) -> _Number:
    if not patterns:
        return default
    try:
        return next((value for pattern, value in patterns if pattern.matches(module)), default)
    except PatternRefused as refused:
        fact = f"a key of rank_pattern or alpha_pattern cannot be used: {refused}"
        raise AdapterRefused(fact, kind="pattern") from None


def usual_names(module: str) -> tuple[str, str]:
    """Return PEFT's names for the two factors of a linear layer."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def with_ranks(data: bytes, modules: Mapping[str, tuple[int, float]]) -> bytes:
    """Return a configuration with other ranks; fields about neither ranks nor scales are unchanged.

    Args:
        data: The configuration.
        modules: Rank and scale of each module, by the name that patterns match.
    """
    alphas = {module: rank * scale for module, (rank, scale) in modules.items()}
    rank = Counter(rank for rank, _ in modules.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    fields = {
        **fields_of(data),
        "r": rank,
        "lora_alpha": _whole(alpha),
        "use_rslora": False,
        "rank_pattern": {_exactly(module): own for module, (own, _) in modules.items() if own != rank},
        "alpha_pattern": {_exactly(module): _whole(own) for module, own in alphas.items() if own != alpha},
    }
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _exactly(module: str) -> str:
    """Return the pattern that matches exactly one module: PEFT also matches a plain name as a suffix."""
    return "^" + module.replace(".", r"\.")


def _whole(number: float) -> float:
    """Return an integral number as int: some readers of `lora_alpha` accept only ints."""
    return int(number) if number.is_integer() else number


def read_facts(data: bytes) -> ConfigFacts:
    """Read the facts common to all PEFT methods; refuse only a damaged configuration."""
    reader = _Reader(fields_of(data))
    labels = (reader.text(key) for key in ("base_model_name_or_path", "revision", "task_type"))
    return ConfigFacts(*labels)


def stated_rank(data: bytes) -> int:
    """Return the rank in a configuration; 0 if missing."""
    rank = fields_of(data).get("r")
    return rank if type(rank) is int and 0 < rank < 2**31 else 0


def stated_targets(data: bytes) -> tuple[str, ...]:
    """Return the target modules that a configuration lists."""
    targets = fields_of(data).get("target_modules")
    if not isinstance(targets, list) or len(targets) > MAX_TARGETS:
        return ()
    return tuple(sorted(name for name in targets if isinstance(name, str) and is_module_name(name)))


def fields_of(data: bytes) -> dict[str, Any]:
    """Parse a configuration.

    Raises:
        AdapterRefused: It is damaged.
    """
    return parse_object(data, what="adapter_config.json", max_bytes=MAX_CONFIG_BYTES)


class _Reader:
    """Typed access to the parsed fields; a value of the wrong type is refused with the field's name."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def text(self, key: str) -> str | None:
        value = self._fields.get(key)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise self._wrong(key, value, "text")
        if len(value) > MAX_LABEL:
            raise UnsafeInput(f"{key} has {len(value):,} characters", kind="limits")
        return value

    def flag(self, key: str) -> bool:
        value = self._fields.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._wrong(key, value, "true or false")

    def names(self, key: str) -> tuple[str, ...]:
        value = self._fields.get(key) or ()
        is_list = isinstance(value, list | tuple) and len(value) <= MAX_TARGETS
        if is_list and all(isinstance(name, str) and is_module_name(name) for name in value):
            return tuple(value)
        raise self._wrong(key, value, "a list of names")

    def rank(self, key: str, value: object) -> int:
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number from 1")
        if value > MAX_RANK:
            raise AdapterRefused(f"{key} has rank {escape(str(value), 32)}, more than {MAX_RANK:,}", kind="rank")
        return value

    def number(self, key: str, value: object) -> float:
        # An int of 400 digits is valid JSON but overflows float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_SCALE:
            raise self._wrong(key, value, "a number up to 1e30")
        return float(value)

    def map(self, key: str) -> list[tuple[NamePattern, object]]:
        value = self._fields.get(key)
        if value is None or value == {}:
            return []
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        steps, found = Steps(), []
        for name, item in value.items():
            try:
                found.append((parse_pattern(name, steps), item))
            except PatternRefused as refused:
                fact = f"{key} has the key {escape(name, 120)!r}, which icm does not read: {refused}"
                hint = f"write {key} with module names in full"
                raise AdapterRefused(fact, kind="pattern", hint=hint) from None
        return found

    def _wrong(self, key: str, value: object, wanted: str) -> AdapterRefused:
        message = f"{key} is {escape(repr(value), 48)}, not {wanted}"
        return AdapterRefused(message, kind="config")
