"""What the stand-in counts, for tests that hold work on a card to a budget.

    with counting() as counts:
        train_one_step()
    assert counts.operators <= 600

Only what touches the card counts; work on the CPU is free. Backward passes count as forward ones do.

operators    calls that launch a kernel; a fused or `foreach` operator is one, whatever it is given
views        calls that only look at memory in another way (view, transpose, slice, expand, detach ...) or allocate it
copies_to    tensors copied from the host to the card, and their bytes
copies_from  tensors copied from the card to the host, and their bytes; `.item()` is a sync and no copy
syncs        calls that make the host wait for the card

A sync is, as PyTorch's CUDA code has it: `.item()`, `float()`, `int()`, `bool()`; `synchronize()` of card, stream or
event; an operator whose result has a size that the host must be told (`nonzero`, a boolean mask as index,
`masked_select`, `unique`, `repeat_interleave` without `output_size`, `bincount`) or that looks at its own result
(`torch.equal`, `multinomial`, `linalg.svd`, `linalg.eigh` and others that check for convergence); a copy between host
and card. The copies that do not wait are those with `non_blocking=True`: to the card always, from the card only into
pinned memory.

Attention is one operator and one backward, as with the fused kernels of a card. What it cannot count: time, memory, and
kernels that a card starts beside those of the operators, such as those that sort for an index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Counts:
    """How often the card was used; `names` says by which operators, views left out."""

    operators: int = 0
    views: int = 0
    copies_to: int = 0
    bytes_to: int = 0
    copies_from: int = 0
    bytes_from: int = 0
    syncs: int = 0
    names: Counter[str] = field(default_factory=Counter, repr=False)

    def __str__(self) -> str:
        return (
            f"{self.operators} operators, {self.views} views, {self.copies_to} copies to it ({self.bytes_to} bytes), "
            f"{self.copies_from} from it ({self.bytes_from} bytes), {self.syncs} syncs"
        )


_open: list[Counts] = []


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens inside, in every thread; the numbers are there at once and stay afterwards."""
    counts = Counts()
    _open.append(counts)
    try:
        yield counts
    finally:
        _open[:] = [other for other in _open if other is not counts]  # by identity: equal counts are not the same


def count_operator(name: str) -> None:
    """Note one kernel."""
    for counts in _open:
        counts.operators += 1
        counts.names[name] += 1


def count_view() -> None:
    """Note one look at memory."""
    for counts in _open:
        counts.views += 1


def count_sync(name: str) -> None:
    """Note that the host waits for the card, and why."""
    for counts in _open:
        counts.syncs += 1
        counts.names[f"sync: {name}"] += 1


def count_copy(*, to_card: bool, size: int, waits: bool) -> None:
    """Note a copy of `size` bytes between host and card."""
    way = "to" if to_card else "from"
    for counts in _open:
        setattr(counts, f"copies_{way}", getattr(counts, f"copies_{way}") + 1)
        setattr(counts, f"bytes_{way}", getattr(counts, f"bytes_{way}") + size)
    if waits:
        count_sync(f"copy {way} the card")
