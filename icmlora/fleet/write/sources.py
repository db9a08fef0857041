"""Choose the source of a task's adapter and read the adapter from it. Imports torch only to decode.

original   the ingested bytes, unchanged
code       its code
recalled   the code of the task recognized from its vectors
network    the network's prediction from the task vectors
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from icmlora.errors import DataError, OptionsConflict
from icmlora.fleet.resources.code_source import AdapterParts, CodeSource, Decoded
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import AdapterFormat
from registry.manifests import Claim, Code, Measurement, Task, relative_error

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter

Source = Literal["auto", "original", "code", "recalled", "network"]


class TooLossy(DataError):
    """The adapter's relative error is above the limit, or was not measured; nothing was written."""


@dataclass(frozen=True)
class ResolvedSource:
    """The source of a task's adapter. Nothing was read yet."""

    codes: AdapterParts  # of the store or the bundle
    task: Task
    source: Literal["original"] | Decoded
    generator: str | None = None  # digest of the network that decodes it; None for an original
    code: Code | None = None  # None for an original and for a prediction of the network
    recognized: str | None = None  # of `recalled`: the task with this code
    seed: int | None = None  # of a sampled latent; None for the mean

    @property
    def format(self) -> AdapterFormat:
        """The format of the original."""
        return format_named(self.task.final.format)

    @cached_property
    def measured(self) -> Measurement | None:
        """The measurement of a decoded adapter; None if it was not measured, such as a sampled one."""
        is_measurable = self.source != "original" and self.seed is None
        return self.task.latest(self.source, self.generator) if is_measurable else None

    @property
    def squared_error(self) -> float | None:
        """Squared relative error of the adapter; None if it was not measured."""
        if self.source == "original":
            return 0.0
        if self.code is not None and self.recognized in (None, self.task.name):
            return self.code.squared_error
        return None if self.measured is None else self.measured.squared_error

    @property
    def retained_gain(self) -> float | None:
        """Retained gain as `icm eval` measured it."""
        if self.source == "original":
            return 1.0
        return None if self.measured is None else self.measured.retained_gain

    @property
    def claim(self) -> Claim | None:
        """The quality that a bundle claims for the code."""
        return self.code.claim if self.code is not None and self.source == "code" else None

    @property
    def metadata(self) -> dict[str, str]:
        """Facts for the header of the weights."""
        facts = {"task": self.task.name, "rung": self.source, "generator": self.generator, "seed": self.seed}
        return {f"icm_{name}": str(fact) for name, fact in facts.items() if fact is not None}

    def check_error(self, limit: float | None) -> None:
        """Raise `TooLossy` if the relative error is above a limit, or was not measured."""
        claimed = None if self.claim is None else self.claim.relative_error
        error = claimed if self.codes.takes_claims else relative_error(self.squared_error)
        if limit is None or self.source == "original" or (error is not None and error <= limit):
            return
        fact = "was not measured" if error is None else f"is {error:.4f}"
        if error is None and claimed is not None:
            fact = f"was not measured here (its bundle claims {claimed:.4f})"
        fact = f"the relative error of {self.task.name!r} {fact}, but the limit is {limit}"
        raise TooLossy(fact, hint=self.codes.better)

    def reader(self) -> Callable[[], Adapter]:
        """Read the bytes, and return a function that decodes them on any thread."""
        final, read = self.task.final, self.codes.read
        if self.source == "original":
            known, config, weights = self.format, read(final.config), read(final.weights)
            initial = None if final.initial is None else read(final.initial)
            return lambda: known.read(config, weights, initial=initial).adapter
        if self.code is None:
            predicted = self.codes.predict(self.task, self.seed)
            return lambda: predicted
        from icmlora.fleet.resources.decoding import code_reader

        return code_reader(read, self.codes.generator_file(self.code.generator), self.code)


def resolve_source(codes: CodeSource, task: Task, source: Source = "auto", seed: int | None = None) -> ResolvedSource:
    """Return the source of a task's adapter. Reads no blobs, except vectors for `recalled`.

    Raises:
        DataError: There is no such source, or the task does not have it.
        OptionsConflict: There is a seed, and the source is not sampled.
    """
    if source not in get_args(Source):
        raise DataError(f"unknown source {source!r}", hint=f"choose one of {', '.join(get_args(Source))}")
    if seed is not None and source not in ("auto", "network"):
        raise OptionsConflict("--seed needs --source network or auto")
    final = task.final
    if source == "original" or (source == "auto" and seed is None and not final.is_evicted):
        if final.is_evicted:
            fact = f"the original of task {task.name!r} was evicted at {final.evicted_at}"
            way = "restore it with `icm ingest --restore PATH`"
            if final.is_generated:
                fact = f"task {task.name!r} was generated, so the store has a code but no original"
                way = "ingest the folder that `icm generate` wrote with `icm ingest --restore PATH`"
            elif final.was_never_here:
                fact = f"the original of task {task.name!r} was never in this store: its code came from a bundle"
                way = "add it with `icm ingest PATH`"
            raise DataError(fact, hint=f"use `--source code` to decode the stored code, or {way}")
        return ResolvedSource(codes, task, "original")
    if task.not_encodable is not None:
        fact = f"task {task.name!r} has only its original: {task.not_encodable}"
        raise DataError(fact, hint="use `--source original`")
    if source == "auto":
        source = "code" if seed is None else "network"
    if source == "code" and task.code is not None:
        return ResolvedSource(codes, task, source, task.code.generator, task.code)
    current = codes.current(task.base_model)
    if source == "code":
        train = "icm train" if current is None else "icm train --update"
        raise DataError(f"task {task.name!r} has no code", hint=f"run `{train}` to make one")
    if current is None:
        raise DataError(f"there is no generator for task {task.name!r}", hint="run `icm train` to make one")
    if source == "recalled":
        known = codes.recalled(task)
        if known is not None and known.code is not None:
            return ResolvedSource(codes, task, source, known.code.generator, known.code, known.name)
    return ResolvedSource(codes, task, source, current.blob, seed=seed)
