"""What moves a context into an adapter: `icm generate --distil` with other steps, ranks, modules and teachers.

    python -m tests.benchmarks.unseen.distilling --fleet DIR --base DIR --work DIR --tasks coq,turkish-man [--out FILE]

Each row changes one thing of what `--distil 150` does with 16 samples. Its share is the part of what a context adds to
the adapter before distillation that the distilled one keeps without the context. DIR of `--work` is that of
`in_context`, whose few-shot starts are used. A stopped run goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle
from typing import Any, Literal

import torch

from icmlora.adapter.arithmetic import between, truncated, with_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors, added, factors_of
from icmlora.fewshot.adapt import adapt
from icmlora.fewshot.context_choice import ContextScorer
from icmlora.fewshot.distil import DistilConfig, PromptedTeacher
from icmlora.fewshot.finetune import FinetuneConfig, descend
from icmlora.fewshot.start import FewShotStart
from icmlora.training.teacher import Teacher, shortfalls
from tests.benchmarks.unseen import fitted, rows
from tests.benchmarks.unseen.fleet import StudyTask, built_tasks, load_study_base, reloaded
from tests.benchmarks.unseen.folds import folds_of
from tests.benchmarks.unseen.in_context import COUNTS, DISTILLED
from tests.benchmarks.unseen.making import context_of
from tests.benchmarks.unseen.options import study_parser
from tests.benchmarks.unseen.told import answered, written

_PARTS = (0.25, DistilConfig.part, 0.75)  # of the way
Texts = Literal["samples", "written", "answers"]
Teaching = Literal["for a context", "to stand alone", "none"]


@dataclass(frozen=True)
class Variant:
    """A way to distil; as it stands, that of `icm generate --distil 150`, which then goes half of the way."""

    steps: int = 150
    rank: int = rows.RANK
    wide: bool = False  # whether all linear layers learn, and not those of the fleet alone
    teacher: Teaching = "for a context"  # the adapter that the teacher has on it
    own: float = 0.0  # weight of the samples' own loss
    texts: tuple[Texts, ...] = ("samples",)  # what is distilled, one kind of it a step in turn
    learning_rate: float = DistilConfig.learning_rate


VARIANTS = {
    "--distil 150": Variant(),
    "40 steps": Variant(steps=40),
    "400 steps": Variant(steps=400),
    "rank 8": Variant(rank=8),
    "rank 32": Variant(rank=32),
    "all linear layers": Variant(wide=True),
    "all linear layers, half the rate": Variant(wide=True, learning_rate=DistilConfig.learning_rate / 2),
    "teacher with the adapter itself": Variant(teacher="to stand alone"),
    "teacher without an adapter": Variant(teacher="none"),
    "own loss 0.1": Variant(own=0.1),
    "own loss 0.5": Variant(own=0.5),
    "written texts": Variant(texts=("written",)),
    "answers to questions": Variant(texts=("answers",)),
    "samples, written texts and answers": Variant(texts=("samples", "written", "answers")),
}


class Distilling:
    """The variants of one task.

    Args:
        base: The base model.
        start: A few-shot start that does not know the task.
        task: The task.
    """

    def __init__(self, base: BaseModel, start: FewShotStart, task: StudyTask) -> None:
        self._base, self._start, self._task, self._prompted = base, start, task, ContextScorer(base)
        self._texts = task.held_out(base)
        self._samples: list[Scored] = rows.support(task.samples(base), DISTILLED, 0)
        lines = [json.dumps({"text": text}) for text in rows.support(task.texts, DISTILLED, 0)]
        with added(base.model, factors_of(truncated(self._full, rows.RANK))):
            self._context = context_of(lines, self._prompted, COUNTS[DISTILLED])

    @cached_property
    def _full(self) -> Adapter:
        """What the few-shot steps make, of the rank of all of them."""
        return self._made(in_context=False)

    def _made(self, *, in_context: bool) -> Adapter:
        *_, last = adapt(self._base, self._start, self._samples, in_context=in_context)
        return last.adapter

    def scale(self) -> dict[str, float]:
        """Losses of the base model, the task's own adapter, and the generated one without and with the context."""
        adapter = truncated(self._full, rows.RANK)
        return {
            "base": self._nats(None),
            "own": self._nats(self._task.adapter()),
            "adapter": self._nats(adapter),
            "both": self._nats(adapter, in_context=True),
        }

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Distil, and return losses without and with the context, and on the way there, in nats per token."""
        began = time.monotonic()
        before, distilled = self._distilled(variant)
        seconds = round(time.monotonic() - began, 1)
        return {
            "nats": self._nats(distilled),
            "in_context": self._nats(distilled, in_context=True),
            "on_the_way": {str(part): self._nats(between(before, distilled, part)) for part in _PARTS},
            "seconds": seconds,
        }

    def _distilled(self, variant: Variant) -> tuple[Adapter, Adapter]:
        """Return the adapter before and after distillation, of the same shapes."""
        config, original = DistilConfig(variant.steps), truncated(self._full, variant.rank)
        teaching = original
        if variant.teacher == "for a context":
            teaching = truncated(self._made(in_context=True), variant.rank)
        taught = {} if variant.teacher == "none" else factors_of(teaching)
        made: dict[Texts, Callable[[], Teacher]] = {
            "samples": lambda: PromptedTeacher(self._base, taught, self._samples, config),
            "written": lambda: written(self._base, taught, self._samples),
            "answers": lambda: answered(self._base, taught, self._samples),
        }
        teachers = [made[texts]() for texts in variant.texts]
        turns = cycle(teachers)

        def loss(factors: Factors, batch: Sequence[int]) -> AbstractContextManager[torch.Tensor]:
            teacher = next(turns)
            (short,) = shortfalls(self._base, [(teacher, factors, [number % len(teacher) for number in batch])])
            return nullcontext(short.divergence + variant.own * short.loss)

        before = adapter = self._widened(original) if variant.wide else original
        schedule = FinetuneConfig(config.steps, variant.learning_rate, config.batch, config.seed)
        for _, later in descend(self._base.device, adapter, loss, max(map(len, teachers)), schedule):
            adapter = later  # one at a time: those of all steps would take gigabytes
        return before, adapter

    def _widened(self, adapter: Adapter) -> Adapter:
        """Add the other linear layers of the adapter's blocks, as a fresh LoRA has them."""
        known, draw = {module.name for module in adapter.modules}, torch.Generator().manual_seed(0)
        added_modules = []
        for name, layer in self._base.model.named_modules():
            if isinstance(layer, torch.nn.Linear) and ".layers." in name and name not in known:
                bound = 1 / math.sqrt(layer.in_features)
                a = (torch.rand(rows.RANK, layer.in_features, generator=draw) * 2 - 1) * bound
                added_modules.append(LoraModule(name, a, torch.zeros(layer.out_features, rows.RANK)))
        assert added_modules
        return with_modules(adapter, (*adapter.modules, *added_modules))

    def _nats(self, adapter: Adapter | None, *, in_context: bool = False) -> float:
        with added(self._base.model, reloaded(adapter)):
            return self._prompted.score(self._context if in_context else None, self._texts).value


