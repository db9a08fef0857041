"""The values that a `Fleet` returns from its store, for callers who do not import `registry`."""

from registry.records import (
    AdapterRecord,
    Asked,
    BaseModelRecord,
    CodeRecord,
    EvaluationRecord,
    GeneratorRecord,
    Rung,
    TaskRecord,
    TaskSummary,
    VectorRecord,
    View,
)

__all__ = [
    "AdapterRecord",
    "Asked",
    "BaseModelRecord",
    "CodeRecord",
    "EvaluationRecord",
    "GeneratorRecord",
    "Rung",
    "TaskRecord",
    "TaskSummary",
    "VectorRecord",
    "View",
]
