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

import sys
from importlib import import_module
from typing import TYPE_CHECKING

try:
    from registry.errors import (
        BaseModelConflict as BaseModelConflict,
        DamagedStore as DamagedStore,
        GeneratorConflict as GeneratorConflict,
        IcmError as IcmError,
        InvalidFilter as InvalidFilter,
        InvalidName as InvalidName,
        LastCopy as LastCopy,
        NotAStore as NotAStore,
        RegistryError as RegistryError,
        StoreLocked as StoreLocked,
        StoreNotFound as StoreNotFound,
        StoreUnavailable as StoreUnavailable,
        TaskConflict as TaskConflict,
        TaskNotFound as TaskNotFound,
    )
except ImportError as error:
    hiding = getattr(sys.modules.get("registry"), "__file__", None)
    if hiding is None:
        raise
    raise ImportError(f"{hiding} hides icm's own package `registry`. Rename it, or run from another folder.") from error

from icmlora.errors import (
    AdapterRefused as AdapterRefused,
    BaseModelMismatch as BaseModelMismatch,
    BaseModelNotFound as BaseModelNotFound,
    BaseModelUnsuited as BaseModelUnsuited,
    BundleError as BundleError,
    Cancelled as Cancelled,
    CodeError as CodeError,
    DataError as DataError,
    DeviceUnavailable as DeviceUnavailable,
    GeneratorError as GeneratorError,
    IcmLoraError as IcmLoraError,
    NotCovered as NotCovered,
    NotRecognized as NotRecognized,
    OptionsConflict as OptionsConflict,
    OtherFormat as OtherFormat,
    OutputExists as OutputExists,
    UnsafeInput as UnsafeInput,
)

if TYPE_CHECKING:  # the same names, for type checkers
    from icmlora.adapter.metrics import GroupError as GroupError
    from icmlora.adapter.model import Adapter as Adapter, LoraModule as LoraModule
    from icmlora.base_models.examples.context import TaskContext as TaskContext
    from icmlora.base_models.kinds.custom_model import (
        CustomModel as CustomModel,
        base_model_loader as base_model_loader,
    )
    from icmlora.base_models.modality import Metric as Metric
    from icmlora.fewshot.guard import AblationReport as AblationReport
    from icmlora.fleet.api import Fleet as Fleet
    from icmlora.fleet.bases.base_models import KnownBase as KnownBase
    from icmlora.fleet.bases.labels import Joined as Joined, Separated as Separated
    from icmlora.fleet.bundles.bundles import Bundle as Bundle
    from icmlora.fleet.bundles.export import ExportReport as ExportReport
    from icmlora.fleet.bundles.import_ import ImportReport as ImportReport
    from icmlora.fleet.context import Event as Event, Progress as Progress
    from icmlora.fleet.convert.convert import convert as convert
    from icmlora.fleet.encode.report import EncodeReport as EncodeReport
    from icmlora.fleet.evict.restore import RestoreReport as RestoreReport
    from icmlora.fleet.evict.types import EvictReport as EvictReport
    from icmlora.fleet.few_shot.generated import ContextReport as ContextReport, Generated as Generated
    from icmlora.fleet.ingest.report import IngestReport as IngestReport
    from icmlora.fleet.map.task_map import MapReport as MapReport
    from icmlora.fleet.measure.report import EvaluateReport as EvaluateReport, Measurable as Measurable
    from icmlora.fleet.report.summary import ReportSummary as ReportSummary
    from icmlora.fleet.stats.bill import Bill as Bill
    from icmlora.fleet.tasks.copies import CopyReport as CopyReport
    from icmlora.fleet.tasks.described import DescribedTask as DescribedTask
    from icmlora.fleet.tasks.details import TaskDetails as TaskDetails
    from icmlora.fleet.tasks.doctor import Check as Check
    from icmlora.fleet.tasks.duplicate_pairs import DuplicatesReport as DuplicatesReport
    from icmlora.fleet.tasks.editing import EditReport as EditReport, Removal as Removal, RemoveReport as RemoveReport
    from icmlora.fleet.tasks.generators import GeneratorVersion as GeneratorVersion, RolledBack as RolledBack
    from icmlora.fleet.tasks.init import InitReport as InitReport
    from icmlora.fleet.train.report import TrainReport as TrainReport
    from icmlora.fleet.vectors.recognize import RecognizeReport as RecognizeReport
    from icmlora.fleet.vectors.vectors import VectorReport as VectorReport
    from icmlora.fleet.write.cards import MergedPart as MergedPart
    from icmlora.fleet.write.materialize import MaterializeReport as MaterializeReport
    from icmlora.fleet.write.merge import Merged as Merged
    from icmlora.fleet.write.sources import TooLossy as TooLossy
    from icmlora.formats.discovery.folder import load_adapter as load_adapter, save_adapter as save_adapter
    from icmlora.serving.attach import attach as attach
    from registry.findings import Finding as Finding, Rebuilt as Rebuilt
    from registry.manifests import Generator as Generator, Task as Task
    from registry.names import DatabaseUrl as DatabaseUrl
    from registry.reachability import PruneReport as PruneReport
    from registry.tables import TaskRow as TaskRow

