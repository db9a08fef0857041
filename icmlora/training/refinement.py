"""Functional refinement: change a code so that it does what the adapter does, not so that its weights are nearest.

    samples ──base + adapter──▶ p(next token) ─┐
      └──────base + code──────▶ q(next token) ─┴─ KL(p || q) and bits ──gradient──▶ values and strengths of the code

    minimise   (KL(p || q) + answers * max(0, loss(q) - loss(p) + margin * whole)) / whole
             +  price * bits / bits before

The whole effect is KL(p || base), and the loss that of the samples' own tokens. An adapter is seldom trained to the
end, so a code that is a little nearer to the base model loses in proportion to that there, while KL grows with its
square: without this term a code keeps the adapter's predictions and loses some of its gain. On the samples a code is
soon as good as its adapter, and on other text not yet, hence the margin (docs/results/LOG.md, 2026-11-29).

The base model is frozen. Refinement brings back what coarse rounding lost of an adapter's function, at fewer bits: the
second term lets values round to zero where that does no harm. Both terms are free of scale. What a code loses of the
adapter's effect, or of its right answers, sets the price: it rises while that is less than what may be lost, and falls
while it is more. Where a code was found to lose more of other examples, less may be lost of those that it reads. The
code of a generated adapter has no share to keep: its price stays, and is lower for a smaller error at the start,
because an accurate code gets less function for each further bit. The refined code decodes like any other and needs no
base model for that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors, added, factors_of
from icmlora.base_models.running.modules import not_matrix
from icmlora.errors import BaseModelUnsuited, DataError
from icmlora.generator.relaxed import RelaxedCode
from icmlora.training.config import REFINE_STEPS
from icmlora.training.effect import LEAST_LOST, Effect, bounded, share_of_right
from icmlora.training.teacher import READ_TOGETHER, Shortfall, Teacher, shortfalls, texts_with_gradients

WITHOUT_REFINE = "encode it without --refine"  # hint where a code cannot be refined
_READ = 3  # samples at least that are learned from, for each that is not
_LOOKED_AT = 8  # the last steps, whose losses set a price
_REMEMBERED = 16  # the last steps, whose losses are compared with those of other examples
_MOST_OPTIMISM = 4.0  # by what factor they may seem to differ: few texts were read
_MOST_DOUBT = 1.5  # by what factor others again may seem to lose more
# Adam's steps are as long whatever the slope, so all values of a large code with a small effect go too far. If the
# first ones would take away more than so many times what is lost, were that linear, steps are shorter
# (docs/results/LOG.md, 2026-11-30).
_MOST_REACH, _FIRST_STEPS, _NOTHING = 1.2, 8, 1e-9
# Where a step reads several samples, those after this share of the steps read half as many: they are shorter, so noise
# gets less far, and a task takes a quarter less time (docs/results/LOG.md, 2026-12-01).
_FULL = 0.2
# Where answers are short, a code ends as the average of its values over about the last steps, so many of all: what the
# samples of the very last ones ask for differs. Codes of text would lose some of their gain by it
# (docs/results/LOG.md, 2026-12-02).
_AVERAGED = 1 / 8
_STEEPNESS = 3  # power with which a price follows the ratio of what may be lost and what is
_CHEAPEST, _DEAREST = 16, 8  # factors by which it falls and rises at most


@dataclass(frozen=True)
class RefineConfig:
    """How a code is refined."""

    steps: int = REFINE_STEPS  # optimiser steps
    learning_rate: float = 0.01  # Adam's, in quantiser steps
    strength_rate: float = 0.01  # Adam's, in octaves
    # What the bits of the whole code are worth, as a share of the adapter's whole effect: the first times the code's
    # error, or for a code that is to keep a share of the effect the second times what it should lose.
    price: float = 0.6
    price_of_keeping: float = 3.0
    # Weight of the loss of the samples' own tokens, beside the divergence of all predictions; and how much less of it
    # than the adapter's counts as enough, as a share of the adapter's effect.
    answers: float = 0.25
    margin: float = 0.2
    # Weight of the divergence within prompts beside that of their answers: there are few of these to learn from.
    prompts: float = 0.25
    # Many steps with little text each: twice the text in a quarter of the steps took half as many bytes again
    # (docs/results/LOG.md, 2026-11-29).
    texts: int = 1  # pieces of samples that a step reads
    tokens: int = 96  # of a piece
    # Of prompts with short answers it reads as many as have so many tokens of answers together, if with the prompts
    # they have about so many: what two or three tokens say goes anywhere (docs/results/LOG.md, 2026-12-01).
    answer_tokens: int = 12
    answered_tokens: int = 384
    # Samples to learn from: what is missing of them the adapted model writes itself, so a code needs no data.
    samples: int = 32
    # At most so many of all samples are not learned from, but tell what a code keeps. 0: all do both.
    held: int = 0
    sample_tokens: int = 192  # read of a sample, in pieces, or at once where it is held
    seed: int = 0


FOR_SHARE = RefineConfig(held=16)
"""How a code is refined that is to keep a share of its adapter's effect."""


