"""The methods of `Fleet` that delete originals, and bring adapters back to where they were."""

from __future__ import annotations

from icmlora.fleet.api_store import StoredFleet
from icmlora.fleet.evict.evict import evict
from icmlora.fleet.evict.restore import restore


class FleetOriginals(StoredFleet):
    """Evict and restore. `icmlora.Fleet` explains the arguments."""

    evict = evict

    restore = restore
