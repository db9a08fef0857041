"""Base models loaded by transformers' Auto classes that make all predictions of an example in one pass.

    example --inputs--> tensors, target classes --model--> a row of logits for each prediction --cross entropy--> loss

A modality of this kind defines how to convert an example to tensors, and which hidden states represent it. Nothing is
padded: consecutive examples of equal shapes are batched, others run one at a time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from icmlora.base_models.examples.chat_template import Templates
from icmlora.base_models.examples.examples import Examples
from icmlora.base_models.finding.fingerprint import fingerprint_base
from icmlora.base_models.finding.lookup import FoundBase, read_config
from icmlora.base_models.kinds.gradients import gradients_from_inputs
from icmlora.base_models.load import OFFLINE, hidden_size_of, layers_of, load_gguf, positions_of, quiet_loading
from icmlora.base_models.log_probabilities import cross_entropy
from icmlora.base_models.modality import IGNORED, BaseModel, Metric, Modality, Score
from icmlora.base_models.placement import placement
from icmlora.base_models.quantised import HEADS, settle
from icmlora.errors import BaseModelUnsuited, DataError
from icmlora.io.devices import inference_dtype


@dataclass(frozen=True, eq=False)
class Inputs:
    """An example as the model reads it."""

    # Arguments of the model's `forward`, with a batch of one as their first dimension.
    tensors: Mapping[str, torch.Tensor]
    targets: tuple[int, ...]  # the target class of each prediction; `IGNORED` if it is not scored
    text: str = ""  # the scored text; empty if there is none
    size: int = 1  # number of tokens read; 1 for inputs that are never truncated

    @property
    def count(self) -> int:
        return sum(target != IGNORED for target in self.targets)


class AutoLoaded(Modality[Any, Any]):
    """Base class of all modalities that transformers loads; a subclass sets the names."""

    name = ""
    metric = Metric("nats per token", higher_is_better=False)
    auto_class = ""  # of transformers, such as "AutoModelForMaskedLM"
    processor_class = "AutoTokenizer"
    heads: tuple[str, ...] = HEADS  # prefixes of parameters that the files may lack

    def load(
        self,
        found: FoundBase,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> BaseModel:
        """Load model and processor, by default on the CPU; fill missing head weights with zeros."""
        device = device or torch.device("cpu")
        dtype = torch.bfloat16 if found.load_in is not None else dtype or inference_dtype(device)
        missing: list[str] = []
        model: Any
        with quiet_loading(found, self.name):
            if found.is_gguf:
                model, processor = load_gguf(found.path, dtype)
                model.to(device)
            else:
                # The processor comes first: it may need a library that is not installed, and reading weights is slow.
                processor = getattr(transformers, self.processor_class).from_pretrained(found.path, **OFFLINE)
                placed = placement(found, self.auto_class, device, dtype)
                model, report = getattr(transformers, self.auto_class).from_pretrained(
                    found.path, use_safetensors=True, output_loading_info=True, **placed, **OFFLINE
                )
                # The library fills missing weights with random numbers and only warns.
                missing = sorted(report["missing_keys"])
                if stray := [name for name in missing if not name.startswith(self.heads)]:
                    raise ValueError(f"its weight files lack {stray[0]!r} (and {len(stray) - 1} more)")
                for name in missing:
                    nn.init.zeros_(model.get_parameter(name))
                if "device_map" not in placed:
                    model.to(device)
            if found.load_in is not None:
                settle(model)
            # Frozen, or every backward pass would keep a gradient as large as the model; evaluation mode turns off
            # dropout.
            model.requires_grad_(False).train(False)
            return BaseModel(
                label=found.label,
                model=model,
                processor=processor,
                fingerprint=fingerprint or fingerprint_base(found),
                modality=self,
                hidden_size=hidden_size_of(model.config),
                layers=layers_of(model.config),
                positions=positions_of(model),
                made_up=frozenset(missing),
                load_in=found.load_in,
            )


class AutoModality(AutoLoaded):
    """Base class of these modalities; a subclass sets the names and defines `example` and `inputs`."""

    batch = 8  # maximum examples of equal shapes per batch

    def suits(self, found: FoundBase) -> bool:
        """Return whether `config.json` names a class that the Auto class would load."""
        return not found.is_gguf and names_a_class_of(self.auto_class, read_config(found.path))

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
                kept.append(example)
            except DataError as error:
                skipped += 1
                reason = reason or f"a row {error.message}"
        return Examples(tuple(kept), skipped, reason)

    def prepare(self, base: BaseModel, examples: Sequence[Any], limit: int, *, whole: bool = False) -> list[Inputs]:
        found = [self.inputs(base, example, base.within(limit)) for example in examples]
        scored = [item for item in found if item.count]
        if not scored:
            raise DataError("no example contains anything to predict", hint="use longer examples")
        return scored

    def states(self, base: BaseModel, examples: Sequence[Any], limit: int) -> torch.Tensor:
        items = [self.inputs(base, example, base.within(limit)) for example in examples]
        with torch.no_grad():
            batches = self._outputs(base, items, output_hidden_states=True)
            return torch.cat([self.pooled(outputs).float() for outputs in batches])

    def logits(self, base: BaseModel, items: Sequence[Inputs], *, from_leaf: bool = False) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        with gradients_from_inputs(base.model) if from_leaf else nullcontext():
            for outputs in self._outputs(base, items, from_leaf=from_leaf):
                logits = outputs.logits
                rows += list(logits if logits.dim() == 3 else logits[:, None])  # (examples, predictions, classes)
        return rows

    def wanted(self, item: Inputs) -> Sequence[int] | None:
        """Return the targets of the last predictions; some models put predictions for an image before the text's."""
        return item.targets

    def measure(self, base: BaseModel, examples: Sequence[Any], limit: int) -> Score:
        """Return the loss in nats per prediction."""
        items = self.prepare(base, examples, limit)
        with torch.inference_mode():
            rows = self.logits(base, items)
            nats = [float(cross_entropy(row, item.targets)) for row, item in zip(rows, items, strict=True)]
        count = sum(item.count for item in items)
        return Score(sum(nats) / count, count, max(1, sum(len(item.text.encode()) for item in items)))

    def _outputs(
        self, base: BaseModel, items: Sequence[Inputs], *, from_leaf: bool = False, **options: Any
    ) -> Iterator[Any]:
        """Yield the model's outputs for batches of consecutive examples of equal shapes."""
        for _, run in itertools.groupby(items, lambda item: [(name, t.shape) for name, t in item.tensors.items()]):
            same, most = list(run), self.at_once(base)
            for batch in (same[first : first + most] for first in range(0, len(same), most)):
                tensors = {}
                for name in batch[0].tensors:
                    value = torch.cat([item.tensors[name] for item in batch]).to(base.device)
                    if value.is_floating_point():  # pixels and audio; for token ids, gradients start at the embeddings
                        value = value.to(base.input_dtype).requires_grad_(from_leaf)
                    tensors[name] = value
                yield base.model(**tensors, **options)


