"""Functional refinement: fit a code to its adapter's function rather than to its weights.

    samples ──base + adapter──▶ p(next token) ─┐
      └──────base + code──────▶ q(next token) ─┴─ KL(p || q) and bits ──gradient──▶ values and strengths of the code

    minimise   (KL(p || q) + answers * max(0, loss(q) - loss(p) + margin * whole)) / whole
             +  price * bits / bits before

The whole effect is KL(p || base); the loss is measured on the samples' own tokens. An adapter is seldom fully trained,
so a code slightly nearer to the base model loses gain in proportion to the distance, but KL only grows with its square:
without the loss term a code keeps the adapter's predictions and loses some of its gain. A code matches its adapter on
the samples sooner than on other text, hence the margin (docs/results/LOG.md, 2026-11-29).

The base model is frozen. Refinement restores function that coarse rounding lost, at fewer bits: the second term lets
values round to zero where that does no harm. Both terms are scale-free. The price of a bit rises while the code loses
less of the adapter's effect, or of its right answers, than it may, and falls while it loses more. If a code was found
to lose more on other examples, it may lose less on those that it reads. The code of a generated adapter has no share to
keep: its price is fixed, and lower for a smaller initial error, because an accurate code gains less function per
further bit. The refined code decodes like any other, without a base model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors, added, factors_of
from icmlora.base_models.running.modules import not_matrix
from icmlora.errors import BaseModelUnsuited, DataError
from icmlora.generator.codec.relaxed import RelaxedCode
from icmlora.training.config import REFINE_STEPS
from icmlora.training.effect import MIN_LOST, Effect, bounded, share_of_right
from icmlora.training.teacher import READ_TOGETHER, Teacher, shortfalls, texts_with_gradients

WITHOUT_REFINE = "encode it without --refine"  # hint where a code cannot be refined
_READ = 3  # minimum number of samples learned from per held-out sample
_LOOKED_AT = 8  # last steps whose losses set a price
_REMEMBERED = 16  # last steps whose losses are compared with losses on other examples
_MAX_OPTIMISM = 4.0  # limit of the ratio of the two: few texts were read
_MAX_DOUBT = 1.5  # largest reduction of the aim for optimism, as a factor
# Adam's step length does not depend on the slope, so all values of a large code with a small effect overshoot. If by
# linear extrapolation the first steps would remove more than this multiple of the loss, steps are shortened
# (docs/results/LOG.md, 2026-11-30).
_MAX_REACH, _FIRST_STEPS, _EPSILON = 1.2, 8, 1e-9
# Where steps read several samples, those after this share of the steps read half as many: they are shorter, so noise
# matters less, and a task takes a quarter less time (docs/results/LOG.md, 2026-12-01).
_FULL = 0.2
# For short answers, a code ends as the running average of its values over roughly this last share of the steps: the
# last few samples each pull in another direction. Codes of text would lose some of their gain by averaging
# (docs/results/LOG.md, 2026-12-02).
_AVERAGED = 1 / 8
_STEEPNESS = 3  # exponent of the ratio of allowed to actual loss in the price
_MAX_FALL, _MAX_RISE = 16, 8  # largest factors of a falling and of a rising price


@dataclass(frozen=True)
class RefineConfig:
    """Options of refinement."""

    steps: int = REFINE_STEPS  # optimiser steps
    learning_rate: float = 0.01  # Adam's, in quantiser steps
    strength_rate: float = 0.01  # Adam's, in octaves
    # Price of all bits of the code, as a share of the adapter's whole effect: `price` times the code's error, or for a
    # code that has to keep a share of the effect, `price_of_keeping` times the share that it should lose.
    price: float = 0.6
    price_of_keeping: float = 3.0
    # Weight of the loss of the samples' own tokens, relative to the divergence of all predictions; and how far below
    # the adapter's loss is enough, as a share of the adapter's effect.
    answers: float = 0.25
    margin: float = 0.2
    # Weight of the divergence within prompts, relative to their answers: there are few answers to learn from.
    prompts: float = 0.25
    # Many steps with little text each: twice the text in a quarter of the steps took 50 % more bytes
    # (docs/results/LOG.md, 2026-11-29).
    texts: int = 1  # pieces of samples per step
    tokens: int = 96  # per piece
    # For prompts with short answers, a step reads enough samples for `answer_tokens` tokens of answers, limited to
    # about `answered_tokens` with prompts: two or three tokens alone point anywhere (docs/results/LOG.md, 2026-12-01).
    answer_tokens: int = 12
    answered_tokens: int = 384
    # Number of samples to learn from: the adapted model writes missing ones itself, so a code needs no data.
    samples: int = 32
    # Maximum size of the held-out set, which measures how much a code keeps. 0: all samples do both.
    held: int = 0
    sample_tokens: int = 192  # tokens read of a sample, in pieces, or at once if it is held out
    seed: int = 0


FOR_SHARE = RefineConfig(held=16)
"""Options for a code that has to keep a share of its adapter's effect."""