_LAZY = {
    "icmlora.adapter.metrics": "GroupError",
    "icmlora.adapter.model": "Adapter LoraModule",
    "icmlora.base_models.examples.context": "TaskContext",
    "icmlora.base_models.kinds.custom_model": "CustomModel base_model_loader",
    "icmlora.base_models.modality": "Metric",
    "icmlora.fewshot.guard": "AblationReport",
    "icmlora.fleet.api": "Fleet",
    "icmlora.fleet.bases.base_models": "KnownBase",
    "icmlora.fleet.bases.labels": "Joined Separated",
    "icmlora.fleet.bundles.bundles": "Bundle",
    "icmlora.fleet.bundles.export": "ExportReport",
    "icmlora.fleet.bundles.import_": "ImportReport",
    "icmlora.fleet.context": "Event Progress",
    "icmlora.fleet.convert.convert": "convert",
    "icmlora.fleet.encode.report": "EncodeReport",
    "icmlora.fleet.evict.restore": "RestoreReport",
    "icmlora.fleet.evict.types": "EvictReport",
    "icmlora.fleet.few_shot.generated": "ContextReport Generated",
    "icmlora.fleet.ingest.report": "IngestReport",
    "icmlora.fleet.map.task_map": "MapReport",
    "icmlora.fleet.measure.report": "EvaluateReport Measurable",
    "icmlora.fleet.report.summary": "ReportSummary",
    "icmlora.fleet.stats.bill": "Bill",
    "icmlora.fleet.tasks.copies": "CopyReport",
    "icmlora.fleet.tasks.described": "DescribedTask",
    "icmlora.fleet.tasks.doctor": "Check",
    "icmlora.fleet.tasks.duplicate_pairs": "DuplicatesReport",
    "icmlora.fleet.tasks.generators": "GeneratorVersion RolledBack",
    "icmlora.fleet.tasks.init": "InitReport",
    "icmlora.fleet.tasks.details": "TaskDetails",
    "icmlora.fleet.tasks.editing": "EditReport Removal RemoveReport",
    "icmlora.fleet.train.report": "TrainReport",
    "icmlora.fleet.vectors.recognize": "RecognizeReport",
    "icmlora.fleet.vectors.vectors": "VectorReport",
    "icmlora.fleet.write.cards": "MergedPart",
    "icmlora.fleet.write.materialize": "MaterializeReport",
    "icmlora.fleet.write.merge": "Merged",
    "icmlora.fleet.write.sources": "TooLossy",
    "icmlora.formats.discovery.folder": "load_adapter save_adapter",
    "icmlora.serving.attach": "attach",
    "registry.findings": "Finding Rebuilt",
    "registry.manifests": "Generator Task",
    "registry.names": "DatabaseUrl",
    "registry.reachability": "PruneReport",
    "registry.tables": "TaskRow",
}
_HOMES = {name: module for module, names in _LAZY.items() for name in names.split()}
__all__ = sorted([*_HOMES, *(name for name, value in vars().items() if isinstance(value, type))])  # and the errors


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
