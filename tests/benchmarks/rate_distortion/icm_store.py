"""icm itself, from a trained store: bytes as they lie on disk, adapters as `icm materialize --source code` writes them.

Several stores, trained at several settings, are the points of its curve.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from icmlora import Fleet
from icmlora.adapter.model import Adapter
from icmlora.formats.discovery.folder import load_adapter
from registry.store import Store
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.method import Coded


@dataclass(frozen=True)
class IcmStore:
    """The generator of a store with its codes, vectors, manifests and database."""

    folder: Path

    def identity(self) -> str:
        """Return what names the generator and the codes."""
        with Store.open(self.folder, read_only=True) as store:
            codes = [task.code.blob for task in store.tasks() if task.code is not None]
        return f"icm {' '.join(codes)}"

    def code(self, fleet: FleetFolder, work: Path) -> Coded:
        """Read the sizes; a task is decoded when it is asked for."""
        with Store.open(self.folder, read_only=True) as store:
            tasks, usage = store.named(list(fleet)), store.usage()
        coded = {task.name: task.code for task in tasks if task.code is not None}
        if missing := [task.name for task in tasks if task.name not in coded]:
            raise SystemExit(f"tasks without a code in {self.folder.name}: {', '.join(missing)}")
        vectors = {task.name: sum(file.size for file in {vector.blob for vector in task.vectors}) for task in tasks}
        (generator,) = {code.generator for code in coded.values()}
        # Database and manifests are no part of any one task here, but without them nothing comes back from the store.
        database = usage.database + usage.manifests
        notes = {"vectors": sum(vectors.values()), "database": database, "generator": generator}
        return Coded(
            generator.size + database,
            {name: code.size + vectors[name] for name, code in coded.items()},
            self._decode,
            notes,
        )

    def _decode(self, task: str) -> Adapter:
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            written = Path(folder) / "adapter"
            Fleet(self.folder).materialize(task, written, source="code", dtype="float32")
            return load_adapter(written)
