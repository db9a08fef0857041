"""Base models loaded by transformers' Auto classes that make all predictions of an example in one pass.

    example --inputs--> tensors, target classes --model--> a row of logits for each prediction --cross entropy--> loss

A modality of this kind defines how to convert an example to tensors, and which hidden states represent it. Nothing is
padded: consecutive examples of equal shapes are batched, others run one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.examples import Examples
from icmlora.base_models.finding.lookup import read_config
from icmlora.base_models.modality import IGNORED, BaseModel, Metric, Modality, Score
from icmlora.errors import BaseModelUnsuited, DataError

if TYPE_CHECKING:
    import torch

    from icmlora.base_models.examples.chat_template import Templates
    from icmlora.base_models.finding.lookup import FoundBase


@dataclass(frozen=True, eq=False)
class Inputs:
    """An example as the model reads it.

    Attributes:
        tensors: Arguments of the model's `forward`, with a batch of one as their first dimension.
        targets: The target class of each prediction; `IGNORED` if it is not scored.
        text: The scored text; empty if there is none.
        size: Number of tokens read; 1 for inputs that are never truncated.
    """

    tensors: Mapping[str, torch.Tensor]
    targets: tuple[int, ...]
    text: str = ""
    size: int = 1

    @property
    def count(self) -> int:
        """Number of scored predictions."""
        return sum(target != IGNORED for target in self.targets)

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of each tensor; equal for all examples in a batch."""
        return tuple((name, tuple(value.shape)) for name, value in self.tensors.items())