@dataclass(eq=False)
class Refinable:
    """A code to refine, with its teacher, its aim and the losses so far."""

    relaxed: RelaxedCode
    error: float  # the code's squared error, weighted by sensitivity
    teacher: Teacher  # on the examples that the code is refined on
    effect: Effect  # the adapter's, on other examples
    aim: float | None  # share of the effect that the code should lose; None without a share to keep
    # Losses of the last steps, (2,) each: shares of the effect and of right answers.
    lost: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    optimism: float = 1.0  # ratio of the loss on other examples to the loss on those that are read
    # Loss at each of the first steps, and by how much a step of usual length would lower it if it were linear.
    first: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def pace(self) -> torch.Tensor | float:
        """Length of the code's steps, as a share of the usual length."""
        if not self.first:
            return 1.0
        lost, lowered = (torch.stack(each).sum() for each in zip(*self.first, strict=True))
        return (_MAX_REACH * lost.clamp_min(_EPSILON) / lowered.clamp_min(_EPSILON)).clamp_max(1.0)

    def compare(self, elsewhere: float) -> None:
        """Update `optimism` from the share lost on other examples, which is the share that counts."""
        if self.lost:
            here = max(float(_worst(torch.stack(tuple(self.lost)))), MIN_LOST)
            self.optimism = min(max(elsewhere / here, 1.0), _MAX_OPTIMISM)
            self.lost.clear()

    @torch.no_grad()
    def look_ahead(self, lost: torch.Tensor, rate: float) -> None:
        """Record how far one of the first steps reaches, by its gradients; the bits' share of them is small."""
        # Not for answers: most are right or wrong as a whole, so slopes say less, and shorter steps did not help.
        if len(self.first) < _FIRST_STEPS and not self.teacher.has_prompts:
            slopes = [values.grad.abs().sum() for values in self.relaxed.values if values.grad is not None]
            self.first.append((lost.detach(), rate * torch.stack(slopes).sum()))

    @property
    def wanted(self) -> float | None:
        """Share to lose on other examples: less than the aim if they lose more than the examples read."""
        return None if self.aim is None else self.aim / min(self.optimism, _MAX_DOUBT)


def refine(codes: Sequence[Refinable], base: BaseModel, config: RefineConfig, steps: range) -> Iterator[int]:
    """Refine several adapters' codes in shared passes through the base model; yields the steps done.

    `steps` is the part of `config.steps` to do now. The caller may stop after any step and use the codes as they are
    then. Where the model does not allow shared passes, or steps read more texts for some codes, the codes are refined
    one after the other, and the step count restarts for each.
    """
    # The code of an adapter that does next to nothing may have no integers.
    codes = [code for code in codes if any(map(len, code.relaxed.values))]
    by_texts: dict[int, list[Refinable]] = {}
    for code in codes:
        by_texts.setdefault(_texts(code.teacher, config), []).append(code)
    for texts, some in by_texts.items():
        try:
            yield from _refined(some, base, config, steps, texts)
        except BaseModelUnsuited:  # raised by the first pass, before any code has changed
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
    averaged: list[torch.Tensor] = []
    for code in codes:
        if steps.stop == config.steps and has_short_answers(code.teacher, config):
            averaged += [*code.relaxed.values, *code.relaxed.strengths]
    means = [parameter.detach().clone() for parameter in averaged]
    later = max(config.texts, math.ceil(texts / 2))
    sizes = [texts if step < _FULL * config.steps else later for step in range(steps.stop)]
    batches = [_batches(code.teacher, sizes, config.seed, steps.start) for code in codes]
    prices = [_Price(code, config) for code in codes]
    # Several codes share one pass. A single code reads only as many samples at once, with gradients, as saves time.
    size = texts_with_gradients(base) if len(codes) == 1 else texts
    for step in steps:
        optimizer.zero_grad()
        factors = [code.relaxed.factors(base.input_dtype) for code in codes]
        # As leaves, factors accumulate the gradients of several passes before these flow on to the codes.
        leaves = [{name: (_leaf(a), _leaf(b)) for name, (a, b) in own.items()} for own in factors]
        missed = _descended(base, codes, leaves, list(map(next, batches)), size, config)
        length = math.sqrt(1 - step / config.steps)
        for number, (code, price) in enumerate(zip(codes, prices, strict=True)):
            weight = price.follow(missed[number])
            pairs = zip(_flat(factors[number]), _flat(leaves[number]), strict=True)
            reached = [(factor, leaf.grad) for factor, leaf in pairs if leaf.grad is not None]
            ends, gradients = zip(*reached, strict=True)
            torch.autograd.backward(ends, torch._foreach_mul(gradients, weight))
            (price.of_a_bit * code.relaxed.bits()).backward()  # type: ignore[no-untyped-call]
            code.look_ahead(weight * missed[number].nats, config.learning_rate)
            rate = config.learning_rate * length * code.pace
            optimizer.param_groups[number]["lr"] = rate if on_card else float(rate)  # `float` would wait for a card
        optimizer.param_groups[-1]["lr"] = config.strength_rate * length
        optimizer.step()
        if averaged:
            with torch.no_grad():
                torch._foreach_lerp_(means, averaged, min(1 / (_AVERAGED * config.steps), 1.0))
        yield step + 1
    if averaged:
        with torch.no_grad():
            torch._foreach_copy_(averaged, means)


