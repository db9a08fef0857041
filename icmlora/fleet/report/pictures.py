"""Compare pictures by the base model, original and code of an image task for the same prompts and seeds.

    prompt, seed ──pipeline────────────▶ picture
                 ──pipeline + original─▶ picture ──┐
                 ──pipeline + code─────▶ picture ──┴── root mean square of pixels
                 ──pipeline + original─▶ picture of another seed: the scale of an irrelevant difference

Adapters go through their files, as `icm materialize` writes them, and the loader of diffusers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from icmlora.adapter.metrics import GroupError, dw_norm
from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.running.pipeline import Drawing, Pipeline, Pixels, rmse
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, DataError
from icmlora.fleet.context import locate_base
from icmlora.fleet.failures import FAILURES, BaseUnavailable, Failed, as_error
from icmlora.fleet.measure.module_errors import errors_of
from icmlora.fleet.resources.decoding import decode_code, read_form
from icmlora.fleet.resources.loading import ModelCache, read_original
from icmlora.fleet.tasks.details import header_of
from icmlora.formats.file_header import frequent_tags, trigger_words
from registry.manifests import Task

MAX_EDGE = 512
"""Width and height of a picture on the page, at most."""
_MAX_PROMPT = 300  # characters of what a header says
_ROUNDING = 1e-3
"""Tolerance between the norms of the loaded adapter and the stored one. Rounding to bfloat16 changes it by less."""


@dataclass(frozen=True)
class Row:
    """The pictures of a prompt and seed, by source, as data URIs."""

    seed: int
    pictures: Mapping[str, str]


@dataclass(frozen=True)
class Drawn:
    """A prompt and what the sources draw for it, a row for each seed."""

    prompt: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Distances:
    """How far pictures are apart, on average: root mean square over pixels with values in 0 to 1."""

    # Source -> distance of its pictures from the original's with the same prompt and seed.
    to_original: Mapping[str, float]
    # Distance of two pictures of the original with one prompt and different seeds; None with one seed.
    seeds: float | None


@dataclass(frozen=True)
class TaskPictures:
    """The pictures of a task."""

    task: str  # its name
    # "base model" and, if available, "original", "code".
    sources: Sequence[str]
    prompts: Sequence[Drawn]  # the pictures
    distances: Distances | None  # None where the original is not in the store
    errors: Sequence[GroupError]  # relative errors of its code by block; empty where original or code are missing
    notes: Sequence[str]  # parts of adapters that diffusers ignored


@dataclass(frozen=True)
class _Source:
    """An adapter as a file for diffusers, and the norm of its dW where it is known."""

    weights: bytes
    norm: float | None


class Studio:
    """Draws the pictures of one task after the other; one pipeline is in memory at a time.

    Args:
        models: The model cache of the store.
        given: Prompts for every task; None for those in the headers of their adapters.
        how: How pictures are drawn.
    """

    def __init__(self, models: ModelCache, given: Sequence[Prompt | Mapping[str, object]] | None, how: Drawing) -> None:
        self._models, self._given, self._how = models, given, how
        self._pipeline: tuple[str, Pipeline | BaseModelNotFound | BaseModelUnsuited] | None = None
        self._of_base: dict[tuple[str, int], Pixels] = {}  # the base model draws the same for every task

    def draw(self, task: Task) -> TaskPictures | Failed | BaseUnavailable:
        """Draw the pictures of a task. Return errors instead of raising them."""
        try:
            pipeline = self._opened(task.base_model)
            if not isinstance(pipeline, Pipeline):
                return BaseUnavailable(pipeline)
            return self._drawn(pipeline, task)
        except FAILURES as error:
            return Failed(as_error(error))

    def _opened(self, label: str) -> Pipeline | BaseModelNotFound | BaseModelUnsuited:
        """Load a pipeline. That it cannot be loaded is remembered too."""
        if self._pipeline is None or self._pipeline[0] != label:
            self._pipeline = None  # or two would be in memory
            self._of_base.clear()
            try:
                found = Pipeline(locate_base(self._models.store, label), self._models.device)
            except (BaseModelNotFound, BaseModelUnsuited) as error:
                self._pipeline = label, error
            else:
                self._pipeline = label, found
        return self._pipeline[1]

    def _drawn(self, pipeline: Pipeline, task: Task) -> TaskPictures:
        prompts = self._prompts(task)
        sources, errors = self._sources(task)
        drawn: dict[str, dict[tuple[str, int], Pixels]] = {}
        notes: list[str] = []
        for name, source in {"base model": None, **sources}.items():
            drawn[name], note = self._draw(pipeline, source, prompts)
            notes += [f"{name}: {note}"] if note else []
        shown = [Drawn(text, [_row(drawn, text, seed) for seed in self._seeds]) for text in prompts]
        return TaskPictures(task.name, list(drawn), shown, distances(drawn), errors, notes)

    @property
    def _seeds(self) -> Iterable[int]:
        return range(self._how.seeds)

    def _prompts(self, task: Task) -> list[str]:
        if self._given is not None:
            texts = [asked.text for asked in self._given if isinstance(asked, Prompt)]
            if len(texts) < len(self._given):
                raise DataError("a chat is not a prompt for a picture", hint="write one prompt per line")
            return list(dict.fromkeys(texts))
        header = header_of(self._models.store, task)
        found = [text[:_MAX_PROMPT] for text in (trigger_words(header), ", ".join(frequent_tags(header))) if text]
        if not found:
            raise DataError("its file has no trigger words or tags for prompts", hint="pass a file with --prompts")
        return list(dict.fromkeys(found))

    def _sources(self, task: Task) -> tuple[dict[str, _Source], Sequence[GroupError]]:
        """Return the available original and code of a task as files, and the errors of its code."""
        store, final, found = self._models.store, task.final, dict[str, _Source]()
        original = None
        if not final.is_evicted:
            original = None if final.original_only is not None else read_original(store, final)
            norm = None if original is None else dw_norm(original)
            found["original"] = _Source(store.blobs.read(final.weights), norm)
        if task.code is None:
            return found, ()
        decoded = decode_code(store, self._models.generator_file(task.code.generator), task.code)
        files = read_form(store, task).write(decoded)
        found["code"] = _Source(files.weights, dw_norm(decoded))
        return found, () if original is None else errors_of(final, original, decoded)

    def _draw(
        self, pipeline: Pipeline, source: _Source | None, prompts: Sequence[str]
    ) -> tuple[dict[tuple[str, int], Pixels], str | None]:
        """Draw all pictures of a source. Also return a note if diffusers ignored part of it."""
        wanted, note = [(text, seed) for text in prompts for seed in self._seeds], None
        if source is None:
            for key in wanted:
                if key not in self._of_base:
                    self._of_base[key] = pipeline.draw(*key, self._how)
            return {key: self._of_base[key] for key in wanted}, note
        with ExitStack() as stack:
            file = Path(stack.enter_context(TemporaryDirectory(prefix="icm-"))) / "adapter.safetensors"
            file.write_bytes(source.weights)
            loaded = stack.enter_context(pipeline.adapted(file))
            if source.norm and abs(loaded / source.norm - 1) > _ROUNDING:
                note = f"diffusers loads only part of it: {loaded / source.norm:.1%} of its norm"
            return {key: pipeline.draw(*key, self._how) for key in wanted}, note


def _row(drawn: Mapping[str, Mapping[tuple[str, int], Pixels]], prompt: str, seed: int) -> Row:
    return Row(seed, {source: data_uri(pictures[prompt, seed]) for source, pictures in drawn.items()})


def distances(drawn: Mapping[str, Mapping[tuple[str, int], Pixels]]) -> Distances | None:
    """Compare all pictures with the original's, and the original's seeds with each other.

    Args:
        drawn: Source -> prompt and seed -> picture.
    """
    original = drawn.get("original")
    if original is None:
        return None
    to_original = {
        name: fmean(rmse(picture, original[key]) for key, picture in pictures.items())
        for name, pictures in drawn.items()
        if name != "original"
    }
    pairs = [(one, other) for one, other in combinations(original, 2) if one[0] == other[0]]
    seeds = fmean(rmse(original[one], original[other]) for one, other in pairs) if pairs else None
    return Distances(to_original, seeds)


def data_uri(picture: Pixels) -> str:
    """Return a picture, uint8 (height, width, 3), as WebP in a data URI of at most `MAX_EDGE` pixels a side."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
