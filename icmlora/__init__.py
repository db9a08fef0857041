"""One generator instead of a folder of LoRA adapters.

    from icmlora import Fleet

    fleet = Fleet("store")
    fleet.ingest(["loras"])
    fleet.train(device="cuda")
    fleet.materialize("dog-detection", "adapter")

Everything in `__all__` is public and documented; other names may change. Importing this package loads neither torch nor
SQLAlchemy: names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from icmlora.errors import (
    AdapterRefused,
    BaseModelMismatch,
    BaseModelNotFound,
    BaseModelUnsuited,
    BundleError,
    Cancelled,
    CodeError,
    DataError,
    DeviceUnavailable,
    GeneratorError,
    IcmLoraError,
    NotCovered,
    NotRecognized,
    OptionsConflict,
    OtherFormat,
    OutputExists,
    UnsafeInput,
)
from registry.errors import (
    BaseModelConflict,
    DamagedStore,
    GeneratorConflict,
    IcmError,
    InvalidFilter,
    InvalidName,
    LastCopy,
    NotAStore,
    RegistryError,
    StoreLocked,
    StoreNotFound,
    StoreUnavailable,
    TaskConflict,
    TaskNotFound,
)

if TYPE_CHECKING:
    from icmlora.adapter.metrics import GroupError
    from icmlora.adapter.model import Adapter, LoraModule
    from icmlora.base_models.examples.context import TaskContext
    from icmlora.base_models.kinds.custom_model import CustomModel, base_model_loader
    from icmlora.base_models.modality import Metric
    from icmlora.fewshot.guard import AblationReport
    from icmlora.fleet.api import Fleet
    from icmlora.fleet.bases.base_models import KnownBase
    from icmlora.fleet.bases.labels import Joined, Separated
    from icmlora.fleet.bundles.bundles import Bundle
    from icmlora.fleet.bundles.export import ExportReport
    from icmlora.fleet.bundles.import_ import ImportReport
    from icmlora.fleet.context import Event, Progress
    from icmlora.fleet.convert.convert import convert
    from icmlora.fleet.encode.report import EncodeReport
    from icmlora.fleet.evict.restore import RestoreReport
    from icmlora.fleet.evict.types import EvictReport
    from icmlora.fleet.few_shot.generated import ContextReport, Generated
    from icmlora.fleet.ingest.report import IngestReport
    from icmlora.fleet.map.task_map import MapReport
    from icmlora.fleet.measure.report import EvaluateReport, Measurable
    from icmlora.fleet.report.summary import ReportSummary
    from icmlora.fleet.stats.bill import Bill
    from icmlora.fleet.tasks.copies import CopyReport
    from icmlora.fleet.tasks.described import DescribedTask
    from icmlora.fleet.tasks.doctor import Check
    from icmlora.fleet.tasks.duplicate_pairs import DuplicatesReport
    from icmlora.fleet.tasks.generators import GeneratorVersion, RolledBack
    from icmlora.fleet.tasks.init import InitReport
    from icmlora.fleet.tasks.tasks import EditReport, Removal, RemoveReport, TaskDetails
    from icmlora.fleet.train.report import TrainReport
    from icmlora.fleet.vectors.recognize import RecognizeReport
    from icmlora.fleet.vectors.vectors import VectorReport
    from icmlora.fleet.write.cards import MergedPart
    from icmlora.fleet.write.materialize import MaterializeReport
    from icmlora.fleet.write.merge import Merged
    from icmlora.fleet.write.sources import TooLossy
    from icmlora.formats.discovery.folder import load_adapter, save_adapter
    from icmlora.serving.attach import attach
    from registry.findings import Finding, Rebuilt
    from registry.manifests import Generator, Task
    from registry.names import DatabaseUrl
    from registry.reachability import PruneReport

__all__ = [
    "AblationReport",
    "Adapter",
    "AdapterRefused",
    "BaseModelConflict",
    "BaseModelMismatch",
    "BaseModelNotFound",
    "BaseModelUnsuited",
    "Bill",
    "Bundle",
    "BundleError",
    "Cancelled",
    "Check",
    "CodeError",
    "ContextReport",
    "CopyReport",
    "CustomModel",
    "DamagedStore",
    "DataError",
    "DatabaseUrl",
    "DescribedTask",
    "DeviceUnavailable",
    "DuplicatesReport",
    "EditReport",
    "EncodeReport",
    "EvaluateReport",
    "Event",
    "EvictReport",
    "ExportReport",
    "Finding",
    "Fleet",
    "Generated",
    "Generator",
    "GeneratorConflict",
    "GeneratorError",
    "GeneratorVersion",
    "GroupError",
    "IcmError",
    "IcmLoraError",
    "ImportReport",
    "IngestReport",
    "InitReport",
    "InvalidFilter",
    "InvalidName",
    "Joined",
    "KnownBase",
    "LastCopy",
    "LoraModule",
    "MapReport",
    "MaterializeReport",
    "Measurable",
    "Merged",
    "MergedPart",
    "Metric",
    "NotAStore",
    "NotCovered",
    "NotRecognized",
    "OptionsConflict",
    "OtherFormat",
    "OutputExists",
    "Progress",
    "PruneReport",
    "Rebuilt",
    "RecognizeReport",
    "RegistryError",
    "Removal",
    "RemoveReport",
    "ReportSummary",
    "RestoreReport",
    "RolledBack",
    "Separated",
    "StoreLocked",
    "StoreNotFound",
    "StoreUnavailable",
    "Task",
    "TaskConflict",
    "TaskContext",
    "TaskDetails",
    "TaskNotFound",
    "TaskRow",
    "TooLossy",
    "TrainReport",
    "UnsafeInput",
    "VectorReport",
    "attach",
    "base_model_loader",
    "convert",
    "load_adapter",
    "save_adapter",
]

_HOMES = {
    "Adapter": "icmlora.adapter.model",
    "Bill": "icmlora.fleet.stats.bill",
    "Bundle": "icmlora.fleet.bundles.bundles",
    "Check": "icmlora.fleet.tasks.doctor",
    "ContextReport": "icmlora.fleet.few_shot.generated",
    "CopyReport": "icmlora.fleet.tasks.copies",
    "CustomModel": "icmlora.base_models.kinds.custom_model",
    "DatabaseUrl": "registry.names",
    "DescribedTask": "icmlora.fleet.tasks.described",
    "DuplicatesReport": "icmlora.fleet.tasks.duplicate_pairs",
    "EditReport": "icmlora.fleet.tasks.tasks",
    "EncodeReport": "icmlora.fleet.encode.report",
    "EvaluateReport": "icmlora.fleet.measure.report",
    "Event": "icmlora.fleet.context",
    "EvictReport": "icmlora.fleet.evict.types",
    "ExportReport": "icmlora.fleet.bundles.export",
    "Finding": "registry.findings",
    "Fleet": "icmlora.fleet.api",
    "Generated": "icmlora.fleet.few_shot.generated",
    "Generator": "registry.manifests",
    "GeneratorVersion": "icmlora.fleet.tasks.generators",
    "GroupError": "icmlora.adapter.metrics",
    "AblationReport": "icmlora.fewshot.guard",
    "ImportReport": "icmlora.fleet.bundles.import_",
    "IngestReport": "icmlora.fleet.ingest.report",
    "InitReport": "icmlora.fleet.tasks.init",
    "Joined": "icmlora.fleet.bases.labels",
    "KnownBase": "icmlora.fleet.bases.base_models",
    "LoraModule": "icmlora.adapter.model",
    "MapReport": "icmlora.fleet.map.task_map",
    "MaterializeReport": "icmlora.fleet.write.materialize",
    "Merged": "icmlora.fleet.write.merge",
    "MergedPart": "icmlora.fleet.write.cards",
    "Measurable": "icmlora.fleet.measure.report",
    "Metric": "icmlora.base_models.modality",
    "Progress": "icmlora.fleet.context",
    "PruneReport": "registry.reachability",
    "Rebuilt": "registry.findings",
    "RecognizeReport": "icmlora.fleet.vectors.recognize",
    "Removal": "icmlora.fleet.tasks.tasks",
    "RemoveReport": "icmlora.fleet.tasks.tasks",
    "ReportSummary": "icmlora.fleet.report.summary",
    "RestoreReport": "icmlora.fleet.evict.restore",
    "RolledBack": "icmlora.fleet.tasks.generators",
    "Separated": "icmlora.fleet.bases.labels",
    "Task": "registry.manifests",
    "TaskContext": "icmlora.base_models.examples.context",
    "TaskDetails": "icmlora.fleet.tasks.tasks",
    "TaskRow": "registry.tables",
    "TooLossy": "icmlora.fleet.write.sources",
    "TrainReport": "icmlora.fleet.train.report",
    "VectorReport": "icmlora.fleet.vectors.vectors",
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
