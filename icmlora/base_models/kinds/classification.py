"""Classifiers of texts and images, such as BERT, ViT and Llama with a classification head; measured by accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from icmlora.base_models.examples.forms import Label, Labelled, labelled_image_of, labelled_text_of
from icmlora.base_models.examples.media import Media, open_image
from icmlora.base_models.finding.lookup import FoundBase, read_config
from icmlora.base_models.kinds.auto_model import AutoModality, Inputs, classes_of, names_a_class_of, seen
from icmlora.base_models.log_probabilities import cross_entropy
from icmlora.base_models.modality import BaseModel, Metric, Score
from icmlora.errors import DataError


class Classification(AutoModality):
    """Base class of text and image classifiers."""

    metric = Metric("accuracy", higher_is_better=True)

    def measure(self, base: BaseModel, examples: Sequence[Any], limit: int) -> Score:
        """Return the accuracy, and the mean cross entropy in nats as an additional figure."""
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
        return labelled_text_of(row)

    def inputs(self, base: BaseModel, example: Labelled[str], limit: int) -> Inputs:
        ids = torch.tensor([base.tokenizer(example.shown, truncation=True, max_length=limit)["input_ids"]])  # (1, T)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Inputs(tensors, (label_number(base, example.label),), example.shown, ids.shape[1])

    def at_once(self, base: BaseModel) -> int:
        """Return 1 for models without a padding token, such as most reward models: they reject batches of texts."""
        return self.batch if base.model.config.get_text_config().pad_token_id is not None else 1


class ImageClassification(Classification):
    """Models that `transformers.AutoModelForImageClassification` loads."""

    name = "image classifier"
    reads = ("image",)
    auto_class = "AutoModelForImageClassification"
    processor_class = "AutoImageProcessor"

    def suits(self, found: FoundBase) -> bool:
        """Return whether `config.json` describes a classifier, or an image model whose adapters add the head."""
        if super().suits(found):
            return True
        config = {} if found.is_gguf else read_config(found.path)
        return bool(classes_of(self.auto_class, config)) and names_a_class_of("AutoModel", config)

    def example(self, row: Mapping[str, Any]) -> Labelled[Media]:
        return labelled_image_of(row)

    def inputs(self, base: BaseModel, example: Labelled[Media], limit: int) -> Inputs:
        label = label_number(base, example.label)
        made = base.processor(images=open_image(example.shown), return_tensors="pt")
        return Inputs(seen(base, made, "an image"), (label,))

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return the spatial mean of states (images, places, d) or (images, d, height, width)."""
        states: torch.Tensor = outputs.hidden_states[-1]
        return states.mean(dim=1) if states.dim() == 3 else states.flatten(2).mean(dim=2)


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