@dataclass(eq=False)
class Refinable:
    """A code that is to be refined, and what that takes."""

    relaxed: RelaxedCode
    error: float  # the code's squared error, weighted by sensitivity
    teacher: Teacher  # of what it is refined on
    effect: Effect  # of the adapter, on other examples
    aim: float | None  # share of the effect that the code should lose, None without a share to keep
    # What the last steps lost, (2,) each: shares of the effect, and of right answers.
    lost: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    optimism: float = 1.0  # how much more is lost of other examples than of those that are read
    # What is lost at each of the first steps, and by how much a step of usual length would lower it, were it linear.
    first: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def pace(self) -> torch.Tensor | float:
        """How long its steps are, as a share of the usual length."""
        if not self.first:
            return 1.0
        lost, lowered = (torch.stack(each).sum() for each in zip(*self.first, strict=True))
        return (_MOST_REACH * lost.clamp_min(_NOTHING) / lowered.clamp_min(_NOTHING)).clamp_max(1.0)

    def compare(self, elsewhere: float) -> None:
        """Take note of the share that is lost of other examples, which is what counts."""
        if self.lost:
            here = max(float(_worst(torch.stack(tuple(self.lost)))), LEAST_LOST)
            self.optimism = min(max(elsewhere / here, 1.0), _MOST_OPTIMISM)
            self.lost.clear()

    @torch.no_grad()
    def look_ahead(self, lost: torch.Tensor, rate: float) -> None:
        """Take note of how far one of the first steps reaches, by its gradients; those of the bits are a small part."""
        # Of answers, most of which are right or wrong as a whole, slopes say less: shorter steps did not help them.
        if len(self.first) < _FIRST_STEPS and not self.teacher.has_prompts:
            slopes = [values.grad.abs().sum() for values in self.relaxed.values if values.grad is not None]
            self.first.append((lost.detach(), rate * torch.stack(slopes).sum()))

    @property
    def wanted(self) -> float | None:
        """What it should lose of other examples: less than its aim where these lose more than what is read."""
        return None if self.aim is None else self.aim / min(self.optimism, _MOST_DOUBT)


def refine(codes: Sequence[Refinable], base: BaseModel, config: RefineConfig, steps: range) -> Iterator[int]:
    """Refine the codes of some adapters, which share each pass through the base model; yields the steps done.

    `steps` are those of `config.steps` that are to be done now. The caller may stop after any step and take the codes
    as they are then. Where the model does not let several adapters share a pass, or steps read more texts of some, the
    codes are refined one after the other, and the steps of each are counted anew.
    """
    # The code of an adapter that does next to nothing may have no integers.
    codes = [code for code in codes if any(map(len, code.relaxed.values))]
    by_texts: dict[int, list[Refinable]] = {}
    for code in codes:
        by_texts.setdefault(_texts(code.teacher, config), []).append(code)
    for texts, some in by_texts.items():
        try:
            yield from _refined(some, base, config, steps, texts)
        except BaseModelUnsuited:  # comes of the first pass, before any code has changed
            if len(some) == 1:
                raise
            for code in some:
                yield from _refined([code], base, config, steps, texts)