class WithDecoder(AutoModality):
    """Base class of the modalities that represent an example as ICM-LoRA does (arXiv 2501.17635)."""

    def pooled(self, outputs: Any) -> torch.Tensor:
        """Return the decoder's last layer at the last position, (examples, d)."""
        states = getattr(outputs, "decoder_hidden_states", None) or outputs.hidden_states
        return states[-1][:, -1]  # type: ignore[no-any-return]


def names_a_class_of(auto_class: str, config: Mapping[str, object]) -> bool:
    """Return whether a configuration names a class that a transformers Auto class loads."""
    named = config.get("architectures")
    return bool(classes_of(auto_class, config).intersection(named if isinstance(named, list) else []))


def classes_of(auto_class: str, config: Mapping[str, object]) -> set[str]:
    """Return the model classes that an Auto class may use for a configuration."""
    table = getattr(modeling_auto, auto_class)._model_mapping._model_mapping  # model type -> name or names of classes
    kind = config.get("model_type")
    known = table.get(kind) if isinstance(kind, str) else None
    return {known} if isinstance(known, str) else set(known or ())


def seen(base: BaseModel, made: Mapping[str, Any], what: str) -> dict[str, torch.Tensor]:
    """Return the tensors that the model reads from the output of a processor, by name; `what` is for messages.

    Raises:
        BaseModelUnsuited: The model would ignore the processed input.
    """
    # Some processors also create labels, from the prompt alone; icm scores the answer itself.
    read = inspect.signature(type(base.model).forward).parameters.keys() - {"labels"}
    tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor) and name in read}
    if not any(value.is_floating_point() for value in tensors.values()):
        kind = type(base.processor).__name__
        made_of = ", ".join(sorted(made)) or "nothing"
        fact = f"{kind} turns {what} into {made_of}, which base model {base.label!r} does not read"
        raise BaseModelUnsuited(fact, hint="use a model folder that contains the matching processor")
    return tensors


def moved(base: BaseModel, labels: Sequence[int]) -> torch.Tensor:
    """Return the decoder inputs to predict T tokens, (1, T): the start token, then all but the last.

    Raises:
        BaseModelUnsuited: The configuration does not define the start token.
    """
    config = base.model.config
    for place in (config, config.get_text_config(decoder=True), getattr(base.model, "generation_config", None)):
        start = getattr(place, "decoder_start_token_id", None)
        if isinstance(start, int):
            return torch.tensor([[start, *labels[:-1]]])
    raise BaseModelUnsuited(f"base model {base.label!r} does not define the decoder's start token")
