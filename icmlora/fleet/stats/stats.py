"""Count the bytes of a store, the savings of its generators and codes, and their loss of quality: `icm stats`.

Sizes are file sizes. A blob that several tasks share counts once in the totals, and fully in each task's line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import Param, ReplacePlot
from icmlora.fleet.stats.bill import BaseModelBill, Bill, TaskBill
from icmlora.fleet.stats.bill_picture import check_plot, plot_bill
from registry.errors import DamagedStore
from registry.filters import Selection, parse_filter

if TYPE_CHECKING:
    from registry.store import Store

_BF16 = 2  # bytes per parameter


@use_case
def stats(
    context: Context,
    *,
    plot: Annotated[
        str | Path | None, Param("Also plot bytes against the number of tasks.", "--plot FILE.svg|png|pdf")
    ] = None,
    force: ReplacePlot = False,
) -> Bill:
    """Show the bytes on disk, the saving and the quality lost.

    BF16: size of all final adapters in bf16. OF BF16: share of it that generator, codes, vectors and extras take.
    BREAK-EVEN: number of tasks at which that becomes smaller. EXTRAS: heads, tokenizers and originals that no code can
    represent. RELATIVE ERROR and RETAINED GAIN: mean / worst over the tasks. -v adds a row per task.

    Example:
      icm stats
      icm stats --json

    Raises:
        DataError: The plot has another ending, matplotlib is missing, or no task has a code to draw.
        OutputExists: The file exists and `force` is not given.
    """
    if plot is not None:
        check_plot(Path(plot), force=force)
    with context.open(read_only=True) as store:
        found = bill_of(store)
    if plot is not None:
        plot_bill(found, Path(plot), force=force)
    return found


def bill_of(store: Store) -> Bill:
    """Count everything in an open store. Only the manifests of tasks with extras are read, which may share them."""
    tensors, extras = Counter[str](), defaultdict[str, dict[str, int]](dict)
    for task in store.tasks(Selection(filters=(parse_filter("extras>0"),))):
        tensors[task.name] = sum(extra.size for extra in task.final.extras if extra.file is None)
        extras[task.base_model].update((extra.blob, extra.packed_size) for extra in task.final.extras)
    tasks = defaultdict[str, list[TaskBill]](list)
    for row in store.rows():
        tasks[row.base].append(TaskBill(row, _BF16 * row.parameters + tensors[row.name]))
    fleets = [_fleet(store, base, tuple(own), sum(extras[base].values())) for base, own in sorted(tasks.items())]
    return Bill(store.usage(), tuple(fleets))


def _fleet(store: Store, base_model: str, tasks: tuple[TaskBill, ...], extras_bytes: int) -> BaseModelBill:
    generator, earlier = None, 0
    with suppress(DamagedStore):  # `usage` reports it
        generator, needed = store.generator(base_model), {task.row.generator for task in tasks}
        files = {one.blob for one in store.generators(base_model) if one.blob in needed}
        earlier = sum(file.size for file in files if generator is None or file != generator.blob)
    return BaseModelBill(base_model, generator, tasks, extras_bytes, earlier)