def main(arguments: list[str] | None = None) -> None:
    """Measure what was not measured yet, and print a table."""
    parser = study_parser("distilling", __doc__, most=40, episodes=10)
    parser.add_argument("--tasks", type=lambda text: text.split(","), required=True, help="names, separated by commas")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(VARIANTS), help="rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = options.work / "distilling.json"
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    tasks, base = built_tasks(options.fleet, options.most), load_study_base(options.base)
    folds = folds_of(tasks)
    for number in options.folds:
        for task in folds[number]:
            if task.name not in options.tasks:
                continue
            members = [other for other in tasks if other not in folds[number]]
            start = fitted.fit_start(base, members, options.episodes, number, options.work / f"start-{number}.icms")
            distilling = Distilling(base, start, task)
            if task.name not in found:
                found[task.name] = {"scale": distilling.scale(), "variants": {}}
            of_task = found[task.name]
            for name in options.only:
                if name not in of_task["variants"]:
                    of_task["variants"][name] = asdict(VARIANTS[name]) | distilling.measure(VARIANTS[name])
                    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    print(line(task.name, name, of_task), flush=True)
    if options.out is not None:
        options.out.write_text(kept.read_text("utf-8"), encoding="utf-8")


def line(task: str, name: str, of_task: dict[str, Any]) -> str:
    """Say what a variant keeps."""
    scale, variant = of_task["scale"], of_task["variants"][name]
    on_the_way = variant["on_the_way"].values()
    losses = (scale["adapter"], scale["both"], variant["nats"], variant["in_context"], *on_the_way)
    adapter, both, alone, behind, *parts = ((scale["base"] - nats) / (scale["base"] - scale["own"]) for nats in losses)
    share = (alone - adapter) / (both - adapter)
    cells = [alone, share, *parts, behind]
    shown = " | ".join(f"{cell:.3f}" for cell in cells)
    return f"| {task} | {name} | {shown} | {variant['seconds']:.0f} | adapter {adapter:.3f}, both {both:.3f}"


if __name__ == "__main__":
    main()
