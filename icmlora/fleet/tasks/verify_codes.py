"""Look whether codes are what their rows say: by how their files begin, and by decoding them once more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.tasks.blob_kinds import kind_of
from registry.errors import DamagedStore
from registry.verify import Finding

if TYPE_CHECKING:
    from registry.records import TaskSummary
    from registry.store import Store

_SAME = 1e-3
"""How far two measurements of one relative error may be apart, on other processors and with other versions of torch."""


def wrong_kinds(store: Store, names: Sequence[str]) -> Iterator[Finding]:
    """Yield the blobs that are no code, residual or generator although their rows say so."""
    wanted = {task.name for task in store.tasks.named(names)}
    for generator in store.generators.all():
        rows = [row for row in store.codes.all(generator.id) if not wanted or row.task in wanted]
        expected = [(row.blob, "code", (row.task,)) for row in rows]
        expected += [(row.residual.blob, "residual", (row.task,)) for row in rows if row.residual is not None]
        for digest, kind, tasks in [*expected, (generator.blob, "generator", ())]:
            with suppress(DamagedStore):  # one that is missing was found already
                if kind_of(store.blobs.start(digest, 64)) != kind:
                    fact = f"blob {digest} is not the {kind} that its row says"
                    yield Finding("row", fact, store.blobs.place(digest), digest, tasks)


def wrong_errors(store: Store, names: Sequence[str]) -> Iterator[Finding]:
    """Decode every code whose original is there, and yield those that have another error than was recorded."""
    wanted = {task.name for task in store.tasks.named(names)}
    for row in store.tasks.summaries():
        if row.code is None or not row.final.can_be_read or (wanted and row.task.name not in wanted):
            continue
        if (fact := _wrong_error(store, row)) is not None:
            yield Finding("row", fact, store.blobs.place(row.code.blob), row.code.blob, (row.task.name,))


def _wrong_error(store: Store, row: TaskSummary) -> str | None:
    """Say what is wrong with the recorded error of a code; None if nothing is, or if nobody measured it."""
    from icmlora.adapter.metrics import squared_error
    from icmlora.fleet.resources.decoding import decode_code
    from icmlora.fleet.resources.loading import read_original
    from icmlora.generator.versions import GeneratorFile

    code, generator = row.code, store.generators.current(row.task.base_model)
    if code is None or generator is None or (recorded := code.best_squared_error) is None:
        return None
    try:
        decoded = decode_code(store, GeneratorFile(store.blobs.read(generator.blob)), code, code.rung)
        found = squared_error(read_original(store, row.final), decoded)
    except (*FAILURES, DamagedStore) as error:
        reason = error.message if isinstance(error, DamagedStore) else as_error(error).message
        return f"the code of task {row.task.name} cannot be decoded: {reason}"
    before, now = math.sqrt(recorded), math.sqrt(found)
    if math.isclose(before, now, rel_tol=_SAME, abs_tol=_SAME):
        return None
    return f"the code of task {row.task.name} has a relative error of {now:.4f}, but {before:.4f} is recorded"
