"""Text classifiers such as BERT and Llama with a classification head; measured by accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from icmlora.base_models.examples.examples import Example, text_example
from icmlora.base_models.examples.media import Media
from icmlora.base_models.finding.lookup import read_config
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs, classes_of
from icmlora.base_models.kinds.masked_lm import as_text
from icmlora.base_models.modality import BaseModel, Metric, Score
from icmlora.errors import DataError

if TYPE_CHECKING:
    from icmlora.base_models.finding.lookup import FoundBase

Label = str | int
"""The name of a class, or its number."""
Shown = TypeVar("Shown", str, Media)


@dataclass(frozen=True)
class Labelled(Generic[Shown]):
    """A text or an image, and its class."""

    shown: Shown
    label: Label


class Classification(AutoModality):
    """Base class of text and image classifiers."""

    metric = Metric("accuracy", higher_is_better=True)

    def measure(self, base: BaseModel, examples: Sequence[Any], limit: int) -> Score:
        """Return the accuracy, and the mean cross entropy in nats as an additional figure."""
        import torch

        from icmlora.base_models.log_probabilities import cross_entropy

        items = self.prepare(base, examples, limit)
        with torch.inference_mode():
            logits = torch.cat(self.logits(base, items)).float().cpu()  # (examples, classes)
        wanted = torch.tensor([item.targets[0] for item in items])
        accuracy = (logits.argmax(dim=1) == wanted).double().mean()
        others = {}
        if int(wanted.max()) < logits.shape[1]:  # a zero-filled head may have fewer classes than the task
            others["nats"] = float(cross_entropy(logits, wanted.tolist())) / len(items)
        return Score(float(accuracy), len(items), others=others)


class TextClassification(Classification):
    """Models that `transformers.AutoModelForSequenceClassification` loads."""

    name = "text classifier"
    auto_class = "AutoModelForSequenceClassification"

    def suits(self, found: FoundBase) -> bool:
        """Return whether `config.json` names a classifier, or the adapters add a classification head."""
        if found.task_type == "SEQ_CLS" and not found.is_gguf:
            return bool(classes_of(self.auto_class, read_config(found.path)))
        return super().suits(found)

    def example(self, row: Mapping[str, Any]) -> Labelled[str]:
        """Read a text and its label."""
        label = label_of(row)
        text = row.get("text")
        example: Example = as_text(text_example({"text": text} if isinstance(text, str) else row))
        return Labelled(example.text, label)

    def inputs(self, base: BaseModel, example: Labelled[str], limit: int) -> Inputs:
        """Convert the text to tokens and the label to its number."""
        import torch

        ids = torch.tensor([base.tokenizer(example.shown, truncation=True, max_length=limit)["input_ids"]])  # (1, T)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Inputs(tensors, (label_number(base, example.label),), example.shown, ids.shape[1])

    def at_once(self, base: BaseModel) -> int:
        """Return 1 for models without a padding token, such as most reward models: they reject batches of texts."""
        return self.batch if base.model.config.get_text_config().pad_token_id is not None else 1


def label_of(row: Mapping[str, Any]) -> Label:
    """Return the label of a row; raise `DataError` if it is missing or neither a name nor a number."""
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError("has no label" if label is None else "has a label that is neither a name nor a number")
    return label


def label_number(base: BaseModel, label: Label) -> int:
    """Return the class number of a label; raise `DataError` if the base model has no such class."""
    config = base.model.config
    if isinstance(label, str):
        # `label2id` may be missing even if `id2label` exists.
        named = next((number for number, name in (config.id2label or {}).items() if name == label), None)
        if named is None:
            raise DataError(f"has the label {label!r}, which is not a class of the base model")
        return int(named)
    # An adapter's head may have more classes than the zero-filled head of its base model.
    if label < 0 or (not base.made_up and label >= config.num_labels):
        raise DataError(f"has the label {label}, but the base model has {config.num_labels} classes")
    return label