class _Missed(NamedTuple):
    """Loss of a code on a step's samples, or the contribution of one pass to it."""

    nats: torch.Tensor  # the loss to minimise, a scalar
    divergence: torch.Tensor  # as `Shortfall.divergence`
    less_right: torch.Tensor  # as `Shortfall.less_right`, averaged
    fewest: int


def _leaf(factor: torch.Tensor) -> torch.Tensor:
    return factor.detach().requires_grad_()


def _flat(factors: Factors) -> Iterator[torch.Tensor]:
    return (factor for pair in factors.values() for factor in pair)


def _descended(
    base: BaseModel,
    codes: Sequence[Refinable],
    leaves: Sequence[Factors],
    batches: Sequence[Sequence[int]],
    size: int,
    config: RefineConfig,
) -> list[_Missed]:
    """Return each code's loss on its samples of a step, and leave the gradients in its factors."""
    passes = []
    for start in range(0, len(batches[0]), size):
        some = [batch[start : start + size] for batch in batches]
        share = len(some[0]) / len(batches[0])
        shorts = shortfalls(base, list(zip((code.teacher for code in codes), leaves, some, strict=True)))
        missed = []
        for short, code in zip(shorts, codes, strict=True):
            answers = (short.loss + config.margin * code.effect.whole).clamp_min(0)
            nats = share * (short.divergence + config.prompts * short.of_prompts + config.answers * answers)
            less_right = share * short.less_right.mean()
            missed.append(_Missed(nats, share * short.divergence.detach(), less_right, short.fewest))
        torch.stack([one.nats for one in missed]).sum().backward()  # type: ignore[no-untyped-call]
        passes.append(missed)
    totals = []
    for parts in zip(*passes, strict=True):
        *columns, fewest = zip(*parts, strict=True)
        nats, divergence, less_right = (torch.stack(column).sum().detach() for column in columns)
        totals.append(_Missed(nats, divergence, less_right, min(fewest)))
    return totals


class _Price:
    """Prices of a bit and of a nat of a code, as shares of its adapter's effect."""

    @torch.no_grad()
    def __init__(self, code: Refinable, config: RefineConfig) -> None:
        self._code, self._allowed = code, None if code.wanted is None else code.wanted / code.optimism
        self._first = config.price * code.error if code.aim is None else config.price_of_keeping * code.aim
        self._bits = code.relaxed.bits().detach().clamp_min(1)
        self.of_a_bit = self._first / self._bits

    @torch.no_grad()
    def follow(self, missed: _Missed) -> torch.Tensor:
        """Set the price of a bit from the last steps' losses; return the price of a nat of the last one."""
        effect, lost = self._code.effect, self._code.lost
        share = (missed.divergence - effect.noise) / effect.whole
        lost.append(torch.stack([share, share_of_right(missed.less_right)]))
        if len(lost) < _LOOKED_AT // 2:
            return torch.ones_like(share) / effect.whole
        last = torch.stack(tuple(lost)[-_LOOKED_AT:])
        last[:, 0] = bounded(last[:, 0], missed.fewest)
        lost[-1] = last[-1]
        if self._allowed is not None:
            factor = (self._allowed / _worst(last).clamp_min(MIN_LOST)) ** _STEEPNESS
            self.of_a_bit = self._first * factor.clamp(1 / _MAX_FALL, _MAX_RISE) / self._bits
        return torch.where(last[-1, 0] < share, last[-1, 0] / share, 1.0) / effect.whole


def _worst(lost: torch.Tensor) -> torch.Tensor:
    """Return the larger mean loss of steps (steps, 2), of the effect or of right answers: a scalar."""
    return lost.mean(dim=0).max()


def items_for(
    base: BaseModel, adapter: Adapter, samples: Sequence[Any], config: RefineConfig
) -> tuple[list[Any], list[Any]]:
    """Return examples to refine an adapter's code on, and examples that measure how much of the effect it keeps.

    These are samples, topped up with texts that the adapted model writes. A single one serves as both.

    Raises:
        DataError: There is no text, or the adapter has modules that cannot be refined.
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
    """Yield the numbers of each step's samples from a step on; every sample is drawn once before any repeats."""
    draw = torch.Generator().manual_seed(seed)
    waiting, batches = list[int](), list[list[int]]()
    for texts in sizes:
        while len(waiting) < texts:
            waiting += torch.randperm(len(teacher), generator=draw).tolist()
        batches.append(waiting[:texts])
        waiting = waiting[texts:]
    for first in range(start, len(batches), READ_TOGETHER):  # the teacher reads several steps' samples together
        some = batches[first : first + READ_TOGETHER]
        teacher.targets([number for batch in some for number in batch])
        yield from some
