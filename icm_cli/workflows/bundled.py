"""Use a bundle where there is no store: list what is in it, and write an adapter from it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.workflows.materializing import MaterializeRequest, check_error, write_decoded
from icm_cli.workflows.model_card import Provenance
from icmlora.bundle import open_bundle
from icmlora.bundle_index import BundledTask, BundleIndex
from icmlora.errors import BundleError, DataError
from icmlora.output_folder import check_free

if TYPE_CHECKING:
    from icm_cli.workflows.materializing import Materialized
    from icmlora.bundle import Bundle
    from icmlora.generator.lineage import Lineage

_BETTER = "`icm train` with a higher --quality makes better codes; export those"


def read_index(path: Path) -> tuple[BundleIndex, str]:
    """Return what a bundle says of itself, and the digest that stands for the file; its parts are not read.

    Raises:
        BundleError: Not a bundle, damaged, or cut short.
        UnsafeInput: It breaks a limit.
    """
    with open_bundle(path) as bundle:
        return bundle.index, bundle.digest


def materialize_bundled(path: Path, request: MaterializeRequest) -> Materialized:
    """Write an adapter from its code in a bundle: the same bytes as from the code in the store.

    Every byte of the bundle is checked before anything is written.

    Raises:
        BundleError: The bundle is damaged, cut short, or of another format.
        DataError: It has no such task.
        TooLossy: Above the request's `max_error`.
        OutputExists: The folder is not empty and `force` is not given.
    """
    check_free(request.directory, force=request.force)
    with open_bundle(path) as bundle:
        index = bundle.index
        task = find_task(index, request.task)
        made_by = Provenance(
            task.name,
            index.base_model,
            "code",
            index.generator,
            task.dw_error,
            task.retained_gain,
            seed=None,
            is_generated=task.is_generated,
        )
        check_error(made_by, request.max_error, hint=_BETTER)
        bundle.check()
        lineage, code = open_lineage(bundle), bundle.read(task.code)
    return write_decoded(lineage.codec_of(code).decode(code), made_by, request)


def open_lineage(bundle: Bundle) -> Lineage:
    """Take the generator of a bundle apart; the network of an epoch is opened with the first code that names it.

    Raises:
        GeneratorError: It is damaged, or of a newer format.
        BundleError: It is damaged, or made for another base model than the bundle says.
    """
    from icmlora.generator.lineage import Lineage

    lineage = Lineage(bundle.read(bundle.index.generator.blob))
    if lineage.configs[0].base_model != bundle.index.base_model:
        raise BundleError("the bundle names another base model than its generator")
    return lineage


def find_task(index: BundleIndex, name: str) -> BundledTask:
    """Return a task of a bundle by name, in any case.

    Raises:
        DataError: There is none; the hint names the closest one.
    """
    task = index.task(name)
    if task is None:
        close = difflib.get_close_matches(name, [task.name for task in index.tasks], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`icm ls --from FILE` lists its tasks"
        raise DataError(f"no task of the bundle is named {name!r}", hint=hint)
    return task
