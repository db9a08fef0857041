"""Image classifiers such as ViT, DINOv2 and ResNet; measured by accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.media import Media, image_of, open_image
from icmlora.base_models.finding.lookup import read_config
from icmlora.base_models.kinds.auto_model import Inputs, classes_of, names_a_class_of, seen
from icmlora.base_models.kinds.text_classification import Classification, Labelled, label_number, label_of
from icmlora.base_models.modality import BaseModel

if TYPE_CHECKING:
    import torch

    from icmlora.base_models.finding.lookup import FoundBase


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
        """Read an image and its label."""
        return Labelled(image_of(row), label_of(row))

    def inputs(self, base: BaseModel, example: Labelled[Media], limit: int) -> Inputs:
        """Convert the image to pixels and the label to its number."""
        label = label_number(base, example.label)
        made = base.processor(images=open_image(example.shown), return_tensors="pt")
        return Inputs(seen(base, made, "an image"), (label,))

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return the spatial mean of states (images, places, d) or (images, d, height, width)."""
        states: torch.Tensor = outputs.hidden_states[-1]
        return states.mean(dim=1) if states.dim() == 3 else states.flatten(2).mean(dim=2)
