"""The protocol of a baseline: bytes for the whole fleet, bytes for each task, and an adapter from exactly those.

    fleet --prepare--> shared bytes            b"" for a method that stores each adapter alone
    adapter, shared --encode--> code           one task
    code, shared --decode--> adapter           nothing else is read

A task that was not in the fleet is encoded under the same shared bytes, so the size of its code is what one more task
costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from icmlora.adapter.model import Adapter

# Task to adapter. The mapping may load an adapter each time it is asked, so baselines hold one at a time.
NamedAdapters = Mapping[str, Adapter]


class Baseline(Protocol):
    """One method at one operating point."""

    def prepare(self, fleet: NamedAdapters) -> bytes:
        """Return what is stored once for a fleet; the same fleet gives the same bytes."""
        ...

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Return what is stored for one task."""
        ...

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read an adapter back."""
        ...


class PerAdapter:
    """Base class for baselines that store each adapter alone and share nothing."""

    def prepare(self, fleet: NamedAdapters) -> bytes:
        """Return no bytes."""
        return b""
