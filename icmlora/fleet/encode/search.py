"""Search for the smallest code of each task that meets its limits, or the most accurate one of a size.

share to keep ──a few passes through the base model──▶ coarser step ──refine──▶ code
error or size ──────────────────────────encode────────────────────────────────▶ code
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from icmlora.adapter.model import Adapter
from icmlora.errors import (
    BaseModelNotFound,
    BaseModelUnsuited,
    Cancelled,
    DataError,
    GeneratorError,
    OutOfMemory,
)
from icmlora.fleet.encode.refiner import Refiner, TrialCode, coarse_for, lost_before, refine_all, stoppable
from icmlora.fleet.encode.report import EncodeStatus, NewCode, TaskEncoded
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.resources.adapter_source import mean_vectors
from icmlora.fleet.resources.decoding import codec_of_task
from icmlora.fleet.resources.loading import ModelCache, read_original
from icmlora.fleet.resources.texts import read_samples
from icmlora.fleet.resources.workers import OnProgress, naming
from icmlora.formats.catalogue import format_named
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import Encoded, encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.codec.steps import AdapterSteps
from icmlora.generator.config import keep_of, quality_of, tolerance_of
from icmlora.generator.initial_a.draw import InitialA
from icmlora.io.devices import gradient_dtype
from icmlora.io.text import human_size
from icmlora.training.config import REFINE_STEPS
from icmlora.training.refinement import FOR_SHARE, WITHOUT_REFINE
from registry.manifests import Code, CodeLimits, File, Generator, Task
from registry.storage.blobs.content import digest_of

_REFINED_TOGETHER = 4
"""Codes that a GPU refines side by side: a pass of one alone is too small to keep it busy."""
_SURELY = 0.8
"""Share of the allowed loss that a code without refinement aims at: the search is this precise."""


def encode_tasks(
    models: ModelCache, tasks: Sequence[Task], on_progress: OnProgress, limits: Limits, *, again: bool, is_named: bool
) -> Iterator[tuple[Task, TaskEncoded]]:
    """Make the code of each task of one base model, or say why it has no new one.

    On a GPU, the codes of several tasks are refined side by side: they share the base model and each pass through it.
    """
    at_once = 1 if models.device.type == "cpu" else _REFINED_TOGETHER
    for start in range(0, len(tasks), at_once):
        group = tasks[start : start + at_once]
        begun = [
            _begin(models, task, naming(task, on_progress), limits, again=again, is_named=is_named) for task in group
        ]
        together = [one for one in begun if isinstance(one, CodeSearch) and one.is_refined]
        refined = dict[str, TrialCode]()
        if len(together) > 1:
            try:
                codes = refine_all(
                    [search.first_code() for search in together], partial(_of_several, on_progress, together)
                )
                refined = {search.task.name: code for search, code in zip(together, codes, strict=True)}
            except Cancelled:
                raise
            except FAILURES as error:  # each is refined alone
                as_error(error)  # frees the memory, if that is what ran out
        for task, one in zip(group, begun, strict=True):
            yield task, one if isinstance(one, TaskEncoded) else one.encoded(models, refined.get(task.name))


def _begin(
    models: ModelCache, planned: Task, on_progress: OnProgress, asked: Limits, *, again: bool, is_named: bool
) -> TaskEncoded | CodeSearch:
    """Read what a task's code is made of; return the outcome if it needs no new code or cannot have one."""
    base_model, store = planned.base_model, models.store
    generator, task = store.generator(base_model), store.find(planned.name)
    if task is None:  # `icm rm` does not wait for this job
        return TaskEncoded(planned.name, "changed", reason="it was removed during encoding")
    if generator is None:
        why = task.not_encodable or "there is no generator for it; run `icm train` to train one"
        return TaskEncoded(task.name, "original_only" if task.not_encodable else "unmeasured", reason=why)
    if task.base_model != base_model:
        return TaskEncoded(task.name, "changed", reason=f"it now belongs to base model {task.base_model!r}")
    if task.final.is_evicted:
        why = f"its original is not in the store, so its code cannot be replaced; {restore_hint(task)}"
        return _unchanged(task, "evicted", why if is_named else None)
    if task.not_encodable is not None:
        return _unchanged(task, "original_only", task.not_encodable)
    file = models.generator_file(generator.blob)  # before minutes are spent: it may be damaged
    limits = _limits_under(generator, asked, refined=asked.refine != 0)
    if not again and (known := _known(task, generator, asked, limits)) is not None:
        return known
    refiner, reason = None, None
    try:
        original = read_original(store, task.final)
        if limits.keep is not None:
            try:
                refiner = _refiner(models, task, original, limits, on_progress)
            except (BaseModelNotFound, BaseModelUnsuited, DataError) as error:
                if not asked.is_by_quality:
                    raise
                limits, reason = _limits_under(generator, asked, refined=False), f"not refined: {error.message}"
                if not again and (known := _known(task, generator, asked, limits)) is not None:
                    return replace(known, reason=reason)
        codec = codec_of_task(store, file, task.code, original.layout)
        vectors = mean_vectors(store, task.vectors)
        initial = models.seeds.find(original)
    except Cancelled:
        raise
    except FAILURES as error:
        return _unmeasured(models, task, error)
    return CodeSearch(
        task, generator, asked.is_by_quality, limits, codec, original, vectors, initial, refiner, reason, on_progress
    )


