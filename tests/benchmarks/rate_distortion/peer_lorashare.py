"""lorashare: principal components of the stacked factors per module and side, (k, r) loadings per task."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.rate_distortion.peers import Group, disk_size, imported


@dataclass(frozen=True)
class Lorashare:
    """The package with k components."""

    components: int
    package: str = "lorashare"

    def compress(self, staged: Mapping[str, Path], out: Path) -> Group:
        """Fit, save, load again and rebuild."""
        lorashare = imported("lorashare")
        logging.getLogger("lorashare").setLevel(logging.ERROR)
        model = lorashare.SHAREModel.from_adapters(
            {task: str(folder) for task, folder in staged.items()}, num_components=self.components, device="cpu"
        )
        model.save_pretrained(out)
        model = lorashare.SHAREModel.from_pretrained(out)
        rebuilt = {task: out.parent / "rebuilt" / task for task in staged}
        for task, folder in rebuilt.items():
            model.reconstruct(task, output_dir=folder)
        sizes = {task: disk_size(out / "adapters" / task) for task in staged}
        return Group(disk_size(out) - sum(sizes.values()), sizes, rebuilt)
