"""The methods of `Fleet` that delete originals, protect them, and bring adapters back to where they were."""

from __future__ import annotations

from icmlora.fleet.api_store import StoredFleet
from icmlora.fleet.evict.evict import evict
from icmlora.fleet.evict.restore import restore
from icmlora.fleet.tasks.tasks import pin, unpin


class FleetOriginals(StoredFleet):
    """Evict, restore and pin. `icmlora.Fleet` explains the arguments."""

    evict = evict

    restore = restore

    pin = pin

    unpin = unpin
