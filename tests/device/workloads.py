"""What is counted on the stand-in: one training step, one step of refinement, one text, one task, one decoded code.

The first pass of each goes uncounted: it makes what later ones keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from icmlora import Fleet
from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.relaxed import RelaxedCode
from icmlora.task_vectors.extraction import extract_adapted, extract_context
from icmlora.training.config import TrainConfig
from icmlora.training.effect import Effect
from icmlora.training.loop import TrainStep, draws_of, fit
from icmlora.training.refinement import Refinable, RefineConfig, refine
from icmlora.training.source import AdapterSource
from icmlora.training.state import new_state
from icmlora.training.teacher import Teacher
from tests.device.counts import Counts, counting

CARD = torch.device("cuda", 0)
_RECORDS = 3  # of training that go uncounted, so that every adapter has been read
_WARM_STEPS, _STEPS = 2, 4  # of refinement: uncounted and counted


def training(net: Any, source: AdapterSource) -> tuple[Counts, int]:
    """Count what happens between two reports of progress; returns the number of steps too."""
    steps: Iterator[TrainStep] = fit(new_state(net.to(CARD), TrainConfig(steps=10_000)), source)
    first = next(islice(steps, _RECORDS - 1, None))
    with counting() as counts:
        last = next(steps)
    return counts, (last.step - first.step) // draws_of(CARD)


def refinement(base: BaseModel, codec: Codec, adapters: Sequence[Adapter], items: Sequence[Any]) -> Counts:
    """Count some steps of refining the codes of adapters side by side, and return the counts of one."""
    codes = [
        Refinable(
            RelaxedCode(codec, adapter, encode_adapter(codec, adapter, {}).data, CARD),
            error=0.3,
            teacher=Teacher(base, factors_of(adapter), items),
            effect=Effect(Teacher(base, factors_of(adapter), items)),
            aim=0.1,
        )
        for adapter in adapters
    ]
    steps = refine(codes, base, RefineConfig(steps=_WARM_STEPS + _STEPS), range(_WARM_STEPS + _STEPS))
    list(islice(steps, _WARM_STEPS))
    for code in codes:
        code.teacher.targets(range(len(items)))  # goes through the adapted model once, in whichever step
    with counting() as counts:
        list(islice(steps, _STEPS))
    return share(counts, _STEPS)


def evaluation(base: BaseModel, examples: Sequence[Any], tokens: int) -> Counts:
    """Count the measuring of a loss, and return the counts of one text."""
    base.modality.measure(base, examples, tokens)
    with counting() as counts:
        base.modality.measure(base, examples, tokens)
    return share(counts, len(examples))


def vectors(base: BaseModel, adapter: Any, samples: Sequence[Any]) -> Counts:
    """Count the extraction of both views of one task."""
    extract_adapted(base, adapter, samples)
    with counting() as counts:
        extract_adapted(base, adapter, samples)
        extract_context(base, samples)
    return counts


def decoding(fleet: Fleet, task: str) -> Counts:
    """Count what it takes to decode a code and to put its factors on the card."""
    list(fleet.load_many([task], source="code", device="cuda"))
    with counting() as counts:
        list(fleet.load_many([task], source="code", device="cuda"))
    return counts


def share(counts: Counts, number: int) -> Counts:
    """Divide counts by the number of things that were counted, rounded to whole ones."""
    names = ("operators", "views", "copies_to", "bytes_to", "copies_from", "bytes_from", "syncs")
    return replace(counts, **{name: round(getattr(counts, name) / number) for name in names})
