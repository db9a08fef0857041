"""The summary at the top of a report: the size of the fleet, the saving and the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icmlora.fleet.measure.metric_result import measured_in
from icmlora.fleet.stats.bill import Bill
from icmlora.fleet.stats.bill_text import claims_text, disk_lines, saving_text, shortfalls
from icmlora.formats.catalogue import format_named
from icmlora.io.text import counted, escape, human_percent, human_size


@dataclass(frozen=True)
class Figure:
    """A headline number with its label."""

    value: str
    label: str


@dataclass(frozen=True)
class Facts:
    """The summary above the table."""

    title: str  # such as "12 tasks of acme/llama"
    figures: Sequence[Figure]  # headline numbers
    sentences: Sequence[str]  # the summary in words
    newest: str | None  # the day of the newest task or generator; None in an empty store
    # Bytes by purpose, without locks and the reserve, which change between reports.
    disk: Sequence[tuple[str, int]]


def facts_of(bill: Bill) -> Facts:
    """Return the summary of a store."""
    made = [fleet.generator.created_at for fleet in bill.fleets if fleet.generator is not None]
    dates = [*(task.row.created_at for task in bill.each), *made]
    return Facts(
        title=_title(bill),
        figures=tuple(_figures(bill)) if bill.each else (),
        sentences=tuple(_sentences(bill)),
        newest=max(dates)[:10] if dates else None,
        disk=tuple((name, size) for name, size in disk_lines(bill.usage) if size),
    )


def _title(bill: Bill) -> str:
    if not bill.fleets:
        return "Empty store"
    of = escape(bill.fleets[0].base_model) if len(bill.fleets) == 1 else counted(len(bill.fleets), "base model")
    return f"{counted(bill.tasks, 'task')} of {of}"


def _figures(bill: Bill) -> Iterator[Figure]:
    share = bill.compact_share
    yield Figure(human_size(bill.bf16_size), "all adapters in bf16")
    if share is not None:
        yield Figure(human_size(bill.compact_size), "as generator and codes")
        verb = "saved" if share < 1 else "larger"
        yield Figure(human_percent(abs(1 - share)), verb)
    gains, errors = bill.retained_gains, bill.relative_errors
    if gains is not None:
        few = measured_in(gains.precisions)
        yield Figure(f"{gains.mean:.3f}", f"retained gain{few}, mean")
        yield Figure(f"{gains.worst:.3f}", f"retained gain{few}, worst")
    elif errors is not None:
        yield Figure(f"{errors.mean:.3f}", "relative error, mean")
        yield Figure(f"{errors.worst:.3f}", "relative error, worst")


def _sentences(bill: Bill) -> Iterator[str]:
    if not bill.each:
        yield "The store has no tasks yet: `icm ingest PATH` adds adapters."
        return
    yield f"{_contents(bill)} In bf16, all final adapters take {human_size(bill.bf16_size)}."
    yield saving_text(bill)
    yield from _quality(bill)
    yield _originals(bill)
    if (claims := claims_text(bill)) is not None:
        yield claims
    yield from (f"{line}." for line in shortfalls(bill.missed_limits))
    if bill.original_only:
        has = "has" if bill.original_only == 1 else "have"
        yield f"{counted(bill.original_only, 'task')} {has} only the original, because the adapter cannot be encoded."


def _contents(bill: Bill) -> str:
    ranks = sorted(task.row.rank for task in bill.each)
    shown = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    noun = "a LoRA adapter" if bill.tasks == 1 else f"{bill.tasks:,} LoRA adapters"
    return f"The store has {noun} of rank {shown}."


def _quality(bill: Bill) -> Iterator[str]:
    gains, errors = bill.retained_gains, bill.relative_errors
    if gains is not None:
        yield (
            f"On held-out text, the codes of {counted(gains.tasks, 'task')} keep on average {gains.mean:.3f} of the "
            f"originals' gain over the base model. The worst keeps {gains.worst:.3f} ({escape(gains.worst_task)})."
        )
        if few := measured_in(gains.precisions):
            yield f"Gains were measured with the base model in{few}."
    elif errors is not None:
        yield (
            f"The codes of {counted(errors.tasks, 'task')} have a mean relative error of {errors.mean:.3f}. "
            f"The worst is {errors.worst:.3f} ({escape(errors.worst_task)})."
        )
        if not all(format_named(task.row.format).is_for_images for task in bill.each):
            yield "Run `icm eval` to measure their retained gain."


def _originals(bill: Bill) -> str:
    left, size = bill.tasks - bill.evicted, human_size(bill.usage.originals)
    if not left:
        return "All originals were evicted, so the codes are the only copies."
    if bill.evicted:
        return f"{bill.evicted:,} of {bill.tasks:,} originals were evicted. The others take {size}."
    return f"The store still has all originals, which take {size}."
