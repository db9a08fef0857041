"""`adapter_config.json`, read as hostile input: the few fields that matter, the scale, and what is refused by name.

    dW = scale * B @ A,   scale = alpha / r,   or alpha / sqrt(r) with rsLoRA,   r and alpha per module by pattern

No regular expression of the file is ever run. Whoever stores the file keeps everything else in it byte for byte.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.format import ConfigFacts
from icmlora.io.strict_json import parse_object
from registry.names import escape, is_module_name

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.)+")
_LITERAL_DOT = "\\"  # stands for an escaped dot inside `characters`; no module name holds a backslash


@dataclass(frozen=True)
class ModulePattern:
    """A key of `rank_pattern` or `alpha_pattern`, matched as PEFT does but without running a regular expression."""

    # PEFT runs `re.match(rf"(.*\.)?({key})$", module)`. A dotted name is a regular expression too, whose dots match any
    # character. Such keys, with an optional leading `^` and with a backslash before a literal dot, are what trainers
    # write: they are compared character by character, in linear time. Any other key is refused.

    characters: str  # the name or the end of one; a dot matches any character
    anchored: bool  # whether the whole name has to match, not just its end

    @classmethod
    def parse(cls, key: str) -> ModulePattern | None:
        """Read a key, or return None if it is anything but a plain name."""
        if not _PLAIN.fullmatch(key):
            return None
        return cls(key.removeprefix("^").replace("\\.", _LITERAL_DOT), key.startswith("^"))

    def matches(self, module: str) -> bool:
        """Return whether PEFT would apply the key to this module."""
        before = len(module) - len(self.characters)
        if before < 0 or (before > 0 and (self.anchored or module[before - 1] != ".")):
            return False
        return all(
            wanted == "." or (found == "." if wanted == _LITERAL_DOT else wanted == found)
            for wanted, found in zip(self.characters, module[before:], strict=True)
        )


MAX_CONFIG_BYTES = 1024 * 1024
MAX_RANK = 4096
MAX_LABEL = 1024
MAX_TARGETS = 10_000

# PEFT's own defaults for keys that the file leaves out.
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a PEFT LoRA configuration that decide what its tensors mean."""

    base_model: str | None  # the label of the base model: opaque text, never opened or fetched
    revision: str | None
    task_type: str | None
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[ModulePattern, int], ...]
    alpha_pattern: tuple[tuple[ModulePattern, float], ...]

    @classmethod
    def parse(cls, data: bytes) -> AdapterConfig:
        """Read a configuration; refuse one that is not a plain LoRA's."""
        from icmlora.formats.refusals import refuse_unsupported  # needed to read only

        refuse_unsupported(_fields(data))
        return cls.read(data)

    @classmethod
    def read(cls, data: bytes) -> AdapterConfig:
        """Read a configuration that `parse` has taken before."""
        fields = _fields(data)
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
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, named as in the base model."""
        return next((rank for pattern, rank in self.rank_pattern if pattern.matches(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor between B @ A and dW for a module, named as in the base model."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if pattern.matches(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_facts(data: bytes) -> ConfigFacts:
    """Read what every PEFT configuration says, whatever the method; refuse only what is damaged."""
    reader = _Reader(_fields(data))
    labels = (reader.text(key) for key in ("base_model_name_or_path", "revision", "task_type"))
    return ConfigFacts(*labels)


def stated_rank(data: bytes) -> int:
    """Return the rank that a configuration states; 0 if it states none."""
    rank = _fields(data).get("r")
    return rank if type(rank) is int and 0 < rank < 2**31 else 0


def stated_targets(data: bytes) -> tuple[str, ...]:
    """Return the target modules that a configuration lists."""
    targets = _fields(data).get("target_modules")
    if not isinstance(targets, list) or len(targets) > MAX_TARGETS:
        return ()
    return tuple(sorted(name for name in targets if isinstance(name, str) and is_module_name(name)))


def _fields(data: bytes) -> dict[str, Any]:
    return parse_object(data, what="adapter_config.json", max_bytes=MAX_CONFIG_BYTES)


class _Reader:
    """Typed access to the parsed fields; a value of the wrong kind is refused with the field's name."""

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

    def rank(self, key: str, value: object) -> int:
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number from 1")
        if value > MAX_RANK:
            raise AdapterRefused(f"{key} holds the rank {escape(str(value), 32)}", kind="rank")
        return value

    def number(self, key: str, value: object) -> float:
        # An int of 400 digits is valid JSON but no float.
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
            raise self._wrong(key, value, "a number up to 1e9")
        return float(value)

    def map(self, key: str) -> list[tuple[ModulePattern, object]]:
        value = self._fields.get(key)
        if value is None:
            return []
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return [(self._pattern(key, name), item) for name, item in value.items()]

    def _pattern(self, key: str, name: str) -> ModulePattern:
        pattern = ModulePattern.parse(name)
        if pattern is None:
            raise AdapterRefused(
                f"{key} has the key {escape(name, 120)!r}, which is not a plain module name, and icm runs no patterns",
                kind="pattern",
                hint=f"write {key} with module names in full",
            )
        return pattern

    def _wrong(self, key: str, value: object, wanted: str) -> AdapterRefused:
        message = f"{key} is {escape(repr(value), 48)}, not {wanted}"
        return AdapterRefused(message, kind="config")