def _of_several(on_progress: OnProgress, searches: Sequence[CodeSearch], note: str) -> None:
    on_progress(f"{len(searches)} tasks: {note}")


def restore_hint(task: Task) -> str:
    """Return how to restore the original of an evicted task."""
    if not task.final.is_generated:
        return "run `icm ingest --restore PATH` with the folder of its original"
    return (
        "run `icm ingest --restore PATH` with the folder that `icm generate` wrote, "
        f"or `icm rm {task.name}` and generate it again afterwards"
    )


def _unchanged(task: Task, status: EncodeStatus, reason: str | None = None) -> TaskEncoded:
    """Return the outcome of a task that keeps its code."""
    code = task.code
    if code is None:
        return TaskEncoded(task.name, status, reason=reason)
    return TaskEncoded(task.name, status, code.size, code.size, code.squared_error, reason=reason)


def _unmeasured(models: ModelCache, task: Task, error: Exception) -> TaskEncoded:
    """Return the outcome of a task that failed."""
    failure = as_error(error, models.loaded(task.base_model))
    has_hint = isinstance(failure, OutOfMemory) and failure.hint is not None
    return _unchanged(task, "unmeasured", f"{failure.message} ({failure.hint})" if has_hint else failure.message)


def _limits_under(generator: Generator, asked: Limits, *, refined: bool) -> Limits:
    """Return the limits of one code, refined or plain: a quality means a tolerance, or a share to keep and steps."""
    steps = REFINE_STEPS if asked.refine is None else asked.refine
    if asked.keep is not None:
        return replace(asked, refine=steps)
    if not asked.is_by_quality:
        return replace(asked, refine=0)
    quality = asked.quality
    if quality is None:
        quality = quality_of(float(generator.config["tolerance"]))  # type: ignore[arg-type]
    if not refined:
        return Limits(tolerance=tolerance_of(quality), refine=0)
    return Limits(keep=keep_of(quality), refine=steps)


def _recorded(limits: Limits, *, meets_limits: bool) -> CodeLimits:
    """Return the limits of a code as they are recorded."""
    return CodeLimits(
        max_error=limits.max_error,
        tolerance=limits.tolerance,
        is_kept=meets_limits,
        refined=limits.refine or 0,
        max_size=limits.size,
        keep=limits.keep,
    )


def _known(task: Task, generator: Generator, asked: Limits, limits: Limits) -> TaskEncoded | None:
    """Return the outcome if the task has a code of the same limits, so that an interrupted run continues."""
    code = task.code_under(generator)
    if code is None or code.asked is None or code.asked != _recorded(limits, meets_limits=code.asked.is_kept):
        return None
    return _unchanged(task, "known" if code.asked.is_kept or asked.is_by_quality else "below")


