"""Compute the relative error of a task's code in each group of its modules.

See `icmlora.adapter.module_groups` for the groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import GroupError, errors_by_group
from icmlora.adapter.module_groups import grouping
from icmlora.errors import DataError
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.resources.decoding import decode_code
from icmlora.fleet.resources.loading import read_original
from icmlora.formats.catalogue import format_named
from icmlora.generator.codec.generator_file import GeneratorFile

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from registry.manifests import StoredAdapter


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
        known = store.task(task)
        if known.final.is_evicted:
            hint = "run `icm show TASK` for earlier measurements, or `icm verify` to check the code"
            raise DataError("its original is not in the store, so its code cannot be compared with it", hint=hint)
        if known.code is None:
            raise DataError("it has no code", hint="run `icm train` to make codes")
        decoded = decode_code(store, GeneratorFile(store.blobs.read(known.code.generator)), known.code)
        return errors_of(known.final, read_original(store, known.final), decoded)


def errors_of(final: StoredAdapter, original: Adapter, decoded: Adapter) -> Sequence[GroupError]:
    """Return the errors of a decoded code."""
    group_of = grouping(is_for_images=format_named(final.format).is_for_images)
    return errors_by_group(original, {"code": decoded}, group_of)
