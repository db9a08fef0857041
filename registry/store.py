"""The only door to a store.

with Store.open(path, create=True, command="icm ingest") as store:
    results = store.put_files(files, inspect)         # bytes first, durable
    store.ingest_tasks([TaskIngest(...)])             # rows last: the commit point
    data = store.read_blob(store.final_adapter("shakespeare").weights)
"""

from __future__ import annotations

from registry.generators import GeneratorOperations
from registry.ingest import IngestPlanOperations
from registry.learned import LearnedOperations
from registry.originals import OriginalOperations
from registry.recoding import RecodingOperations
from registry.runs import RunOperations
from registry.tasks import TaskOperations
from registry.transfer import TransferOperations
from registry.upkeep import UpkeepOperations

__all__ = ["Store"]


class Store(
    TaskOperations,
    IngestPlanOperations,
    LearnedOperations,
    GeneratorOperations,
    RecodingOperations,
    RunOperations,
    OriginalOperations,
    TransferOperations,
    UpkeepOperations,
):
    """Rows and bytes of a fleet in one folder; see :meth:`open`.

    A store is used by one thread at a time, and is opened anew after a fork. Any number of processes may have it
    open; those that delete wait for the others.
    """
