"""The protocol of a modality: everything icm needs to know about one kind of base model.

    FoundBase --load--> BaseModel
    row of samples.jsonl --example--> example --readable--> example --prepare--> item (token ids, pixels, ...)
    items --loss--> gradients      items --logits--> predictions      examples --states--> task vector, (d,)
    examples --measure--> Score; `metric` defines whether higher is better

All of them run `base.model` in its current state, including any attached adapter.
To add a modality, write a module with a class that has these members and list it in `kinds/modalities.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

    from icmlora.base_models.examples.chat_template import Templates
    from icmlora.base_models.examples.examples import Examples
    from icmlora.base_models.examples.prompts import Prompt
    from icmlora.base_models.finding.lookup import FoundBase
    from registry.names import LoadIn

Example = TypeVar("Example")
"""One line of `samples.jsonl` or `eval.jsonl`."""
Item = TypeVar("Item", bound="Prepared")
"""An example as the model reads it."""
IGNORED = -100
"""The target class of a prediction that is not scored."""
_ROUNDING = 1e-6  # relative tolerance: two float32 sums of the same numbers differ by less


@dataclass(frozen=True)
class Metric:
    """The metric of a modality's `measure`."""

    name: str
    higher_is_better: bool


class Prepared(Protocol):
    """An example as the model reads it."""

    @property
    def count(self) -> int:
        """Number of scored predictions, such as tokens or images."""
        ...

    @property
    def size(self) -> int:
        """Size of the input in the unit of the limit, tokens; 1 if examples are never truncated."""
        ...


@dataclass(frozen=True)
class Score:
    """A model's score on some examples."""

    value: float  # the metric, averaged over all scored predictions
    count: int  # number of scored predictions
    utf8_bytes: int = 1  # length of the scored text in UTF-8 bytes, at least 1; 1 if there is no text
    others: Mapping[str, float] = field(default_factory=dict)  # additional figures to print with the metric, by name
    of_each: tuple[float, ...] = ()  # the metric of each scored example, if `value` is a mean over them


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model in evaluation mode."""

    label: str  # the name that adapters use
    model: Any  # the network; adapters are attached and detached, but its weights never change
    processor: Any  # converts examples to its inputs; a tokenizer, for example
    fingerprint: str  # identifies the weights (see `icmlora.base_models.finding.fingerprint.fingerprint_base`)
    modality: Modality[Any, Any]  # how to use it
    # Width of the hidden states and so of a task vector; None if the configuration does not state it.
    hidden_size: int | None
    layers: int  # number of its layers
    positions: int | None = None  # maximum text length in tokens; None if there is no limit
    # Zero-filled parameters that its files lack: a classification head that adapters provide.
    made_up: frozenset[str] = frozenset()
    load_in: LoadIn | None = None  # quantised format of its linear layers; None if all weights are in full precision

    @property
    def tokenizer(self) -> Any:
        return self.processor

    def within(self, limit: int) -> int:
        """Return `limit`, capped at the model's maximum length in tokens."""
        return limit if self.positions is None else min(limit, self.positions)

    @property
    def device(self) -> torch.device:
        from icmlora.base_models.placement import main_device

        return main_device(self.model)

    @property
    def input_dtype(self) -> torch.dtype:
        """Precision of its non-integer inputs and of its computations."""
        dtype: torch.dtype = next(one.dtype for one in self.model.parameters() if one.is_floating_point())
        return dtype

    @property
    def dtype(self) -> str:
        """Precision of its weights, such as "float32", "bfloat16" or "nf4"; stated with every figure measured on it."""
        return self.load_in or str(self.input_dtype).removeprefix("torch.")


