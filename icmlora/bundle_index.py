"""What a bundle says of itself: its generator, its tasks, and the parts that follow in the file.

    BundleIndex
    |-- generator   BundledGenerator
    |-- tasks       BundledTask, by name
    `-- parts       Part (digest, size), in the order of the file; the others refer to them by digest

A part has no offset of its own: it begins where the one before it ends, so parts cannot overlap or leave holes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from icmlora.adapter_config import MAX_CONFIG_BYTES
from icmlora.errors import BundleError, UnsafeInput
from icmlora.layout import ModuleShape, target_modules
from icmlora.tensorfile import MAX_FILE_BYTES

MAX_CODE_BYTES = 1024**3
MAX_CARD_BYTES = 64 * 1024
"""A longer model card stays behind: it says nothing that writing an adapter needs."""


@dataclass(frozen=True)
class Part:
    """A run of bytes in the file."""

    digest: str
    """SHA-256 of its bytes, in hexadecimal; also its name."""
    size: int


@dataclass(frozen=True)
class BundledGenerator:
    """The generator that all codes of the bundle belong to."""

    blob: str
    """Its part."""
    version: int
    """Which one it was of its base model, from 1."""
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    """What its training measured."""


@dataclass(frozen=True)
class Measured:
    """What a code kept on some held-out text."""

    data: str
    """SHA-256 of the text."""
    nats_per_token: float
    tokens: int
    utf8_bytes: int
    retained_gain: float | None
    dw_error: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class BundledTask:
    """One task: its code, and what is known of the original adapter, which is not in the bundle."""

    name: str
    code: str
    """Its part."""
    dw_error: float | None
    """Relative squared error of the decoded dW, as it was measured when the code was made."""
    weights: str
    """SHA-256 of the original `adapter_model.safetensors`."""
    weights_size: int
    config: str
    """Its part: the original `adapter_config.json`."""
    card: str | None
    """Its part: the original model card, if it was short."""
    dtype: str
    """Of the original: "F32", "F16", "BF16", or several joined with "+"."""
    step: int | None
    """The original's training step, if it is known."""
    is_generated: bool
    """Nobody trained the original: a generator made it from samples of the task."""
    layout: tuple[ModuleShape, ...]
    measured: Measured | None

    @property
    def rank_max(self) -> int:
        """Largest rank of a module."""
        return max(shape.rank for shape in self.layout)

    @property
    def parameters(self) -> int:
        """Values of the original."""
        return sum(shape.parameters for shape in self.layout)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names as a configuration gives them."""
        return target_modules(shape.module for shape in self.layout)

    @property
    def retained_gain(self) -> float | None:
        """What the code kept of the original's gain, if it was measured."""
        return None if self.measured is None else self.measured.retained_gain

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that belong to this task."""
        return (self.code, self.config) if self.card is None else (self.code, self.config, self.card)


@dataclass(frozen=True)
class BundleIndex:
    """Everything in a bundle but the bytes of its parts."""

    base_model: str
    """Label of the base model, as adapters name it."""
    generator: BundledGenerator
    tasks: tuple[BundledTask, ...]
    """By name, without regard to case."""
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        """Check that names and parts fit together.

        Raises:
            BundleError: No task, a task or a part twice, or a part that is missing or that nothing refers to.
            UnsafeInput: A part that is larger than one of its kind can be.
        """
        names = [task.name.lower() for task in self.tasks]
        if not names or names != sorted(set(names)):
            raise BundleError("the bundle's tasks are not in order, or one is there twice, or there is none")
        if len(self.sizes) != len(self.parts) or self.sizes.keys() != {digest for digest, _ in self._uses()}:
            raise BundleError("the bundle's parts are not those that its tasks need")
        for digest, limit in self._uses():
            if self.sizes[digest] > limit:
                message = f"a part of the bundle has {self.sizes[digest]:,} bytes, more than {limit:,}"
                raise UnsafeInput(message, kind="limits")

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Digest -> length of every part."""
        return {part.digest: part.size for part in self.parts}

    def task(self, name: str) -> BundledTask | None:
        """Return a task by name, in any case, or None if it is not there."""
        return next((task for task in self.tasks if task.name.lower() == name.lower()), None)

    def _uses(self) -> Iterator[tuple[str, int]]:
        """Yield every reference to a part, with the most bytes that it may have."""
        yield self.generator.blob, MAX_FILE_BYTES
        for task in self.tasks:
            yield task.code, MAX_CODE_BYTES
            yield task.config, MAX_CONFIG_BYTES
            if task.card is not None:
                yield task.card, MAX_CARD_BYTES
