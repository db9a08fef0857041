"""What a bill says in words: what codes save, where the bytes are, and which tasks miss their limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from icmlora.io.text import counted, human_percent, human_size
from registry.records import CodeLimits

if TYPE_CHECKING:
    from icmlora.fleet.stats.stats import Bill
    from registry.usage import Usage


def saving_text(found: Bill) -> str:
    """Say what takes the place of the adapters and what that saves, relative to all final adapters in bf16."""
    if not any(fleet.encoded for fleet in found.fleets):
        return "No task has a code yet, so nothing is saved."
    share = found.compact_share
    if share is None:
        if any(task.evicted and task.code_size is None for task in found.each):
            return "Some codes have an older format, so the saving is unknown: `icm verify` names the tasks."
        return "Not every task has a code yet, so the saving is unknown: run `icm train --update`."
    usage = found.usage
    some = [
        (usage.residuals, "residuals, "),
        (usage.extras, "extras, "),
        (found.original_only, "originals without a code, "),
    ]
    parts = f"Generators, codes, {''.join(name for size, name in some if size)}vectors and database"
    if share >= 1:
        return f"{parts} take {human_percent(share)}, so they cost {human_percent(share - 1)} more."
    return f"{parts} alone take {human_percent(share)}, so they save {human_percent(1 - share)}."


def disk_lines(usage: Usage) -> list[tuple[str, int]]:
    """Return the bytes of a store by what they are for, without its lock files, which differ from run to run."""
    return [
        ("originals (final adapters)", usage.originals),
        ("checkpoints", usage.checkpoints),
        ("generators", usage.generators),
        ("codes", usage.codes),
        ("residuals", usage.residuals),
        ("extras of codes", usage.extras),
        ("task vectors", usage.vectors),
        ("samples and held-out text", usage.texts),
        ("earlier generators", usage.old_generators),
        ("unfinished training", usage.training),
        ("database", usage.database),
        ("unreferenced", usage.unreferenced),
    ]


def limits_text(asked: CodeLimits) -> str:
    """Return the limits that a code was made for."""
    limits = (
        ("retained gain at least", asked.min_gain),
        ("relative error at most", asked.max_error),
        ("weighted error at most", asked.tolerance),
    )
    known = [f"{name} {limit:g}" for name, limit in limits if limit is not None]
    if asked.keep is not None:
        known.append(f"at least {asked.keep:g} of its effect")
    return " and ".join(known if asked.max_size is None else [*known, f"at most {human_size(asked.max_size)}"])


def claims_text(found: Bill) -> str | None:
    """Say how many codes nobody here has measured, although their bundle gives figures; None if there are none."""
    number = sum(task.is_claimed for fleet in found.fleets for task in fleet.tasks)
    if not number:
        return None
    have = "has figures" if number == 1 else "have figures"
    return f"{counted(number, 'code')} {have} claimed by the bundle only, which were not measured here."


def shortfalls(short: Iterable[CodeLimits]) -> list[str]:
    """Say how many tasks keep their original because no code meets their limit, one line per limit."""
    return [
        f"{counted(number, 'task')} {'keeps its' if number == 1 else 'keep their'} original: no code meets {text}"
        for text, number in sorted(Counter(map(limits_text, short)).items())
    ]
