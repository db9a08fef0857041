"""Check which tasks an engine can serve: they need its base model and modules that the model has.

If an engine finds none of an adapter's modules in its model, it silently answers like the base model (vllm#34186,
#48019). So names and widths are compared before an adapter is loaded.
"""

from __future__ import annotations

import logging
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.layout import ModuleShape
from icmlora.base_models.finding.fingerprint import is_same_model
from icmlora.base_models.finding.lookup import FoundBase, find_base_model
from icmlora.errors import BaseModelNotFound
from icmlora.serving.tasks import ServedTask, ServedTasks

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)


class EngineBase:
    """The base model that an engine runs.

    Args:
        model: The model that the engine was started with: a name on a hub, or a folder.
        tasks: The tasks that clients may request.
        label: The base model of the tasks, if the user named it.
        log: Logger for warnings. Some engines show only messages below their own logger name.
    """

    def __init__(self, model: str, tasks: ServedTasks, label: str | None = None, *, log: logging.Logger = _log) -> None:
        self.model, self._warn = model, log.warning
        self._tasks, self._label = tasks, label
        self._same: dict[str, bool] = {}
        self._lock = threading.RLock()  # compare the models only once, with several threads calling

    def problem(self, task: ServedTask) -> str | None:
        """Return why the engine cannot serve a task, or None if it can. The first call may read the base model."""
        with self._lock:
            if not self.is_of(task.base_model):
                fact = f"task {task.name!r} needs base model {task.base_model!r}, but the engine runs {self.model!r}"
                hint = f"set ICM_BASE_MODEL={task.base_model} (`icm serve`: --base-model)"
                return f"{fact}; if they are the same model, {hint}"
            misfit = None if self._modules is None else _misfit(self._modules, task.layout)
            return None if misfit is None else f"task {task.name!r}: {misfit}"

    def is_of(self, base_model: str) -> bool:
        """Return whether the engine's model is this base model. The first call may read both."""
        with self._lock:
            if base_model not in self._same:
                self._same[base_model] = self._compare(base_model)
            return self._same[base_model]

    def prepare(self) -> None:
        """Read the engine's model and its modules now, so that the first task need not wait."""
        with self._lock:
            for base_model in self._tasks.base_models():
                self.is_of(base_model)
            _ = self._modules

    def _compare(self, base_model: str) -> bool:
        names = self._tasks.base_models().get(base_model, (base_model,))
        if self._label is not None:
            if self._label in names:
                self._warn_if_other(base_model)
            return self._label in names
        if self.model in names:
            return True
        if self._found is None:
            return False
        try:
            return is_same_model(self._tasks.locate(base_model), self._found)
        except BaseModelNotFound:
            return False

    def _warn_if_other(self, base_model: str) -> None:
        """Compare the engine's model with the base model that the user named, if both are on this machine."""
        try:
            if is_same_model(self._tasks.locate(base_model), find_base_model(self.model)):
                return
        except BaseModelNotFound:
            return
        fact = "icm: the engine runs %r, whose weights differ from %r, so adapters may produce meaningless output"
        self._warn(fact, self.model, base_model)

    @cached_property
    def _found(self) -> FoundBase | None:
        try:
            if Path(self.model).is_dir() or self._label is None:
                return find_base_model(self.model)
            return self._tasks.locate(self._label)
        except BaseModelNotFound as error:
            self._warn("icm: %s, so adapters are not checked against the model", error.message)
            return None

    @cached_property
    def _modules(self) -> dict[str, nn.Module] | None:
        """The modules of the engine's model, by name; None if it is not on this machine."""
        from icmlora.base_models.skeleton import load_skeleton  # imports transformers

        if self._found is None:
            return None
        try:
            return dict(load_skeleton(self._found).model.named_modules())
        except BaseModelNotFound as error:
            self._warn("icm: %s, so adapters are not checked against the model", error.message)
            return None


def _misfit(modules: dict[str, nn.Module], layout: tuple[ModuleShape, ...]) -> str | None:
    """Return which module of an adapter a model lacks; None if it has all."""
    for shape in layout:
        # transformers stores the experts of a layer as one module; adapters name each expert.
        experts, is_expert, _ = shape.module.partition(".experts.")
        found = modules.get(f"{experts}.experts" if is_expert else shape.module)
        if found is None:
            return f"the engine's model has no module {shape.module!r}"
        weight = getattr(found, "weight", None)
        if weight is None or weight.ndim != 2 or is_expert:
            continue
        widths = sorted((shape.inputs, shape.outputs))  # some layers store their weight transposed
        if sorted(weight.shape) != widths:
            return f"{shape.module!r} has shape {list(weight.shape)} in the engine's model, not {widths}"
    return None
