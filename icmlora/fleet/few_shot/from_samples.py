"""Make an adapter and its context from the samples of a task, and measure what each of them gains.

samples ──held out──▶ four that measure: base model, adapter, context, both
   └──the others──▶ few-shot steps ──▶ gradient steps ──▶ distillation ──▶ adapter
          └───────▶ context, chosen with that adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from icmlora.adapter.arithmetic import truncated
from icmlora.adapter.model import Adapter
from icmlora.base_models.catalogue import check_examples
from icmlora.base_models.examples.examples import Examples, plain
from icmlora.base_models.examples.media_archive import read_examples
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.base_models.reading import examples_for
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.errors import DataError
from icmlora.fewshot.adapt import adapt, shuffled_together, supports
from icmlora.fewshot.context_choice import ChosenContext, ContextScorer, choose_context
from icmlora.fewshot.described import described_context, described_samples
from icmlora.fewshot.distil import DistilConfig, distil
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from icmlora.fewshot.guard import ContextAblation, Guard, left_out
from icmlora.fewshot.start import FewShotStart
from icmlora.fleet.context import Context
from icmlora.fleet.few_shot.task_context import usable_samples
from icmlora.fleet.few_shot.train import SAMPLE_TOKENS
from icmlora.io.devices import texts_at_once

_ORDERS = 4  # orders of the samples, one after the other, when an adapter is refined for its context
_MIN_DISTILLED = 2
_ENOUGH = 32  # samples; four more hardly change an adapter


@dataclass(frozen=True)
class Recipe:
    """How an adapter is made.

    Attributes:
        rank: Of the adapter.
        refine: Gradient steps on the samples.
        distil: Gradient steps towards the predictions after samples; no context is kept then.
        context_tokens: Tokens of the context at most; 0 for none, and then nothing is measured.
    """

    rank: int
    refine: int
    distil: int
    context_tokens: int


@dataclass(frozen=True)
class Made:
    """An adapter made from samples."""

    adapter: Adapter
    context: ChosenContext | None  # kept with it
    guard: Guard | None  # the gain of both; None if not measured


@dataclass(frozen=True)
class Source:
    """The samples of a task, or a description that the base model writes samples for."""

    path: Path | None
    data: bytes | None
    count: int
    description: str | None

    @classmethod
    def read(cls, path: Path | None, count: int, description: str | None, *, any_row: bool) -> Source:
        """Read the file of samples if there is one, before a model is loaded; raise `DataError` if it is of no use."""
        if path is None and description is None:
            hint = "specify samples or a description of the task"
            raise DataError("neither samples nor a description were given", hint=hint)
        data = None if path is None else read_examples(path)
        if data is not None:
            check_examples(data, path=path, any_row=any_row)
        return cls(path, data, count, description)

    def examples(self, base: BaseModel) -> Examples:
        """Return the samples as the base model reads them; it may have to write them first."""
        if self.data is not None:
            return examples_for(base, self.data, path=self.path, most=self.count)
        if not base.modality.takes_context:
            raise DataError(
                f"{base.label} is a {base.modality.name}, which cannot write samples", hint="specify --samples"
            )
        return Examples(plain(described_samples(base, str(self.description), self.count, SAMPLE_TOKENS)))


def make_from(
    context: Context, base: BaseModel, start: FewShotStart, source: Source, samples: Sequence[Prepared], recipe: Recipe
) -> Made:
    """Make an adapter from prepared samples, for its context if it has one.

    Raises:
        DataError: It is to be distilled, and one sample cannot follow another.
    """
    _check_distil(base, recipe.distil, len(samples))
    maker = _Maker(context, base, start, recipe)
    if recipe.context_tokens == 0 or not base.modality.takes_context:
        return Made(maker.adapted(samples), None, None)
    prompted = ContextScorer(base)
    if source.data is None:
        return Made(maker.adapted(samples), prompted.chosen(described_context(str(source.description))), None)
    usable = usable_samples(prompted, source.data, source.path, source.count)
    held, others = left_out(usable)
    trial = maker.tried(prompted, held, others, in_context=not recipe.distil)
    keeps_context = not recipe.distil
    if keeps_context and not trial.is_context_of_use:
        alone = maker.tried(prompted, held, others, in_context=False)
        if not alone.is_context_of_use:
            trial, keeps_context = alone, False
    is_enough = not held or len(usable) >= _ENOUGH
    adapter = trial.adapter if is_enough else maker.adapted(samples, in_context=trial.in_context)
    kept = prompted.filled(trial.chosen, held, recipe.context_tokens) if keeps_context else None
    return Made(adapter, kept, trial.guard)


@dataclass(frozen=True)
class _Trial:
    """An adapter made without some samples, and its gain on those."""

    in_context: bool  # whether it was made for its context
    adapter: Adapter
    chosen: ChosenContext
    guard: Guard | None

    @property
    def is_context_of_use(self) -> bool:
        """Whether the context is to be served; True if not measured."""
        return self.guard is None or self.guard.recommends_context


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes adapters from a few-shot start, as a recipe says."""

    context: Context
    base: BaseModel
    start: FewShotStart
    recipe: Recipe

    def tried(self, prompted: ContextScorer, held: Sequence[Any], others: Sequence[Any], *, in_context: bool) -> _Trial:
        """Make an adapter from samples, with or without a context, choose the context, and measure the others."""
        base = self.base
        read = base.modality.prepare(base, base.modality.readable(base, others).items, SAMPLE_TOKENS)
        adapter = self.adapted(read, in_context=in_context)
        with added(base.model, factors_of(adapter)):
            tell = partial(self.context.progress, note="choosing the context")
            most, total = self.recipe.context_tokens, len(held) + len(others)
            chosen = choose_context(prompted, others, most, total=total, tell=tell)
            adapted = ContextAblation.of(prompted, chosen, held)
        # If none is held out, the adapter has seen all of them, but the base model has not.
        leave_one_out = not held and not self.recipe.distil
        bare = ContextAblation.of(prompted, chosen, others if leave_one_out else held, leave_one_out=leave_one_out)
        return _Trial(in_context, adapter, chosen, Guard.of(bare, adapted, in_turn=not held))

    def adapted(self, samples: Sequence[Prepared], *, in_context: bool = False) -> Adapter:
        """Return an adapter after the few-shot steps and the gradient steps."""
        base, recipe, context = self.base, self.recipe, self.context
        adapter = self._stepped(samples, in_context=in_context)
        if recipe.refine:
            read, config = samples, FinetuneConfig(recipe.refine)
            if in_context:
                read = [text for order in range(_ORDERS) for text in shuffled_together(base, samples, order)]
                config = replace(config, batch=1)  # such a text has several samples
            for done, (nats, refined) in enumerate(finetune(base, adapter, read, config), start=1):
                adapter = refined
                context.progress(done, recipe.refine, f"refining, {nats:.3f} nats per token")
        if recipe.distil:
            teacher, distilling = self._stepped(samples, in_context=True), DistilConfig(recipe.distil)
            context.progress(0, recipe.distil, "reading each sample after the others")
            for done, (nats, taught) in enumerate(distil(base, adapter, teacher, samples, distilling), start=1):
                adapter = taught
                context.progress(done, recipe.distil, f"distilling, {nats:.3f} nats per token to go")
        return adapter

    def _stepped(self, samples: Sequence[Prepared], *, in_context: bool) -> Adapter:
        """Return an adapter after the few-shot steps, truncated to the rank that is written."""
        base, context = self.base, self.context
        adapter, steps = self.start.adapter, len(supports(samples, len(self.start.rates)))
        taken = adapt(base, self.start, samples, in_context=in_context, batch_size=texts_at_once(base.device))
        for done, adapted in enumerate(taken, start=1):
            adapter = adapted.adapter
            context.progress(done, steps, "adapting")
        return truncated(adapter, self.recipe.rank)


def _check_distil(base: BaseModel, steps: int, samples: int) -> None:
    if steps and not base.modality.takes_context:
        fact = f"{base.label} is a {base.modality.name}, which cannot read one sample after another"
        raise DataError(fact, hint="leave out --distil")
    if steps and samples < _MIN_DISTILLED:
        raise DataError("there is only one sample, and --distil needs two", hint="add samples, or leave out --distil")
