"""Tasks that are alike, as `icm duplicates` reports them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icmlora.fleet.resources.stored_vectors import LeftOut


@dataclass(frozen=True)
class DuplicatePair:
    """A task and another one that its adapter is like."""

    task: str
    # The oldest one of its group; if that is farther than the limit, the nearest task linking it to the group.
    like: str
    same_tensors: bool  # whether their tensors are equal, and mean the same
    distance: float  # ||dW - dW'|| / max(||dW||, ||dW'||); 0 for the same tensors
    extras_differ: bool = False  # whether heads, biases or other tensors next to dW differ


@dataclass(frozen=True)
class DuplicateGroup:
    """Tasks of one base model that are connected by distances within the limit."""

    base_model: str
    tasks: tuple[str, ...]  # the tasks, oldest first
    pairs: tuple[DuplicatePair, ...]  # one for each task but the oldest, nearest first


@dataclass
class DuplicatesReport:
    """Tasks that are alike."""

    max_distance: float  # the limit
    compared: int = 0  # how many tasks were compared
    groups: list[DuplicateGroup] = field(default_factory=list)  # tasks that are alike, the largest group first
    # Tasks with the same tensors as an older task of another base model.
    other_bases: list[DuplicatePair] = field(default_factory=list)
    from_codes: list[str] = field(default_factory=list)  # evicted tasks, compared as what their codes decode to
    # Tasks that can have no code: only their tensors were compared.
    tensors_only: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)  # tasks that could not be read
