"""The protocol of a modality: everything icm needs to know of one kind of base model.

    FoundBase --load--> BaseModel
    row of samples.jsonl --example--> example --readable--> example --prepare--> item (token ids, pixels, ...)
    items --loss--> gradients      items --logits--> predictions      examples --states--> task vector, (d,)
    examples --measure--> Score, of which more or less is better (`metric`)

All of them run `base.model` as it is at that moment: an adapter that was put on it takes part.
To add a modality, write one file with a class that has these members and name it in `catalogue.py`.
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
"""The wanted class of a prediction that is not scored."""
_ROUNDING = 1e-6  # share of a loss: two float32 sums of the same numbers differ by less


@dataclass(frozen=True)
class Metric:
    """What `measure` returns."""

    name: str
    higher_is_better: bool


class Prepared(Protocol):
    """An example as the model reads it."""

    @property
    def count(self) -> int:
        """How many predictions are scored in it: tokens, images, boxes."""
        ...

    @property
    def size(self) -> int:
        """How much of it is read, in the unit of the limit: tokens; 1 where examples are never cut."""
        ...


@dataclass(frozen=True)
class Score:
    """How good a model is on some examples.

    Attributes:
        value: The metric, averaged over what was scored.
        count: How many predictions were scored.
        utf8_bytes: Length in UTF-8 of the scored text, at least 1; 1 where there is no text.
        others: Further figures to print beside the metric, by name.
        of_each: The metric of each example that was scored, where it is a mean over them.
    """

    value: float
    count: int
    utf8_bytes: int = 1
    others: Mapping[str, float] = field(default_factory=dict)
    of_each: tuple[float, ...] = ()


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model in evaluation mode.

    Attributes:
        label: The name that adapters give it.
        model: The network; adapters are put on it and taken off again, its weights never change.
        processor: What turns examples into its inputs, such as a tokenizer.
        fingerprint: Which weights these are (see `icmlora.base_models.finding.fingerprint.fingerprint_base`).
        modality: What can be done with it.
        hidden_size: Width of the hidden states, which is the dimension of a task vector; None where it does not say.
        layers: Number of its layers.
        positions: The longest text that it can read, in tokens; None where there is no limit.
        made_up: Parameters that its files lack and that are zero: the head of a classifier that adapters bring.
        load_in: The few bits that its linear layers are in; None where all weights are in full precision.
    """

    label: str
    model: Any
    processor: Any
    fingerprint: str
    modality: Modality[Any, Any]
    hidden_size: int | None
    layers: int
    positions: int | None = None
    made_up: frozenset[str] = frozenset()
    load_in: LoadIn | None = None

    @property
    def tokenizer(self) -> Any:
        """The processor of a model that reads text."""
        return self.processor

    def within(self, limit: int) -> int:
        """Return a limit in tokens, or fewer where it cannot read that many."""
        return limit if self.positions is None else min(limit, self.positions)

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        from icmlora.base_models.placement import main_device

        return main_device(self.model)

    @property
    def input_dtype(self) -> torch.dtype:
        """Precision of its inputs that are not token ids, and of what its layers compute."""
        dtype: torch.dtype = next(one.dtype for one in self.model.parameters() if one.is_floating_point())
        return dtype

    @property
    def dtype(self) -> str:
        """Precision of its weights, as "float32", "bfloat16" or "nf4"; every figure measured on it names this."""
        return self.load_in or str(self.input_dtype).removeprefix("torch.")


