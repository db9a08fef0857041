"""Base models loaded by the user's own function instead of transformers. Importing this module needs no torch.

    @icmlora.base_model_loader
    def load(path, device, dtype) -> icmlora.CustomModel: ...

    icm base add NAME PATH --loader my_module:load

The store contains the name of the function, and a store may come from another user. For this reason, only functions
marked as loaders are called; their modules are imported from Python's module path.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from icmlora.base_models.examples.examples import Examples
from icmlora.base_models.examples.media import MEDIA_KEYS
from icmlora.base_models.finding.fingerprint import fingerprint_base
from icmlora.base_models.modality import BaseModel, Metric, Modality, Score
from icmlora.errors import BaseModelMismatch, BaseModelNotFound, BaseModelUnsuited, DataError
from registry.errors import IcmError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from icmlora.base_models.examples.chat_template import Templates
    from icmlora.base_models.finding.lookup import FoundBase

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MARK = "_icm_base_model_loader"
_BATCH = 8  # maximum examples per call of `states`
Loader = TypeVar("Loader", bound="Callable[[Path, torch.device, torch.dtype], CustomModel]")


def base_model_loader(function: Loader) -> Loader:
    """Mark a function as a base model loader for `icm base add --loader`; return the function.

    It takes the path of the base model, the device and the precision, and returns a `CustomModel`.
    """
    setattr(function, _MARK, True)
    return function


class CustomModel(ABC):
    """The interface of a base model that transformers does not load.

    `example` converts the rows of `samples.jsonl` and `eval.jsonl` to examples. All methods run `model` in its current
    state, including any attached adapter.

    Attributes:
        model: The network, on the device and in evaluation mode. Adapters refer to its modules by name.
        metric: The metric that `measure` returns.
        hidden_size: Size of a hidden state and so of a task vector.
    """

    model: nn.Module
    metric: Metric
    hidden_size: int

    def example(self, row: Mapping[str, Any]) -> Any:
        """Convert a row to an example; raise any exception if it is invalid. By default, return the row."""
        return row

    @abstractmethod
    def states(self, examples: Sequence[Any]) -> torch.Tensor:
        """Return one hidden state per example, shape (examples, hidden size)."""

    @abstractmethod
    def loss(self, examples: Sequence[Any]) -> torch.Tensor:
        """Return the loss, summed over the examples: a scalar with its gradients."""

    @abstractmethod
    def measure(self, examples: Sequence[Any]) -> tuple[float, Mapping[str, float]]:
        """Return the metric on held-out examples, and additional figures by name."""

    def predictions(self, examples: Sequence[Any]) -> list[torch.Tensor]:
        """Return logits per example, (predictions, classes), for refinement; by default, raise `BaseModelUnsuited`."""
        raise BaseModelUnsuited("its loader gives no predictions, so its codes cannot be refined")


def find_loader(label: str, name: str) -> Callable[[Path, torch.device, torch.dtype], CustomModel]:
    """Import the loader of a base model; raise `BaseModelNotFound` if it is missing or not marked as a loader."""
    if not _NAME.fullmatch(name):
        raise BaseModelNotFound(f"the loader {name!r} of base model {label!r} is not MODULE:FUNCTION")
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except Exception as error:
        fact = f"the loader {name} of base model {label!r} cannot be imported: {_reason(error)}"
        raise BaseModelNotFound(fact, hint="install its module, or add its folder to PYTHONPATH") from error
    if getattr(found, _MARK, None) is not True:
        fact = f"{name} is not marked as a loader of base models"
        raise BaseModelNotFound(fact, hint="add @icmlora.base_model_loader above the function if it is yours")
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class CustomItem:
    """An example whose content is opaque to icm."""

    example: Any
    count: int = 1
    size: int = 1


class CustomModality(Modality[Any, CustomItem]):
    """Adapt a `CustomModel` to the modality protocol; complete only once the base model is loaded."""

    name = "base model with a loader"
    reads = MEDIA_KEYS

    def __init__(self, loader: str, custom: CustomModel | None = None) -> None:
        self._loader, self._custom = loader, custom

    @property
    def custom(self) -> CustomModel:
        assert self._custom is not None, "the base model is not loaded"
        return self._custom

    @property
    def metric(self) -> Metric:
        return self.custom.metric

    def suits(self, found: FoundBase) -> bool:
        return found.loader == self._loader

    def load(
        self,
        found: FoundBase,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> BaseModel:
        """Call the loader; raise `BaseModelNotFound` if it fails or does not return a complete `CustomModel`."""
        from icmlora.io.devices import inference_dtype

        function = find_loader(found.label, self._loader)
        try:
            custom = function(found.path, device, dtype or inference_dtype(device))
        except Exception as error:
            fact = f"the loader {self._loader} of base model {found.label!r} failed: {_reason(error)}"
            raise BaseModelNotFound(fact, path=found.path) from error
        missing = [name for name in ("model", "metric", "hidden_size") if not hasattr(custom, name)]
        if not isinstance(custom, CustomModel) or missing:
            wrong = f"has no {missing[0]}" if isinstance(custom, CustomModel) else "is not an icmlora.CustomModel"
            raise BaseModelNotFound(
                f"the object that the loader {self._loader} of base model {found.label!r} returned {wrong}"
            )
        custom.model.requires_grad_(False).train(False)
        return BaseModel(
            label=found.label,
            model=custom.model,
            processor=None,
            fingerprint=fingerprint or fingerprint_base(found),
            modality=CustomModality(self._loader, custom),
            hidden_size=custom.hidden_size,
            layers=1,
        )

    def example(self, row: Mapping[str, Any]) -> Any:
        """Read a row with the user's code; raise `DataError` if that code rejects it."""
        try:
            return self.custom.example(row)
        except IcmError:
            raise
        except Exception as error:
            raise DataError(f"is not an example of the base model: {_reason(error)}") from error

    def readable(self, base: BaseModel, examples: Sequence[Any], template: Templates | None = None) -> Examples:
        return Examples(tuple(examples))

    def prepare(self, base: BaseModel, examples: Sequence[Any], limit: int, *, whole: bool = False) -> list[CustomItem]:
        return [CustomItem(example) for example in examples]

    def states(self, base: BaseModel, examples: Sequence[Any], limit: int) -> torch.Tensor:
        """Return the states, (examples, d) in float32; raise `BaseModelMismatch` if the shape is wrong."""
        import torch

        batches = [examples[first : first + _BATCH] for first in range(0, len(examples), _BATCH)]
        with self._running("states"), torch.no_grad():
            found = torch.cat([self.custom.states(batch).float() for batch in batches])
        if found.shape != (len(examples), base.hidden_size):
            wanted = (len(examples), base.hidden_size)
            fact = f"states of the loader {self._loader} returned the shape {tuple(found.shape)}, not {wanted}"
            raise BaseModelMismatch(fact)
        return found

    def logits(self, base: BaseModel, items: Sequence[CustomItem], *, from_leaf: bool = False) -> list[torch.Tensor]:
        from icmlora.base_models.kinds.gradients import gradients_from_inputs

        with self._running("predictions"), gradients_from_inputs(base.model) if from_leaf else nullcontext():
            return self.custom.predictions([item.example for item in items])

    def loss(self, base: BaseModel, items: Sequence[CustomItem]) -> torch.Tensor:
        from icmlora.base_models.kinds.gradients import gradients_from_inputs

        with self._running("loss"), gradients_from_inputs(base.model):
            return self.custom.loss([item.example for item in items])

    def wanted(self, item: CustomItem) -> None:
        """Return None: only the loader can compute the loss from predictions."""

    def measure(self, base: BaseModel, examples: Sequence[Any], limit: int) -> Score:
        """Return the metric; raise `DataError` if there is nothing to measure."""
        import torch

        if not examples:
            raise DataError("there is nothing to measure")
        with self._running("measure"), torch.no_grad():
            value, others = self.custom.measure(examples)
        return Score(float(value), len(examples), others=dict(others))

    @contextmanager
    def _running(self, method: str) -> Iterator[None]:
        """Convert exceptions from the user's code to a `BaseModelMismatch` that names the method."""
        try:
            yield
        except IcmError:
            raise
        except Exception as error:
            raise BaseModelMismatch(f"{method} of the loader {self._loader} failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
