"""What every baseline is: bytes for the whole fleet, bytes for each task, and an adapter from exactly those bytes.

    fleet --prepare--> shared bytes            b"" for a method that stores each adapter alone
    adapter, shared --encode--> code           one task
    code, shared --decode--> adapter           nothing else is read

A task that was not in the fleet is encoded under the same shared bytes, so its code is what one more task costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from icmlora.adapter.model import Adapter

NamedAdapters = Mapping[str, Adapter]
"""Task to adapter. A mapping may load an adapter whenever it is asked for, so baselines hold one at a time."""


class Baseline(Protocol):
    """One method at one operating point."""

    def prepare(self, fleet: NamedAdapters) -> bytes:
        """Return what is stored once for a fleet; the same fleet gives the same bytes."""
        ...

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Return what is stored for one task."""
        ...

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Read an adapter back.

        Raises:
            CodeError: The bytes are not of this method and operating point.
        """
        ...


class PerAdapter:
    """The half of a baseline that stores each adapter alone: nothing is shared."""

    def prepare(self, fleet: NamedAdapters) -> bytes:
        """Return no bytes."""
        return b""
