"""One generator instead of a folder of LoRA adapters.

    from icmlora import Fleet

    fleet = Fleet("store")
    fleet.ingest(["loras"])
    fleet.train(device="cuda")
    fleet.materialize("dog-detection", "adapter")

Everything under `__all__` is public and documented; other names may change. Importing this package loads neither torch
nor SQLAlchemy: a name brings in what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.errors import AdapterRefused, BaseModelNotFound, Cancelled, IcmLoraError
    from icmlora.fleet.api import Fleet
    from icmlora.fleet.bundles import Bundle
    from icmlora.fleet.context import Event, Progress
    from icmlora.formats.peft import load_adapter_folder, save_adapter

__all__ = [
    "Adapter",
    "AdapterRefused",
    "BaseModelNotFound",
    "Bundle",
    "Cancelled",
    "Event",
    "Fleet",
    "IcmLoraError",
    "Progress",
    "load_adapter_folder",
    "save_adapter",
]

_HOMES = {
    "Adapter": "icmlora.adapter.model",
    "AdapterRefused": "icmlora.errors",
    "BaseModelNotFound": "icmlora.errors",
    "Bundle": "icmlora.fleet.bundles",
    "Cancelled": "icmlora.errors",
    "Event": "icmlora.fleet.context",
    "Fleet": "icmlora.fleet.api",
    "IcmLoraError": "icmlora.errors",
    "Progress": "icmlora.fleet.context",
    "load_adapter_folder": "icmlora.formats.peft",
    "save_adapter": "icmlora.formats.peft",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
