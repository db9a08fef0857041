"""The methods of `Fleet` that delete originals, and bring adapters back to where they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.api_store import StoredFleet

if TYPE_CHECKING:
    from icmlora.fleet.evict.restore import RestoreReport
    from icmlora.fleet.evict.types import EvictReport


class FleetOriginals(StoredFleet):
    """Evict and restore. `icmlora.Fleet` explains the arguments."""

    def evict(
        self,
        tasks: Sequence[str] = (),
        *,
        max_error: float | None = None,
        min_gain: float | None = None,
        checkpoints_only: bool = False,
        placeholder: bool = False,
        keep_originals: bool = False,
        dry_run: bool = False,
        device: str = "auto",
        workers: str | None = None,
    ) -> EvictReport:
        """Delete originals, each after a check that its code can replace it.

        The code is read back from disk, with its residual if it has one, decoded and measured. An original whose code
        misses a limit is kept. Give at least one limit, unless the originals are kept.

        Args:
            tasks: Names of tasks; all by default.
            max_error: Largest relative error, ||dW' - dW|| / ||dW||: 0.3 for 30 %.
            min_gain: Smallest retained gain on the task's held-out text. Needs the base model.
            checkpoints_only: Delete checkpoints and keep the final adapters.
            placeholder: Also replace the adapter in the folder it was ingested from by a placeholder, if its files
                are unchanged; `restore` brings it back.
            keep_originals: With `placeholder`: delete nothing in the store, so that `restore` is exact.
            dry_run: Check everything and delete nothing.
            device: Where to measure.
            workers: Where to check, as described for the class. Deletions then begin when all is checked.

        Raises:
            DataError: There is no limit.
        """
        from icmlora.fleet.evict.evict import evict
        from icmlora.fleet.evict.types import EvictRequest

        request = EvictRequest(
            tasks, max_error, min_gain, checkpoints_only, dry_run, device, workers, placeholder, keep_originals
        )
        return evict(self._context, request)

    def restore(
        self, folders: Sequence[str | Path], *, bundle: str | Path | None = None, dry_run: bool = False
    ) -> RestoreReport:
        """Bring adapters back to the folders in which `evict` left placeholders.

        An adapter is written byte for byte if the store has its original, or else decoded from its code. Nothing in a
        folder is overwritten. What cannot be restored is in the report and does not stop the rest.

        Args:
            folders: Folders with placeholders, at any depth.
            bundle: Read this bundle instead of the store.
            dry_run: Check everything and report what would be written, but write nothing.

        Raises:
            DataError: A folder does not exist, or nothing could be restored.
            BundleError: The bundle is damaged.
        """
        from icmlora.fleet.evict.restore import RestoreRequest, restore

        source = None if bundle is None else Path(bundle)
        return restore(self._context, RestoreRequest(tuple(map(Path, folders)), source, dry_run))