class AutoModality(Modality[Any, Inputs]):
    """Base class of these modalities; a subclass sets the names and defines `example` and `inputs`."""

    name = ""
    metric = Metric("nats per token", higher_is_better=False)
    auto_class = ""  # of transformers, such as "AutoModelForMaskedLM"
    processor_class = "AutoTokenizer"
    batch = 8  # maximum examples of equal shapes per batch

    def suits(self, found: FoundBase) -> bool:
        """Return whether `config.json` names a class that the Auto class would load."""
        return not found.is_gguf and names_a_class_of(self.auto_class, read_config(found.path))

    def load(
        self,
        found: FoundBase,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> BaseModel:
        """Load model and processor, by default on the CPU."""
        from icmlora.base_models.load import base_of, load_auto

        network = partial(load_auto, found, self.name, self.auto_class, self.processor_class)
        return base_of(found, self, network, device, dtype, fingerprint)

    def at_once(self, base: BaseModel) -> int:
        """Return the maximum number of examples of equal shapes per batch."""
        return self.batch

    def inputs(self, base: BaseModel, example: Any, limit: int) -> Inputs:
        """Convert an example to model inputs; raise `DataError`, with a fact about the row, if that fails."""
        raise NotImplementedError

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return one hidden state per example of a batch, (examples, d): the mean over its tokens."""
        return outputs.hidden_states[-1].mean(dim=1)  # type: ignore[no-any-return]

    def readable(self, base: BaseModel, examples: Sequence[Any], template: Templates | None = None) -> Examples:
        """Skip unreadable examples, such as a damaged image or an unknown label."""
        kept: list[Any] = []
        skipped, reason = 0, None
        for example in examples:
            try:
                self.inputs(base, example, base.within(64))
            except DataError as error:
                skipped += 1
                reason = reason or f"a row {error.message}"
            else:
                kept.append(example)
        return Examples(tuple(kept), skipped, reason)

    def prepare(self, base: BaseModel, examples: Sequence[Any], limit: int, *, whole: bool = False) -> list[Inputs]:
        """Convert examples to tensors, skipping any without a scored prediction; raise `DataError` if none is left."""
        found = [self.inputs(base, example, base.within(limit)) for example in examples]
        scored = [item for item in found if item.count]
        if not scored:
            raise DataError("no example contains anything to predict", hint="use longer examples")
        return scored

    def states(self, base: BaseModel, examples: Sequence[Any], limit: int) -> torch.Tensor:
        """Return the last-layer state of each example, (examples, d) in float32."""
        import torch

        items = [self.inputs(base, example, base.within(limit)) for example in examples]
        with torch.no_grad():
            batches = _batches(items, self.at_once(base))
            found = [self.pooled(_run(base, some, output_hidden_states=True)).float() for some in batches]
        return torch.cat(found)

    def logits(self, base: BaseModel, items: Sequence[Inputs], *, from_leaf: bool = False) -> list[torch.Tensor]:
        """Return the logits of each example, (predictions, classes)."""
        rows: list[torch.Tensor] = []
        with ExitStack() as stack:
            if from_leaf:
                from icmlora.base_models.kinds.gradients import gradients_from_inputs

                stack.enter_context(gradients_from_inputs(base.model))
            for some in _batches(items, self.at_once(base)):
                logits = _run(base, some, from_leaf=from_leaf).logits
                logits = logits if logits.dim() == 3 else logits[:, None]  # (examples, predictions, classes)
                rows += list(logits)
        return rows

    def wanted(self, item: Inputs) -> Sequence[int] | None:
        """Return the targets of the last predictions; some models put predictions for an image before the text's."""
        return item.targets

    def measure(self, base: BaseModel, examples: Sequence[Any], limit: int) -> Score:
        """Return the loss in nats per prediction."""
        import torch

        from icmlora.base_models.log_probabilities import cross_entropy

        items = self.prepare(base, examples, limit)
        with torch.inference_mode():
            rows = self.logits(base, items)
            nats = [float(cross_entropy(row, item.targets)) for row, item in zip(rows, items, strict=True)]
        count = sum(item.count for item in items)
        return Score(sum(nats) / count, count, max(1, sum(len(item.text.encode()) for item in items)))


def names_a_class_of(auto_class: str, config: Mapping[str, object]) -> bool:
    """Return whether a configuration names a class that a transformers Auto class loads."""
    named = config.get("architectures")
    return bool(classes_of(auto_class, config).intersection(named if isinstance(named, list) else []))


def classes_of(auto_class: str, config: Mapping[str, object]) -> set[str]:
    """Return the model classes that an Auto class may use for a configuration."""
    from transformers.models.auto import modeling_auto

    table = getattr(modeling_auto, auto_class)._model_mapping._model_mapping  # model type -> name or names of classes
    kind = config.get("model_type")
    known = table.get(kind) if isinstance(kind, str) else None
    return {known} if isinstance(known, str) else set(known or ())


def seen(base: BaseModel, made: Mapping[str, Any], what: str) -> dict[str, torch.Tensor]:
    """Return the tensors that the model reads from the output of a processor, by name; `what` is for messages.

    Raises:
        BaseModelUnsuited: The model would ignore the processed input.
    """
    import inspect

    import torch

    # Some processors also create labels, from the prompt alone; icm scores the answer itself.
    read = inspect.signature(type(base.model).forward).parameters.keys() - {"labels"}
    tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor) and name in read}
    if not any(value.is_floating_point() for value in tensors.values()):
        kind = type(base.processor).__name__
        made_of = ", ".join(sorted(made)) or "nothing"
        fact = f"{kind} turns {what} into {made_of}, which base model {base.label!r} does not read"
        raise BaseModelUnsuited(fact, hint="use a model folder that contains the matching processor")
    return tensors


def _batches(items: Sequence[Inputs], most: int) -> Iterator[Sequence[Inputs]]:
    """Yield batches of consecutive examples of equal shapes."""
    for _, run in itertools.groupby(items, key=lambda item: item.shapes):
        same = list(run)
        for first in range(0, len(same), most):
            yield same[first : first + most]


def _run(base: BaseModel, items: Sequence[Inputs], *, from_leaf: bool = False, **options: Any) -> Any:
    import torch

    tensors = {}
    for name in items[0].tensors:
        value = torch.cat([item.tensors[name] for item in items]).to(base.device)
        if value.is_floating_point():  # pixels and audio; for token ids, gradients start at the embeddings
            value = value.to(base.input_dtype).requires_grad_(from_leaf)
        tensors[name] = value
    return base.model(**tensors, **options)
