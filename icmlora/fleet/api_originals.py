"""The methods of `Fleet` that delete originals, protect them, and bring adapters back to where they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from icmlora.fleet.api_store import StoredFleet
from icmlora.fleet.evict.restore import restore
from icmlora.fleet.tasks.tasks import pin, unpin

if TYPE_CHECKING:
    from icmlora.fleet.evict.types import EvictReport


class FleetOriginals(StoredFleet):
    """Evict, restore and pin. `icmlora.Fleet` explains the arguments."""

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

    restore = restore

    pin = pin

    unpin = unpin
