"""The values that a `Fleet` returns from its store, for callers who do not import `registry`."""

from registry.records import (
    AdapterRecord,
    Claim,
    CodeRecord,
    EvaluationRecord,
    GeneratorRecord,
    Rung,
    TaskRecord,
    TaskSummary,
)
from registry.tables.base_models import Joined, Separated

__all__ = [
    "AdapterRecord",
    "Claim",
    "CodeRecord",
    "EvaluationRecord",
    "GeneratorRecord",
    "Joined",
    "Rung",
    "Separated",
    "TaskRecord",
    "TaskSummary",
]