class Modality(Protocol[Example, Item]):
    """One kind of base model. Importing it should not import torch: `icm ingest` reads examples without.

    A class that derives from it gets `reads`, `takes_context`, `probes`, `joined`, `context_state`, `loss`, `written`,
    `answer` and `counted` of a model that reads examples one at a time and without files, writes and pads nothing.
    """

    name: str
    """What messages call it."""
    reads: Collection[str] = ()
    """Which of a row's files it reads, of `MEDIA_KEYS`; a row with another one is left out."""
    takes_context: bool = False
    """Whether samples can stand before an example, as in-context learning has it."""
    probes: Sequence[Example] = ()
    """Neutral examples, for task vectors of tasks that bring no samples; none where there is nothing neutral."""

    @property
    def metric(self) -> Metric:
        """What `measure` returns."""
        ...

    def suits(self, found: FoundBase) -> bool:
        """Whether a base model is of this kind, judged by its files without loading it: its metric makes sense."""
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
            found: Where it is.
            device: Where to put it.
            dtype: Precision of the weights; None for what suits the device. A base model that is to be loaded in few
                bits has one precision for all purposes, whatever is asked for here.
            fingerprint: Its fingerprint; None to compute it, which reads every weight file.

        Raises:
            BaseModelNotFound: It cannot be loaded.
        """
        ...

    def example(self, row: Mapping[str, Any]) -> Any:
        """Turn a row of `samples.jsonl` or `eval.jsonl` into an example, without any base model.

        Raises:
            DataError: It is not an example of this kind; the message is a fact about the row, such as "has no text".
        """
        ...

    def readable(self, base: BaseModel, examples: Sequence[Any], template: Templates | None = None) -> Examples:
        """Bring what `example` returned into the form that this base model reads; what cannot be is left out.

        All other methods take the result. A language model renders chats here, with its chat template or with the
        one that came with an adapter.
        """
        ...

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int, *, whole: bool = False) -> list[Item]:
        """Turn examples into what the model reads, without those that have nothing to score.

        At most `limit` tokens of each are read, those next to its answer if it has one; `whole` scores its prompt too.
        Raises `DataError` if none is left.
        """
        ...

    def pieces(self, base: BaseModel, item: Item, limit: int) -> list[Item]:
        """Return an item that is scored as a whole in pieces of at most `limit` tokens, where this kind reads tokens.

        Of one with an answer only the piece around its beginning is returned.
        """
        return [item]

    def joined(self, base: BaseModel, items: Sequence[Item], limit: int) -> list[Item]:
        """Put items one after the other, as samples stand in a context, into items of at most `limit` tokens.

        Of each the same is scored as before. They stay as they are where nothing can stand before them.
        """
        return list(items)

    def states(self, base: BaseModel, examples: Sequence[Example], limit: int) -> torch.Tensor:
        """Return one hidden state for each example, float32 of shape (examples, d)."""
        ...

    def context_state(self, base: BaseModel, examples: Sequence[Example], limit: int) -> torch.Tensor:
        """Return one hidden state for all examples together, (d,) in float32; no adapter is on the model.

        That is their mean for models that read one example at a time.
        """
        return self.states(base, examples, max(1, limit // len(examples))).mean(dim=0)

    def logits(self, base: BaseModel, items: Sequence[Item], *, from_leaf: bool = False) -> list[torch.Tensor]:
        """Return the predictions for each item, without padding: a tensor of shape (predictions, classes) for each.

        With `from_leaf`, gradients flow back to the model's inputs, so that they reach every module on the way.
        """
        ...

    def loss(self, base: BaseModel, items: Sequence[Item]) -> torch.Tensor:
        """Return the loss of all scored predictions, summed: a scalar, with gradients that reach every module."""
        import torch

        from icmlora.base_models.log_probabilities import cross_entropy

        rows = self.logits(base, items, from_leaf=True)
        pairs = ((row, self.wanted(item)) for item, row in zip(items, rows, strict=True))
        return torch.stack([cross_entropy(row, wanted) for row, wanted in pairs if wanted is not None]).sum()

    def wanted(self, item: Item) -> Sequence[int] | None:
        """Return the class that each of an item's last predictions should be, or `IGNORED` where it is not scored.

        The loss is the cross entropy with them. None where the loss takes more than the predictions.
        """
        ...

    def answers(self, item: Item) -> Sequence[bool] | None:
        """Return which of its predictions answer a prompt, of an item that is scored as a whole; None if all count."""
        return None

    def written(self, base: BaseModel, items: Sequence[Item], count: int, limit: int, *, seed: int) -> list[Item]:
        """Let the model write items itself, such as texts, with the adapter that is on it.

        At most `count` are written, of at most `limit` tokens, each beginning like one of `items`, in turn; none where
        this kind of model writes nothing that it could read. `seed` is that of all random numbers.
        """
        return []

    def answer(self, base: BaseModel, prompt: Prompt, most: int) -> str | None:
        """Return what the model writes after a prompt, always its most probable next token, at most `most` of them.

        None where this kind of model does not continue text.
        """
        return None

    def counted(self, base: BaseModel, items: Sequence[Item]) -> torch.Tensor | None:
        """Return which rows of a module's input are no padding in `loss` and `logits`: all its dimensions but the last.

        None where nothing is padded.
        """
        return None

    def measure(self, base: BaseModel, examples: Sequence[Example], limit: int) -> Score:
        """Measure the model on held-out examples, in the unit of `metric`; raise `DataError` if there is nothing."""
        ...


def retained_gain(base: float, original: float, other: float, *, higher_is_better: bool = False) -> float | None:
    """Return which share of the original adapter's gain over the base model another adapter keeps, from their metrics.

    1 is as good as the original, 0 as good as no adapter; the share may be below 0 or above 1. None where the original
    does not help, so that there is no gain to keep. What rounding makes of a float32 loss is no help.
    """
    gain = original - base if higher_is_better else base - original
    remaining = other - base if higher_is_better else base - other
    return remaining / gain if gain > _ROUNDING * abs(base) else None
