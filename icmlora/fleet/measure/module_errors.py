"""The relative error of a task's code in each group of its modules: which parts of a model it keeps best.

The groups are those of `icmlora.adapter.module_groups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import GroupError, errors_by_group
from icmlora.adapter.module_groups import grouping
from icmlora.errors import DataError
from icmlora.fleet.context import Context, current_code, use_case
from icmlora.fleet.resources.decoding import decode_code
from icmlora.fleet.resources.loading import read_original
from icmlora.formats.catalogue import format_named
from icmlora.generator.versions import GeneratorFile

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from registry.records import AdapterRecord


@use_case
def module_errors(context: Context, task: str) -> Sequence[GroupError]:
    """Return the relative errors of a task's code by kind of module, or by block of an image model.

    The original is read and the code decoded, which takes a while for a large adapter.

    Args:
        context: The store.
        task: The task.

    Raises:
        DataError: It has no code, or its original was evicted.
    """
    with context.open(read_only=True) as store:
        known = store.tasks.get(task)
        final, (code, generator) = store.tasks.final(known.name), current_code(store, known)
        if final.is_evicted:
            hint = "run `icm show TASK` for earlier measurements, or `icm verify` to check the code"
            raise DataError("its original is not in the store, so its code cannot be compared with it", hint=hint)
        if code is None or generator is None:
            raise DataError("it has no code", hint="run `icm train` to make codes")
        decoded = decode_code(store, GeneratorFile(store.blobs.read(generator.blob)), code)
        return errors_of(final, read_original(store, final), decoded)


def errors_of(final: AdapterRecord, original: Adapter, decoded: Adapter) -> Sequence[GroupError]:
    """Return the errors of what a code decodes to."""
    group_of = grouping(is_for_images=format_named(final.format).is_for_images)
    return errors_by_group(original, {"code": decoded}, group_of)
