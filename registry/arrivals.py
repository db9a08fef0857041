"""What the store takes and returns about codes that were made elsewhere; the other values are in `registry.records`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from registry import records
from registry.blobs import Spare, no_spare

ArrivalStatus = Literal["added", "encoded", "known", "skipped"]


@dataclass(frozen=True)
class ArrivingTask:
    """A task whose code arrives without its original.

    Attributes:
        name: the task.
        original: its final adapter; the weights are elsewhere, the other blobs are in the store.
        weights_bytes: length of the weights.
        code: digest of the code's file.
        dw_error: as for :class:`registry.records.NewCode`.
        evaluation: what was measured of the code, if anything; it is recorded under the generator that arrives.
        vectors: of a new task; they are not recorded of one that is there.
    """

    name: str
    original: records.NewAdapter
    weights_bytes: int
    code: str
    dw_error: float | None
    evaluation: records.NewEvaluation | None = None
    vectors: Sequence[records.NewVector] = ()

    def digests(self) -> Iterator[str]:
        """Yield the digests that the task refers to, the one of the absent weights too."""
        yield from filter(None, (self.code, self.original.weights, self.original.config, self.original.card))
        yield from (vector.blob for vector in self.vectors)


@dataclass(frozen=True)
class Arrival:
    """A generator with codes, to be recorded in one transaction.

    Attributes:
        generator: the generator, without codes.
        version: which one it was where it comes from; it gets this number, or a higher one if that is taken.
        tasks: the tasks, each once.
        on_conflict: what to do where the store has a task of that name with another adapter, or another code of it.
        spare: gives the bytes of a digest, or None; asked for what turns out to be needed and is not in the store (any
            more), under the write lock.
    """

    generator: records.NewGenerator
    version: int
    tasks: Sequence[ArrivingTask]
    on_conflict: Literal["skip", "fail"] = "fail"
    spare: Spare = field(default=no_spare, compare=False, repr=False)


@dataclass(frozen=True)
class ArrivalOutcome:
    """What became of an :class:`ArrivingTask`.

    Attributes:
        name: the task's name as the store spells it.
        status: `added` (new task, its original elsewhere), `encoded` (the task was there with the same original and
            got its code), `known` (nothing to do) or `skipped` (a conflict).
    """

    name: str
    status: ArrivalStatus