def _refined(
    codes: Sequence[Refinable], base: BaseModel, config: RefineConfig, steps: range, texts: int
) -> Iterator[int]:
    groups = [
        *({"params": code.relaxed.values} for code in codes),
        {"params": [factor for code in codes for factor in code.relaxed.strengths]},
    ]
    on_card = base.device.type != "cpu"
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=on_card)
    ending = [code for code in codes if steps.stop == config.steps and has_short_answers(code.teacher, config)]
    averages = [_Average(code.relaxed, config.steps) for code in ending]
    later = max(config.texts, math.ceil(texts / 2))
    sizes = [texts if step < _FULL * config.steps else later for step in range(steps.stop)]
    batches = [_batches(code.teacher, sizes, config.seed, steps.start) for code in codes]
    prices = [_Price(code, config) for code in codes]
    # Several codes share one pass. Of one, no more samples are in memory with what their gradients take than save time.
    size = texts_with_gradients(base) if len(codes) == 1 else texts
    for step in steps:
        optimizer.zero_grad()
        factors = [_Detached(code.relaxed.factors(base.input_dtype)) for code in codes]
        missed = _descended(base, codes, factors, list(map(next, batches)), size, config)
        length = math.sqrt(1 - step / config.steps)
        for code, price, own, one, group in zip(codes, prices, factors, missed, optimizer.param_groups, strict=False):
            own.backward(weight := price.follow(one))
            (price.of_a_bit * code.relaxed.bits()).backward()  # type: ignore[no-untyped-call]
            code.look_ahead(weight * one.nats, config.learning_rate)
            rate = config.learning_rate * length * code.pace
            group["lr"] = rate if on_card else float(rate)  # a card would have to be waited for
        optimizer.param_groups[-1]["lr"] = config.strength_rate * length
        optimizer.step()
        for average in averages:
            average.follow()
        yield step + 1
    for average in averages:
        average.take()


class _Average:
    """The average of a code's parameters over about the last steps."""

    def __init__(self, code: RelaxedCode, steps: int) -> None:
        self._parameters: list[torch.Tensor] = [*code.values, *code.strengths]
        self._weight = min(1 / (_AVERAGED * steps), 1.0)
        self._means = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def follow(self) -> None:
        """Take note of the parameters after a step."""
        torch._foreach_lerp_(self._means, self._parameters, self._weight)

    @torch.no_grad()
    def take(self) -> None:
        """Set the parameters to their average."""
        torch._foreach_copy_(self._parameters, self._means)


class _Missed(NamedTuple):
    """What a code loses on the samples of a step, or of a pass as a part of that."""

    nats: torch.Tensor  # all that is to be brought down, a scalar
    divergence: torch.Tensor  # as `Shortfall.divergence`
    less_right: torch.Tensor  # as `Shortfall.less_right`, averaged
    fewest: int

    @classmethod
    def of(cls, short: Shortfall, code: Refinable, config: RefineConfig, share: float) -> _Missed:
        """Weigh what is lost in a pass that reads a share of the samples."""
        answers = (short.loss + config.margin * code.effect.whole).clamp_min(0)
        nats = short.divergence + config.prompts * short.of_prompts + config.answers * answers
        divergence, less_right = short.divergence.detach(), short.less_right.mean()
        return cls(share * nats, share * divergence, share * less_right, short.fewest)

    @classmethod
    def of_passes(cls, parts: Sequence[_Missed]) -> _Missed:
        """Add up what is lost in the passes of a step."""
        nats, divergence, less_right, fewest = zip(*parts, strict=True)
        total = torch.stack(nats).sum().detach()
        return cls(total, torch.stack(divergence).sum(), torch.stack(less_right).sum(), min(fewest))


class _Detached:
    """The factors of a code, apart from it: gradients of several passes come together there before they flow on."""

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self.leaves: Factors = {
            name: (a.detach().requires_grad_(), b.detach().requires_grad_()) for name, (a, b) in factors.items()
        }

    def backward(self, weight: torch.Tensor) -> None:
        """Let the gradients, times a weight, flow on to the code."""
        pairs = zip(_flat(self._factors), _flat(self.leaves), strict=True)
        reached = [(factor, leaf.grad) for factor, leaf in pairs if leaf.grad is not None]
        factors, gradients = zip(*reached, strict=True)
        torch.autograd.backward(factors, torch._foreach_mul(gradients, weight))


def _flat(factors: Factors) -> Iterator[torch.Tensor]:
    return (factor for pair in factors.values() for factor in pair)


def _descended(
    base: BaseModel,
    codes: Sequence[Refinable],
    factors: Sequence[_Detached],
    batches: Sequence[Sequence[int]],
    size: int,
    config: RefineConfig,
) -> list[_Missed]:
    """Return what each code loses on its samples of a step; its factors have the gradients then."""
    passes = []
    for start in range(0, len(batches[0]), size):
        some = [batch[start : start + size] for batch in batches]
        asked = zip((code.teacher for code in codes), (one.leaves for one in factors), some, strict=True)
        share = len(some[0]) / len(batches[0])
        pairs = zip(shortfalls(base, list(asked)), codes, strict=True)
        missed = [_Missed.of(short, code, config, share) for short, code in pairs]
        torch.stack([one.nats for one in missed]).sum().backward()  # type: ignore[no-untyped-call]
        passes.append(missed)
    return [_Missed.of_passes(of_code) for of_code in zip(*passes, strict=True)]