class Modality(Protocol[Example, Item]):
    """One kind of base model. Importing it should not import torch: `icm ingest` reads examples without it.

    The defaults of `reads`, `takes_context`, `probes`, `joined`, `context_state`, `loss`, `written`, `answer` and
    `counted` suit a model that reads examples one at a time and without files, generates nothing and pads nothing.
    """

    name: str
    """Name in messages."""
    reads: Collection[str] = ()
    """The `MEDIA_KEYS` of a row that it reads; a row with another one is skipped."""
    takes_context: bool = False
    """Whether samples can be prepended to an example, as in in-context learning."""
    probes: Sequence[Example] = ()
    """Neutral examples, for task vectors of tasks without samples; empty if there are none."""

    @property
    def metric(self) -> Metric:
        """The metric that `measure` returns."""
        ...

    def suits(self, found: FoundBase) -> bool:
        """Return whether a base model is of this kind and its metric makes sense, without loading it."""
        ...

    def load(
        self,
        found: FoundBase,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> BaseModel:
        """Load a base model.

        Args:
            found: The base model on disk.
            device: Target device.
            dtype: Precision of the weights; None for the device's default. Ignored for a base model with `load_in`,
                which has one precision for all purposes.
            fingerprint: Its fingerprint; None to compute it, which reads every weight file.

        Raises:
            BaseModelNotFound: It cannot be loaded.
        """
        ...

    def example(self, row: Mapping[str, Any]) -> Any:
        """Convert a row of `samples.jsonl` or `eval.jsonl` to an example, without a base model.

        Raises:
            DataError: It is not an example of this kind; the message is a fact about the row, such as "has no text".
        """
        ...

    def readable(self, base: BaseModel, examples: Sequence[Any], template: Templates | None = None) -> Examples:
        """Convert the results of `example` to the form that this base model reads; skip unreadable ones.

        All other methods take the result. A language model renders chats here, with its own chat template or the
        adapter's.
        """
        ...

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int, *, whole: bool = False) -> list[Item]:
        """Convert examples to model inputs, skipping any without a scored prediction.

        At most `limit` tokens of each are read, next to its answer if it has one; `whole` scores the prompt too. Raises
        `DataError` if none is left.
        """
        ...

    def pieces(self, base: BaseModel, item: Item, limit: int) -> list[Item]:
        """Split an item that is scored as a whole into pieces of at most `limit` tokens, if this kind reads tokens.

        For an item with an answer, return only the piece around the start of the answer.
        """
        return [item]

    def joined(self, base: BaseModel, items: Sequence[Item], limit: int) -> list[Item]:
        """Concatenate items, like the samples of a context, into items of at most `limit` tokens.

        The scored predictions of each stay the same. Items that cannot have a context are returned unchanged.
        """
        return list(items)

    def states(self, base: BaseModel, examples: Sequence[Example], limit: int) -> torch.Tensor:
        """Return one hidden state per example, float32 of shape (examples, d)."""
        ...

    def context_state(self, base: BaseModel, examples: Sequence[Example], limit: int) -> torch.Tensor:
        """Return one hidden state for all examples together, (d,) in float32; the model has no adapter attached.

        For models that read one example at a time, this is the mean of their states.
        """
        return self.states(base, examples, max(1, limit // len(examples))).mean(dim=0)

    def logits(self, base: BaseModel, items: Sequence[Item], *, from_leaf: bool = False) -> list[torch.Tensor]:
        """Return the predictions of each item without padding, shape (predictions, classes).

        With `from_leaf`, gradients flow back to the model's inputs and so reach every module on the way.
        """
        ...

    def loss(self, base: BaseModel, items: Sequence[Item]) -> torch.Tensor:
        """Return the summed loss of all scored predictions, a scalar with gradients that reach every module."""
        import torch

        from icmlora.base_models.log_probabilities import cross_entropy

        rows = self.logits(base, items, from_leaf=True)
        pairs = ((row, self.wanted(item)) for item, row in zip(items, rows, strict=True))
        return torch.stack([cross_entropy(row, wanted) for row, wanted in pairs if wanted is not None]).sum()

    def wanted(self, item: Item) -> Sequence[int] | None:
        """Return the target class of each of an item's last predictions, or `IGNORED` if it is not scored.

        The loss is the cross entropy with them. None if the loss needs more than the predictions.
        """
        ...

    def answers(self, item: Item) -> Sequence[bool] | None:
        """Return a mask of the answer's predictions, for an item that is scored as a whole; None if all count."""
        return None

    def written(self, base: BaseModel, items: Sequence[Item], count: int, limit: int, *, seed: int) -> list[Item]:
        """Generate items, such as texts, with the current adapter.

        At most `count` items of at most `limit` tokens, each starting like one of `items`, in turn. Empty if this kind
        of model cannot generate its own inputs. `seed` seeds all random numbers.
        """
        return []

    def answer(self, base: BaseModel, prompt: Prompt, most: int) -> str | None:
        """Return the greedy continuation of a prompt, at most `most` tokens.

        None if this kind of model does not continue text.
        """
        return None

    def counted(self, base: BaseModel, items: Sequence[Item]) -> torch.Tensor | None:
        """Return a mask of the rows of a module's input that are not padding in `loss` and `logits`.

        Its shape is all dimensions of that input but the last. None if nothing is padded.
        """
        return None

    def measure(self, base: BaseModel, examples: Sequence[Example], limit: int) -> Score:
        """Measure the model on held-out examples, in the unit of `metric`; raise `DataError` if there are none."""
        ...


def retained_gain(base: float, original: float, other: float, *, higher_is_better: bool = False) -> float | None:
    """Return the share of the original adapter's gain over the base model that another adapter retains.

    1 is as good as the original, 0 as good as no adapter; the share may be below 0 or above 1. None if the original
    does not improve on the base model by more than the rounding error of a float32 loss.
    """
    gain = original - base if higher_is_better else base - original
    remaining = other - base if higher_is_better else base - other
    return remaining / gain if gain > _ROUNDING * abs(base) else None