def _refiner(models: ModelCache, task: Task, original: Adapter, limits: Limits, on_progress: OnProgress) -> Refiner:
    """Prepare to refine the code of a task; raise an error where that is not possible."""
    if format_named(task.final.format).is_for_images:
        raise DataError("icm cannot run the base models of image adapters", hint=WITHOUT_REFINE)
    if any(extra.file is None for extra in task.final.extras):
        raise DataError("its adapter has more than LoRA factors, so its code cannot be refined", hint=WITHOUT_REFINE)
    base = models.base(task.base_model, gradient_dtype(models.device))
    samples = read_samples(models.store, task, base)
    with stoppable(base, lambda: on_progress("preparing to refine")):
        items = () if samples is None else samples.items
        return Refiner.of(base, original, items, replace(FOR_SHARE, steps=limits.refine or 0))


@dataclass(frozen=True)
class CodeSearch:
    """Makes the code of one task."""

    task: Task
    generator: Generator
    is_by_quality: bool  # then its limits may be missed
    limits: Limits
    codec: Codec
    original: Adapter
    vectors: Mapping[str, torch.Tensor]  # view -> mean over the support sets, float32 of shape (hidden,)
    initial: InitialA | None
    refiner: Refiner | None  # None without a share to keep
    reason: str | None  # why its code is not refined although a quality asks for it
    on_progress: OnProgress

    @property
    def is_refined(self) -> bool:
        """Whether the code is refined."""
        return self.refiner is not None and bool(self.limits.refine)

    def first_code(self) -> TrialCode:
        """Return the code that refinement begins with, or that keeps the share without it."""
        keep, refiner = self.limits.keep, self.refiner
        assert refiner is not None
        assert keep is not None
        self.on_progress(f"encoding, to keep {keep:g}")
        steps = AdapterSteps(self.codec, self.original, self.vectors, self.initial)
        lost = lost_before(keep, refiner.effect.uncapped_ratio) if self.is_refined else _SURELY * (1 - keep)
        return coarse_for(keep, lost, refiner, self.codec, self.original, steps)

    def best(self) -> tuple[Encoded, float | None, bool]:
        """Return the code, the share of the effect that it keeps if measured, and whether it meets the limits.

        If none meets them, it is the most accurate one, or the smallest if none has the size.
        """
        if self.refiner is not None:
            (code,) = (
                refine_all([self.first_code()], self.on_progress) if self.is_refined else [self.first_code().measured()]
            )
            return _result(code)
        size = self.limits.size
        self.on_progress("encoding" if size is None else f"encoding, at most {human_size(size)}")
        encoded = encode_adapter(self.codec, self.original, self.vectors, self.initial, self.limits)
        return encoded, None, self.limits.keeps(encoded) and (size is None or len(encoded.data) <= size)

    def encoded(self, models: ModelCache, refined: TrialCode | None) -> TaskEncoded:
        """Return the outcome with the code, which may be refined already."""
        task, limits, reason = self.task, self.limits, self.reason
        try:
            best, effect, meets_limits = self.best() if refined is None else _result(refined)
        except Cancelled:
            raise
        except GeneratorError as error:  # not even the finest step meets the limits
            return _unchanged(task, "below", error.message)
        except FAILURES as error:
            return _unmeasured(models, task, error)
        blob = File(digest_of(best.data), len(best.data))
        if limits.size is not None and blob.size > limits.size:
            reason = f"its smallest code takes {blob.size:,} bytes"
        code = Code(
            blob=blob,
            generator=self.generator.blob,
            squared_error=best.squared_error,
            effect=effect,
            asked=_recorded(limits, meets_limits=meets_limits),
        )
        return TaskEncoded(
            task.name,
            "encoded" if meets_limits or self.is_by_quality else "below",
            blob.size,
            None if task.code is None else task.code.size,
            best.squared_error,
            effect,
            reason,
            NewCode(task, code, best.data),
        )


def _result(code: TrialCode) -> tuple[Encoded, float | None, bool]:
    effect = None if code.lost is None else 1 - code.lost.counted
    return code.encoded, effect, not code.misses_limit