class _Price:
    """What one bit of a code costs, and what a nat does, as shares of its adapter's effect."""

    @torch.no_grad()
    def __init__(self, code: Refinable, config: RefineConfig) -> None:
        self._code, self._allowed = code, None if code.wanted is None else code.wanted / code.optimism
        self._first = config.price * code.error if code.aim is None else config.price_of_keeping * code.aim
        self._bits = code.relaxed.bits().detach().clamp_min(1)
        self.of_a_bit = self._first / self._bits

    @torch.no_grad()
    def follow(self, missed: _Missed) -> torch.Tensor:
        """Set the price of a bit by what was lost in the last steps; return what a nat of the last one costs."""
        effect, lost = self._code.effect, self._code.lost
        share = (missed.divergence - effect.noise) / effect.whole
        lost.append(torch.stack([share, share_of_right(missed.less_right)]))
        if len(lost) < _LOOKED_AT // 2:
            return torch.ones_like(share) / effect.whole
        last = torch.stack(tuple(lost)[-_LOOKED_AT:])
        last[:, 0] = bounded(last[:, 0], missed.fewest)
        lost[-1] = last[-1]
        if self._allowed is not None:
            factor = (self._allowed / _worst(last).clamp_min(LEAST_LOST)) ** _STEEPNESS
            self.of_a_bit = self._first * factor.clamp(1 / _CHEAPEST, _DEAREST) / self._bits
        return torch.where(last[-1, 0] < share, last[-1, 0] / share, 1.0) / effect.whole


def _worst(lost: torch.Tensor) -> torch.Tensor:
    """Return what some steps (steps, 2) lost of the effect or of right answers, whichever is more: a scalar."""
    return lost.mean(dim=0).max()


def items_for(
    base: BaseModel, adapter: Adapter, samples: Sequence[Any], config: RefineConfig
) -> tuple[list[Any], list[Any]]:
    """Return what the code of an adapter is refined on, and what tells how much of its effect the code keeps.

    These are samples, and where there are few what the adapted model writes. Of a single one both are the same.

    Raises:
        DataError: There is nothing, or the adapter has modules that cannot be refined.
    """
    if (odd := not_matrix(base, adapter.layout)) is not None:
        fact = f"its code cannot be refined: {odd} is neither a linear layer nor a plain convolution of its base model"
        raise DataError(fact, hint=WITHOUT_REFINE)
    limit = max(config.tokens, config.sample_tokens)
    items = list(base.modality.prepare(base, samples, limit, whole=True)) if samples else []
    if len(items) < config.samples:
        with added(base.model, factors_of(adapter)):
            items += base.modality.written(base, items, config.samples - len(items), config.tokens, seed=config.seed)
    if not items:
        raise DataError("there is no text to refine on", hint=f"add a samples.jsonl to the task, or {WITHOUT_REFINE}")
    each = max(_READ + 1, math.ceil(len(items) / config.held)) if config.held else 1
    read = [item for number, item in enumerate(items) if number % each] or items
    pieces = [piece for item in read for piece in base.modality.pieces(base, item, config.tokens)]
    return pieces, items[::each] if config.held else pieces


def has_short_answers(teacher: Teacher, config: RefineConfig) -> bool:
    """Return whether the samples are prompts with answers so short that a step reads several."""
    return 0 < teacher.answer_size < config.answer_tokens


def _texts(teacher: Teacher, config: RefineConfig) -> int:
    """Return how many pieces of samples each of the first steps reads."""
    if not has_short_answers(teacher, config):
        return config.texts
    enough = math.ceil(config.answer_tokens / teacher.answer_size)
    return max(config.texts, min(enough, round(config.answered_tokens / teacher.size)))


def _batches(teacher: Teacher, sizes: Sequence[int], seed: int, start: int) -> Iterator[list[int]]:
    """Yield the numbers of each step's samples from a step on; the teacher reads those of some steps together."""
    batches = islice(_drawn(len(teacher), sizes, seed), start, None)
    while some := list(islice(batches, READ_TOGETHER)):
        teacher.targets([number for batch in some for number in batch])
        yield from some


def _drawn(count: int, sizes: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Yield the numbers of each step's samples, so many; every sample is drawn once before any is drawn again."""
    draw = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for texts in sizes:
        while len(waiting) < texts:
            waiting += torch.randperm(count, generator=draw).tolist()
        batch, waiting = waiting[:texts], waiting[texts:]
        yield batch
