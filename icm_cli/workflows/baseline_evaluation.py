"""What other methods would keep of a task: encoded, decoded from the bytes, written, loaded by PEFT, measured.

Nothing of it is stored. A method that shares something prepares it from all tasks of the base model that still have
their originals, one adapter at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.workflows.plain_copy import read_original
from icm_cli.workflows.task_evaluation import RungResult, TaskEvaluation
from icmlora.adapter import Adapter
from icmlora.baselines.baseline import Baseline
from icmlora.baselines.catalogue import baseline_named
from icmlora.evaluation import NllResult, retained_gain
from icmlora.metrics import relative_dw_error
from icmlora.peft_folder import load_adapter_folder, save_adapter
from registry.records import AdapterRecord, Rung

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class BaselineResult:
    """One method on one task.

    Attributes:
        size: Bytes stored for this task alone.
        shared_size: Bytes stored once for the fleet.
        fleet_size: Tasks that share them.
        loss: On the held-out text.
        retained_gain: None where the original has no gain to keep.
        dw_error: None where the original is zero.
    """

    size: int
    shared_size: int
    fleet_size: int
    loss: NllResult
    retained_gain: float | None
    dw_error: float | None


class BaselineEvaluation:
    """Measures methods on tasks of one base model.

    Args:
        store: The open store.
        base_model: Label of the base model.
        names: Names of the methods.

    Raises:
        UnknownBaseline: One has no such name.
    """

    def __init__(self, store: Store, base_model: str, names: Sequence[str]) -> None:
        self._fleet = StoredOriginals(store, base_model)
        self._methods: dict[str, Baseline] = {name: baseline_named(name) for name in names}
        self._shared: dict[str, bytes] = {}

    def run(self, task: str, work: TaskEvaluation, rungs: Mapping[Rung, RungResult]) -> dict[str, BaselineResult]:
        """Measure every method on one task; none if its original was evicted.

        Args:
            task: The task's name in the store.
            work: The task's evaluation.
            rungs: Its results, base model and original among them.

        Raises:
            DataError: A loss that is no number.
        """
        if task not in self._fleet:
            return {}
        base, original = rungs["base"].nats_per_token, rungs["original"].nats_per_token
        results = {}
        for name, method in self._methods.items():
            shared = self._prepared(name)
            code = method.encode(self._fleet[task], shared)
            loss, error = self._measure(name, method.decode(code, shared), task, work)
            gain = retained_gain(base, original, loss.nats_per_token)
            results[name] = BaselineResult(len(code), len(shared), len(self._fleet), loss, gain, error)
        return results

    def _prepared(self, name: str) -> bytes:
        if name not in self._shared:
            self._shared[name] = self._methods[name].prepare(self._fleet)
        return self._shared[name]

    def _measure(self, name: str, decoded: Adapter, task: str, work: TaskEvaluation) -> tuple[NllResult, float | None]:
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            written = Path(folder) / "adapter"
            save_adapter(decoded, written, card="", metadata={})
            error = relative_dw_error(self._fleet[task], load_adapter_folder(written))
            return work.loss_of(name, written), error if math.isfinite(error) else None


class StoredOriginals(Mapping[str, Adapter]):
    """The originals of one base model that the store still has, read whenever they are asked for."""

    def __init__(self, store: Store, base_model: str) -> None:
        rows = (row for row in store.summaries() if row.task.base_model == base_model)
        self._store = store
        self._finals: dict[str, AdapterRecord] = {row.task.name: row.final for row in rows if not row.final.is_evicted}

    def __getitem__(self, task: str) -> Adapter:
        return read_original(self._store, self._finals[task])

    def __iter__(self) -> Iterator[str]:
        return iter(self._finals)

    def __len__(self) -> int:
        return len(self._finals)
