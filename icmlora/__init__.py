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

from icmlora.errors import (
    AdapterRefused,
    BaseModelMismatch,
    BaseModelNotFound,
    BundleError,
    Cancelled,
    CodeError,
    DataError,
    DeviceUnavailable,
    GeneratorError,
    IcmLoraError,
    NotRecognized,
    OutputExists,
    UnsafeInput,
)
from registry.errors import (
    BaseModelConflict,
    DamagedStore,
    IcmError,
    LastCopy,
    RegistryError,
    StoreLocked,
    StoreNotFound,
    TaskConflict,
    TaskNotFound,
)

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter, LoraModule
    from icmlora.base_models.kinds.custom_model import CustomModel, base_model_loader
    from icmlora.base_models.modality import Metric
    from icmlora.fleet.api import Fleet
    from icmlora.fleet.bundles.bundles import Bundle
    from icmlora.fleet.context import Event, Progress
    from icmlora.fleet.convert.convert import convert
    from icmlora.formats.discovery.folder import load_adapter, save_adapter
    from icmlora.serving.attach import attach

__all__ = [
    "Adapter",
    "AdapterRefused",
    "BaseModelConflict",
    "BaseModelMismatch",
    "BaseModelNotFound",
    "Bundle",
    "BundleError",
    "Cancelled",
    "CodeError",
    "CustomModel",
    "DamagedStore",
    "DataError",
    "DeviceUnavailable",
    "Event",
    "Fleet",
    "GeneratorError",
    "IcmError",
    "IcmLoraError",
    "LastCopy",
    "LoraModule",
    "Metric",
    "NotRecognized",
    "OutputExists",
    "Progress",
    "RegistryError",
    "StoreLocked",
    "StoreNotFound",
    "TaskConflict",
    "TaskNotFound",
    "UnsafeInput",
    "attach",
    "base_model_loader",
    "convert",
    "load_adapter",
    "save_adapter",
]

_HOMES = {
    "Adapter": "icmlora.adapter.model",
    "Bundle": "icmlora.fleet.bundles.bundles",
    "CustomModel": "icmlora.base_models.kinds.custom_model",
    "Event": "icmlora.fleet.context",
    "Fleet": "icmlora.fleet.api",
    "LoraModule": "icmlora.adapter.model",
    "Metric": "icmlora.base_models.modality",
    "Progress": "icmlora.fleet.context",
    "attach": "icmlora.serving.attach",
    "base_model_loader": "icmlora.base_models.kinds.custom_model",
    "convert": "icmlora.fleet.convert.convert",
    "load_adapter": "icmlora.formats.discovery.folder",
    "save_adapter": "icmlora.formats.discovery.folder",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
