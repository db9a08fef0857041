"""The values that a `Fleet` returns from its store, for callers who do not import `registry`."""

from registry.manifests import Adapter, Claim, Code, Generator, Measurement, Source, Task
from registry.tables import TaskRow

__all__ = ["Adapter", "Claim", "Code", "Generator", "Measurement", "Source", "Task", "TaskRow"]
