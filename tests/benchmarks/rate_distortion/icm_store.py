"""icm itself, from a trained store: bytes as they lie on disk, adapters as `icm materialize --source code` writes them.

Several stores, trained at several settings, are the points of its curve.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora import Fleet
from icmlora.adapter.model import Adapter
from icmlora.formats.discovery.folder import load_adapter
from registry.store import Store
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.method import Coded

if TYPE_CHECKING:
    from registry.records import GeneratorRecord


@dataclass(frozen=True)
class IcmStore:
    """The current generator of a store with its codes, vectors and database."""

    folder: Path

    def identity(self) -> str:
        """Return what names the generator and the codes."""
        with Store.open(self.folder, read_only=True) as store:
            codes = [code.blob for generator in self._generators(store) for code in store.codes.all(generator.id)]
        return f"icm {' '.join(codes)}"

    def code(self, fleet: FleetFolder, work: Path) -> Coded:
        """Read the sizes; a task is decoded when it is asked for."""
        with Store.open(self.folder, read_only=True) as store:
            (generator,) = self._generators(store)
            sizes, vectors = {}, {}
            for task in fleet:
                code = store.codes.get(task, generator.id)
                if code is None:
                    raise SystemExit(f"task {task} has no code in {self.folder.name}")
                blobs = {vector.blob for vector in store.vectors.all(task)}
                vectors[task] = sum(store.blobs.size(blob) for blob in blobs)
                sizes[task] = code.size + vectors[task]
            usage = store.usage()
        notes = {"vectors": sum(vectors.values()), "database": usage.database, "generator": generator.blob}
        # The database is no part of any one task here, but without it nothing comes back from the store.
        return Coded(generator.size + usage.database, sizes, self._decode, notes)

    def _decode(self, task: str) -> Adapter:
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            written = Path(folder) / "adapter"
            Fleet(self.folder).materialize(task, written, source="code", dtype="float32")
            return load_adapter(written)

    def _generators(self, store: Store) -> list[GeneratorRecord]:
        found = [generator for generator in store.generators.all() if generator.is_current]
        if len(found) != 1:
            raise SystemExit(f"{self.folder} has {len(found)} current generators; one is needed")
        return found
