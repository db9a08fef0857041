"""Recognise the task of some samples: which known task they belong to, or none of them.

samples ──base model──▶ context vectors ──▶ a probability for each task of the store, or of a bundle
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from icmlora.base_models.catalogue import check_examples
from icmlora.base_models.examples.media_archive import read_examples
from icmlora.base_models.reading import examples_for
from icmlora.errors import DataError, NotRecognized, OptionsConflict
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.resources.code_source import open_codes
from icmlora.fleet.resources.stored_vectors import NO_VECTORS, LeftOut, comparison_key
from icmlora.fleet.vectors.extraction import SAMPLES_READ, VECTOR_DTYPE
from icmlora.io.devices import resolve_device
from icmlora.task_vectors.extraction import extract_context
from icmlora.task_vectors.recognition import Recognition, Recognizer, TooFewVectors

if TYPE_CHECKING:
    from icmlora.base_models.modality import BaseModel


@dataclass(frozen=True)
class RecognizeReport(Recognition):
    """Which known task some samples belong to."""

    base_model: str  # that read them
    samples: int  # how many were read
    left_out: tuple[LeftOut, ...] = ()  # tasks that cannot be compared, and why

    def known_task(self) -> str:
        """Return the recognised task.

        Raises:
            NotRecognized: The samples belong to none of the known tasks.
        """
        task = self.task
        if task is None:
            near = self.candidates[0]
            fact = f"the samples belong to none of the known tasks (probability {self.new:.2f})"
            nearest = f"the most probable one is {near.task!r} ({near.probability:.2f})"
            raise NotRecognized(f"{fact}; {nearest}", hint="run `icm generate NAME` to make an adapter for a new task")
        return task


@use_case
def recognize(
    context: Context,
    samples: str | Path,
    *,
    base_model: str | Path | None = None,
    loader: str | None = None,
    device: str = "auto",
) -> RecognizeReport:
    """Recognize the known task that some samples belong to, by their task vectors. Needs the base model.

    Args:
        context: The store or the bundle.
        samples: File of samples as JSON lines; up to 32 are read, and 16 are enough.
        base_model: Only tasks of this base model; needed only if tasks of several have vectors. With a bundle, the
            folder or GGUF file of its base model; by default it is searched for in the Hugging Face cache.
        loader: With a bundle and `base_model`, `MODULE:FUNCTION` of a function marked with
            `icmlora.base_model_loader`, for a base model outside transformers. Bundles never name one.
        device: Where to compute.

    Returns:
        The known tasks and "none of them", with probabilities. Its `task` is the recognized task or
        None, its `known_task()` the same or `NotRecognized`.

    Raises:
        DataError: The samples cannot be used, or too few tasks have context vectors.
        OptionsConflict: There is a loader, but no bundle or no base model.
        BaseModelNotFound: The base model is not on this machine, or its loader cannot be used.
        BundleError: The bundle is damaged, or the file was replaced.
    """
    if loader is not None and (context.bundle is None or base_model is None):
        hint = "for a store, set the loader with `icm base add NAME PATH --loader MODULE:FUNCTION`"
        raise OptionsConflict("--loader needs a bundle and --base-model PATH", hint=hint)
    path = Path(samples)
    with open_codes(context, read_only=False, base_model=base_model, loader=loader) as codes:
        data = read_examples(path)
        check_examples(data, path=path, any_row=codes.any_row)  # before a model is loaded
        label, known = codes.context_vectors(None if base_model is None else str(base_model))
        try:
            recognizer = Recognizer(known.vectors)
        except TooFewVectors as error:
            fact = f"recognition needs the context vectors of {error}; {len(known.vectors)} are comparable"
            raise DataError(fact, hint=f"a support set is made from 8 samples; {NO_VECTORS}") from None
        context.progress(0, None, f"loading {label}")
        base = codes.open_base(label, resolve_device(device), VECTOR_DTYPE, known.extractor)
        context.progress(0, None, "reading the samples")
        count, found = _recognized(base, data, path, recognizer, known.extractor)
        return RecognizeReport(found.candidates, found.new, label, count, known.left_out)


def _recognized(
    base: BaseModel, data: bytes, path: Path, recognizer: Recognizer, extractor: str | None
) -> tuple[int, Recognition]:
    """Read samples with the base model, and return their number and the recognized task."""
    examples = examples_for(base, data, path=path, most=SAMPLES_READ)
    vectors = extract_context(base, examples.items, template=examples.template)
    if comparison_key(json.loads(vectors[0].extractor.to_json())) != extractor:
        hint = "run `icm vectors --again` to extract them again with the current copy"
        made_in = None if extractor is None else json.loads(extractor).get("dtype")
        if made_in != base.dtype:
            fact = f"the stored vectors were made with the base model in {made_in}, but it is loaded in {base.dtype}"
            raise DataError(fact, hint=hint)
        raise DataError("the stored vectors were made with another copy of the base model", hint=hint)
    return len(examples), recognizer.recognize(np.stack([vector.values.numpy() for vector in vectors]))
