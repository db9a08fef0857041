"""Sentences about a bill: savings, disk use, and tasks that miss their limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from icmlora.io.text import counted, human_percent, human_size
from registry.manifests import CodeLimits

if TYPE_CHECKING:
    from icmlora.fleet.stats.bill import Bill
    from registry.usage import Usage


def saving_text(found: Bill) -> str:
    """Return the bytes that replace the adapters, the saving relative to bf16, and the quality next to it."""
    if not found.encoded:
        return "No task has a code yet, so nothing is saved."
    share = found.compact_share
    if share is None:
        return "Some tasks have no code yet, so the saving is unknown. Run `icm train --update`."
    usage = found.usage
    some = [
        (usage.extras, "extras, "),
        (found.original_only, "originals without a code, "),
    ]
    parts = f"Generators, codes, {''.join(name for size, name in some if size)}vectors, manifests and database"
    if share >= 1:
        return (
            f"{parts} take {human_percent(share)}, which costs {human_percent(share - 1)} more. {_quality_text(found)}"
        )
    return f"{parts} alone take {human_percent(share)}, which saves {human_percent(1 - share)}. {_quality_text(found)}"


def _quality_text(found: Bill) -> str:
    """Return the measured quality of the codes, or that it was not measured."""
    coded = len(found.encoded)
    if (gains := found.retained_gains) is not None:
        of = "" if gains.tasks == coded else f", measured for {gains.tasks} of {counted(coded, 'code')}"
        return f"The codes retain {gains.mean:.3f} of the gain on average, {gains.worst:.3f} at worst{of}."
    effects = [task.row.effect for task in found.each if task.row.effect is not None]
    if effects:
        kept = f"The codes keep {sum(effects) / len(effects):.3f} of their adapters' effect on samples"
        return f"{kept}; retained gain was not measured: run `icm eval`."
    return "Their quality was not measured: run `icm eval`."


def disk_lines(usage: Usage) -> list[tuple[str, int]]:
    """Return the bytes of a store by use, without its lock files, which differ from run to run."""
    return [
        ("originals (final adapters)", usage.originals),
        ("checkpoints", usage.checkpoints),
        ("generators", usage.generators),
        ("codes", usage.codes),
        ("extras of codes", usage.extras),
        ("task vectors", usage.vectors),
        ("samples and held-out text", usage.texts),
        ("earlier versions of tasks", usage.versions),
        ("earlier generators", usage.old_generators),
        ("unfinished training", usage.training),
        ("manifests", usage.manifests),
        ("database", usage.database),
        ("unreferenced", usage.unreferenced),
    ]


def limits_text(asked: CodeLimits) -> str:
    """Return the limits of a code in words."""
    limits = (
        ("relative error at most", asked.max_error),
        ("weighted error at most", asked.tolerance),
    )
    known = [f"{name} {limit:g}" for name, limit in limits if limit is not None]
    if asked.keep is not None:
        known.append(f"at least {asked.keep:g} of the effect")
    return " and ".join(known if asked.max_size is None else [*known, f"at most {human_size(asked.max_size)}"])


def claims_text(found: Bill) -> str | None:
    """Return how many codes have only the figures that their bundle claims; None if there are none."""
    number = sum(task.row.claim is not None for task in found.each)
    if not number:
        return None
    have = "has" if number == 1 else "have"
    return f"{counted(number, 'code')} {have} only the quality that the bundle claims; run `icm eval` to measure it."


def shortfalls(missed: Iterable[CodeLimits]) -> list[str]:
    """Return how many tasks keep their original because no code meets their limit, one line per limit."""
    return [
        f"{counted(number, 'task')} {'keeps its' if number == 1 else 'keep their'} original: no code meets {text}"
        for text, number in sorted(Counter(map(limits_text, missed)).items())
    ]
