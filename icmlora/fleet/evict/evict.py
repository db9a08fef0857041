"""Delete originals, each after a check that its code can replace it.

    pinned? ──▶ code? ──▶ read back from disk, decoded, measured ──▶ the manifest says "evicted" ──▶ files are freed
       └────────────────┴────────────────────┴──▶ kept, with the reason

    with placeholder    before that: the adapter in the user's folder is replaced by a placeholder
    keep_originals      only the folder: nothing in the store is deleted, and no code is needed

Each eviction is durable before it is reported. A kill never loses an original that was not checked. The files are freed
together at the end; if another process uses the store, by the next `icm prune`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

from icmlora.errors import Cancelled, OptionsConflict
from icmlora.fleet.context import Context, reporting, select_tasks, use_case
from icmlora.fleet.evict.types import EvictLimits, EvictReport, TaskEvicted
from icmlora.fleet.params import Device, DryRun, Param, Tasks, Workers

if TYPE_CHECKING:
    from icmlora.fleet.evict.check import Evictable
    from icmlora.fleet.failures import Failed
    from registry.manifests import Task


@use_case
def evict(
    context: Context,
    tasks: Tasks = (),
    *,
    max_error: Annotated[
        float | None,
        Param(
            "Keep originals if the relative error of their code, ||dW' - dW|| / ||dW||, is larger.",
            "--max-error X",
            min=0.0,
        ),
    ] = None,
    min_gain: Annotated[
        float | None,
        Param(
            "Minimum retained gain of a code on the task's held-out text. Needs the base model.",
            "--min-gain G",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    checkpoints_only: Annotated[bool, Param("Delete only checkpoints. Keep the final adapters.")] = False,
    placeholder: Annotated[
        bool,
        Param(
            "Also replace the adapter in its source folder with a small file. `icm restore` undoes this. Modified "
            "files are not deleted."
        ),
    ] = False,
    keep_originals: Annotated[
        bool,
        Param(
            "With --placeholder: free only the source folders. The store keeps the originals, so no limit is needed."
        ),
    ] = False,
    dry_run: DryRun = False,
    device: Device = "auto",
    workers: Workers = None,
) -> EvictReport:
    """Delete originals after checking that their codes can replace them.

    An original is the final adapter and its checkpoints. Each code is read from disk, decoded, and compared with the
    original. Pinned tasks and tasks whose code misses a limit keep their original, and the exit code is 3.
    Original-only tasks affect the exit code only when named. TASK@2 is an earlier version of a task.

    With --placeholder, the source folder of the adapter is freed too. `icm restore FOLDER` restores it from the
    original if the store kept it, else from the code. Eviction works on a full disk, but a placeholder needs a few
    bytes. Without space for it, the folder is kept and the exit code is 15.

    Example:
      icm evict --max-error 0.22 --dry-run
      icm evict --placeholder --keep-originals

    Raises:
        OptionsConflict: There is no limit, or the arguments contradict each other.
        DamagedStore: The database disagrees with the manifests; nothing was evicted.
    """
    given = [limit for limit in (max_error, min_gain) if limit is not None]
    if keep_originals and not placeholder:
        raise OptionsConflict("--keep-originals needs --placeholder, because it deletes nothing")
    if keep_originals and given:
        raise OptionsConflict("--keep-originals deletes no originals, so it cannot be used with a limit")
    if placeholder and checkpoints_only and not keep_originals:
        hint = "add --keep-originals, or leave out --checkpoints-only"
        raise OptionsConflict("a checkpoint has no code, so it cannot be restored without its original", hint=hint)
    if not given and not keep_originals:
        hint = "use `--max-error 0.22` to limit the relative error, or `--min-gain 0.97` to limit the retained gain"
        raise OptionsConflict("no limit was given: use --max-error, --min-gain or both", hint=hint)
    if not all(map(math.isfinite, given)):
        raise OptionsConflict("a limit must be a finite number")
    from icmlora.fleet.evict.check import check_codes  # imports torch, as the next two do
    from icmlora.fleet.evict.evictor import Evictor
    from icmlora.fleet.resources.workers import check_place, worker_pool

    check_place(device, workers)
    limits, report = EvictLimits(max_error, min_gain), EvictReport(are_named=bool(tasks))
    # Loading a base model to measure a gain may record its fingerprint, so that takes a writable store.
    with context.open(read_only=dry_run and min_gain is None) as store, reporting(report):
        chosen = select_tasks(store, tasks)
        evictor = Evictor(
            store,
            limits if placeholder else None,
            keep_originals=keep_originals,
            checkpoints_only=checkpoints_only,
            dry_run=dry_run,
        )
        on_progress = context.counting(report.done, len(chosen))
        try:
            for base_model, of_base in groupby(chosen, key=lambda task: task.base_model):
                with ExitStack() as stack:
                    if not dry_run:
                        stack.enter_context(store.job(base_model))
                    checked: Iterator[tuple[Task, TaskEvicted | Evictable | Failed | None]]
                    if keep_originals:
                        checked = ((task, None) for task in of_base)
                    else:
                        pool = stack.enter_context(worker_pool(context, store, device=device, workers=workers))
                        checked = pool.each(check_codes, list(of_base), on_progress, limits, checkpoints_only, dry_run)
                    for task, result in checked:
                        done = evictor.evict(task, result)
                        report.done.append(done)
                        context.on_event(done)
                        on_progress(done.task)
        except Cancelled:
            evictor.free(report)
            raise
        evictor.free(report)
    return report
