"""vlora-dev: one SVD basis per module and side over flattened factors, k loadings per task.

It keeps nothing of adapter_config.json, so a compact head per task is counted and the original configuration is put
back beside what it rebuilds.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from icmlora.formats.peft.peft import CONFIG_NAME
from tests.benchmarks.rate_distortion.peers import Group, disk_size, head_size, imported, read_json


@dataclass(frozen=True)
class Vlora:
    """The package with k components; `nf4` stores the basis in 4 bits."""

    components: int
    nf4: bool = False
    package: str = "vlora-dev"

    def compress(self, staged: Mapping[str, Path], out: Path) -> Group:
        """Fit, save, load again and rebuild."""
        vlora, io = imported("vlora"), imported("vlora.io")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subspace = vlora.SharedSubspace.from_adapters(
                [vlora.load_adapter(folder) for folder in staged.values()],
                task_ids=list(staged),
                num_components=self.components,
            )
            (subspace.save_quantized if self.nf4 else subspace.save)(out)
            subspace = vlora.SharedSubspace.load(out)
        rebuilt = {}
        for task, folder in staged.items():
            weights = subspace.reconstruct(task)
            for side in (weights.lora_a, weights.lora_b):
                side.update({name: tensor.contiguous() for name, tensor in side.items()})
            rebuilt[task] = out.parent / "rebuilt" / task
            io.save_adapter(weights, rebuilt[task])
            shutil.copyfile(folder / CONFIG_NAME, rebuilt[task] / CONFIG_NAME)
        names = read_json(out / "subspace_meta.json")["task_filenames"]
        own = {task: disk_size(out / f"task_{names[task]}.safetensors") for task in staged}
        sizes = {task: size + head_size(staged[task]) for task, size in own.items()}
        return Group(disk_size(out) - sum(own.values()), sizes, rebuilt)
