"""The lattice E8 with icm's refinement: the same objective, samples, steps and rates of learning, but its own coder.

    rows in steps --nearest point, straight through--> factors --KL and answers--+
          +--------bits of the points' shells, under the tables of the moment----+--gradient--> rows and strengths

What is stored afterwards is an ordinary code of the lattice, so the difference to the point without refinement is what
refinement is worth, and the difference to icm's refined points is what the generator and icm's code are worth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.reading import examples_for
from icmlora.base_models.running.lora_hooks import Factors, factors_of
from icmlora.generator.codec.relaxed import RelaxedCode
from icmlora.io.devices import gradient_dtype
from icmlora.io.staging import writing_file
from icmlora.training.effect import Effect
from icmlora.training.refinement import Refinable, RefineConfig, items_for, refine
from icmlora.training.teacher import Teacher
from tests.benchmarks import baselines
from tests.benchmarks.baselines import e8
from tests.benchmarks.baselines.catalogue import baseline_named
from tests.benchmarks.baselines.lattice import Lattice, Rows, from_bytes, point_bits, to_bytes
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.method import Coded, sources_digest

SAMPLES = "samples.jsonl"
_UNSEEN = 0.5  # times that a shell which no point is in counts as one


class RelaxedRows:
    """The rows of one adapter while an optimiser changes them; what `refine` asks of a `RelaxedCode`."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self._row_of, self._module_of, self._is_output = rows, rows.row_of, rows.module_of, rows.is_output
        self._class_of = torch.from_numpy(rows.classes())[self._row_of]  # as at the start; the code has them anew
        self._blocks = nn.Parameter(rows.blocks.clone())
        self._strength = nn.Parameter(torch.zeros(len(rows.counts)))  # log2 of a factor of each module's dW

    @property
    def values(self) -> list[nn.Parameter]:
        """The parameter that is rounded to points, shape (n, 8)."""
        return [self._blocks]

    @property
    def strengths(self) -> list[nn.Parameter]:
        """The parameter that scales modules, in octaves."""
        return [self._strength]

    def factors(self, dtype: torch.dtype = torch.float32) -> Factors:
        """Return the factors that the rounded rows stand for, with gradients."""
        still = self._blocks.detach()
        points = e8.nearest(still) + (self._blocks - still)
        found = self._rows.factors(points * self._scales()[self._row_of][:, None])
        return {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in found}

    def bits(self) -> torch.Tensor:
        """Return the bits of the points: those of their shells' costs, linear in the squared length between shells."""
        shell = self._blocks.square().sum(1) / 2
        whole = torch.from_numpy(e8.shells(self._now().doubled()))
        total = torch.zeros(())
        for kind in self._class_of.unique():
            mine, counted = shell[self._class_of == kind], whole[self._class_of == kind]
            costs = _costs(counted.numpy())
            low = mine.detach().long().clamp_max(len(costs) - 2)
            total = total + (costs[low] + (mine - low) * (costs[low + 1] - costs[low])).sum()
        return total

    def to_bytes(self) -> bytes:
        """Round and write the code."""
        now = self._now()
        return to_bytes(replace(now, scales=self._scales().detach()))

    def _now(self) -> Rows:
        return replace(self._rows, blocks=self._blocks.detach())

    def _scales(self) -> torch.Tensor:
        factor = torch.exp2(self._strength)[self._module_of]
        return self._rows.scales * torch.where(self._is_output, factor, 1.0)


def _costs(shells: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return the bits of a point of each shell, up to one that no point is in."""
    counts = np.append(np.bincount(shells, minlength=1), 0)
    seen = np.maximum(counts, _UNSEEN)
    surplus = np.log2(seen.sum() / max(len(shells), 1))  # what the shells are counted as that no point is in
    return torch.from_numpy(point_bits(seen) - surplus).float()


@dataclass(frozen=True)
class RefinedLattice:
    """A baseline of the catalogue, refined on the tasks' samples.

    Attributes:
        name: Of the baseline, a lattice.
        base: Folder of the base model.
        steps: Of refinement; icm's by default.
    """

    name: str
    base: Path
    steps: int = RefineConfig().steps

    def identity(self) -> str:
        """Return the name, a digest of the baselines' sources, and how it is refined."""
        return f"{self.name} refined {RefineConfig(steps=self.steps)} {sources_digest(baselines)}"

    def code(self, fleet: FleetFolder, work: Path) -> Coded:
        """Refine every task, but for those that a killed run has done."""
        config, lattice = RefineConfig(steps=self.steps), cast(Lattice, baseline_named(self.name))
        work.mkdir(parents=True, exist_ok=True)
        base: BaseModel | None = None
        for task in fleet:
            if not (work / task).exists():
                base = base or _loaded(self.base, fleet[task])
                samples = examples_for(base, (fleet.folder(task) / SAMPLES).read_bytes()).items
                code = refined(lattice, fleet[task], base, samples, config)
                with writing_file(work / task) as stream:
                    stream.write(code)
        codes = {task: (work / task).read_bytes() for task in fleet}
        sizes = {task: len(code) for task, code in codes.items()}
        return Coded(0, sizes, lambda task: from_bytes(codes[task]), {"steps": self.steps})


def refined(lattice: Lattice, adapter: Adapter, base: BaseModel, samples: Any, config: RefineConfig) -> bytes:
    """Return the refined code of one adapter."""
    rows = lattice.rows(adapter)
    relaxed = RelaxedRows(rows)
    error = squared_error(adapter, rows.adapter())
    read, held = items_for(base, adapter, samples, config)
    original = factors_of(adapter)
    teacher, effect = Teacher(base, original, read), Effect(Teacher(base, original, held))
    work = Refinable(cast(RelaxedCode, relaxed), error, teacher, effect, aim=None)
    for _ in refine([work], base, config, range(config.steps)):
        pass
    return relaxed.to_bytes()


def _loaded(folder: Path, adapter: Adapter) -> BaseModel:
    found = inspect_base(adapter.base_model, folder)
    return CausalLM().load(found, dtype=gradient_dtype(torch.device("cpu")))
