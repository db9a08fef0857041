"""Make an adapter and its context from the samples of a task, and measure what each of them gains.

samples ──held out──▶ four that measure: base model, adapter, context, both
   └──the others──▶ few-shot steps ──▶ gradient steps ──▶ distillation ──▶ adapter
          └───────▶ context, chosen with that adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from icmlora.adapter.arithmetic import truncated
from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.errors import DataError
from icmlora.fewshot.adapt import adapt, shuffled_together, supports
from icmlora.fewshot.context_choice import ChosenContext, ContextScorer, choose_context
from icmlora.fewshot.described import described_context
from icmlora.fewshot.distil import DistilConfig, distil
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from icmlora.fewshot.guard import AblationReport, ContextAblation, left_out
from icmlora.fewshot.start import FewShotStart
from icmlora.fleet.context import Context
from icmlora.fleet.few_shot.context_choice import usable_samples
from icmlora.fleet.few_shot.generated import SAMPLE_TOKENS, GenerateOptions
from icmlora.io.devices import texts_at_once

_ORDERS = 4  # orders of the samples, one after the other, when an adapter is refined for its context
_MIN_DISTILLED = 2
_ENOUGH = 32  # samples; four more hardly change an adapter


@dataclass(frozen=True)
class Made:
    """An adapter made from samples."""

    adapter: Adapter
    context: ChosenContext | None  # kept with it
    guard: AblationReport | None  # the gain of both; None if not measured


def make_from(
    context: Context,
    base: BaseModel,
    start: FewShotStart,
    options: GenerateOptions,
    data: bytes | None,
    samples: Sequence[Prepared],
) -> Made:
    """Make an adapter from prepared samples, for its context if it has one.

    `data` is the file that the samples are from, None if the base model wrote them.

    Raises:
        DataError: It is to be distilled, and one sample cannot follow another.
    """
    if options.distil and not base.modality.takes_context:
        fact = f"{base.label} is a {base.modality.name}, which cannot read one sample after another"
        raise DataError(fact, hint="leave out --distil")
    if options.distil and len(samples) < _MIN_DISTILLED:
        raise DataError("there is only one sample, and --distil needs two", hint="add samples, or leave out --distil")
    maker = _Maker(context, base, start, options)
    if options.context_tokens == 0 or not base.modality.takes_context:
        return Made(maker.adapted(samples), None, None)
    prompted = ContextScorer(base)
    if data is None:
        return Made(maker.adapted(samples), prompted.chosen(described_context(str(options.description))), None)
    usable = usable_samples(prompted, data, options.samples, options.count)
    held, others = left_out(usable)
    keeps_context = not options.distil
    adapter, chosen, guard = maker.tried(prompted, held, others, in_context=keeps_context)
    if keeps_context and not _is_useful(guard):
        alone = maker.tried(prompted, held, others, in_context=False)
        if not _is_useful(alone[-1]):
            keeps_context, (adapter, chosen, guard) = False, alone
    if held and len(usable) < _ENOUGH:
        adapter = maker.adapted(samples, in_context=keeps_context)
    return Made(adapter, prompted.filled(chosen, held, options.context_tokens) if keeps_context else None, guard)


def _is_useful(guard: AblationReport | None) -> bool:
    """Return whether the context is to be served; True if not measured."""
    return guard is None or guard.recommends_context


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes adapters from a few-shot start."""

    context: Context
    base: BaseModel
    start: FewShotStart
    options: GenerateOptions

    def tried(
        self, prompted: ContextScorer, held: Sequence[Any], others: Sequence[Any], *, in_context: bool
    ) -> tuple[Adapter, ChosenContext, AblationReport | None]:
        """Make an adapter from samples, with or without a context, choose the context, and measure the others."""
        base = self.base
        read = base.modality.prepare(base, base.modality.readable(base, others).items, SAMPLE_TOKENS)
        adapter = self.adapted(read, in_context=in_context)
        with added(base.model, factors_of(adapter)):
            on_progress = partial(self.context.progress, note="choosing the context")
            most, total = self.options.context_tokens, len(held) + len(others)
            chosen = choose_context(prompted, others, most, total=total, on_progress=on_progress)
            adapted = ContextAblation.of(prompted, chosen, held)
        # If none is held out, the adapter has seen all of them, but the base model has not.
        leave_one_out = not held and not self.options.distil
        shown = others if leave_one_out else held
        bare = ContextAblation.of(prompted, chosen, shown, leave_one_out=leave_one_out)
        return adapter, chosen, AblationReport.of(bare, adapted, leave_one_out=not held)

    def adapted(self, samples: Sequence[Prepared], *, in_context: bool = False) -> Adapter:
        """Return an adapter after the few-shot steps and the gradient steps."""
        base, options, context = self.base, self.options, self.context
        adapter = self._stepped(samples, in_context=in_context)
        if options.refine:
            read, config = samples, FinetuneConfig(options.refine)
            if in_context:
                read = [text for order in range(_ORDERS) for text in shuffled_together(base, samples, order)]
                config = replace(config, batch=1)  # such a text has several samples
            for done, (nats, refined) in enumerate(finetune(base, adapter, read, config), start=1):
                adapter = refined
                context.progress(done, options.refine, f"refining, {nats:.3f} nats per token")
        if options.distil:
            teacher, distilling = self._stepped(samples, in_context=True), DistilConfig(options.distil)
            context.progress(0, options.distil, "reading each sample after the others")
            for done, (nats, taught) in enumerate(distil(base, adapter, teacher, samples, distilling), start=1):
                adapter = taught
                context.progress(done, options.distil, f"distilling, {nats:.3f} nats per token to go")
        return adapter

    def _stepped(self, samples: Sequence[Prepared], *, in_context: bool) -> Adapter:
        """Return an adapter after the few-shot steps, truncated to the rank that is written."""
        base, context = self.base, self.context
        adapter, steps = self.start.adapter, len(supports(samples, len(self.start.rates)))
        taken = adapt(base, self.start, samples, in_context=in_context, batch_size=texts_at_once(base.device))
        for done, adapted in enumerate(taken, start=1):
            adapter = adapted.adapter
            context.progress(done, steps, "adapting")
        return adapter if self.options.rank is None else truncated(adapter, self.options.rank)
