"""What base model, original and code of a task write for the same prompts, and where the last two differ.

    prompt ──base model──────────────▶ text
           ──base model + original───▶ text ──┐
           ──base model + code───────▶ text ──┴── word by word ──▶ the parts that differ

Always the most probable next token, so that the same models write the same texts. Each adapter goes through the form
of its files and PEFT, as for `icm eval`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.prompts import Prompt, given_prompts, prompts_of
from icmlora.base_models.running.attach import adapted
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, DataError
from icmlora.fleet.context import current_code
from icmlora.fleet.failures import FAILURES, BaseUnavailable, Failed, as_error
from icmlora.fleet.measure.module_errors import decoded, errors_of
from icmlora.fleet.resources.decoding import read_form
from icmlora.fleet.resources.loading import Models, read_original, read_runnable
from icmlora.fleet.resources.texts import adapter_template, own_text
from icmlora.io.text import with_article

if TYPE_CHECKING:
    from icmlora.adapter.metrics import GroupError
    from icmlora.base_models.modality import BaseModel
    from icmlora.formats.format import RunnableAdapter
    from registry.records import TaskRecord
    from registry.store import Store

PROMPTS = 3
"""Prompts of a task that are taken from its held-out text."""
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Part:
    """A piece of a text, and whether it differs from the other text."""

    text: str
    differs: bool = False


@dataclass(frozen=True)
class Answer:
    """What one source writes."""

    source: str
    parts: Sequence[Part]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Answers:
    """A prompt and what the sources write for it."""

    prompt: str
    expected: str  # what follows in the task's own text; empty where nothing is known
    answers: Sequence[Answer]
    are_equal: bool | None  # whether original and code write the same; None without an original


@dataclass(frozen=True)
class TaskOutputs:
    """The answers of a task."""

    task: str
    prompts: Sequence[Answers]
    errors: Sequence[GroupError] = ()  # of its code by kind of module; empty where original or code are missing


Given = Sequence["Prompt | Mapping[str, Any]"]
"""Prompts for every task, instead of the beginnings of its held-out text."""


def task_outputs(
    models: Models, task: TaskRecord, given: Given | None, max_new_tokens: int
) -> TaskOutputs | Failed | BaseUnavailable:
    """Let the sources of a task answer; what is wrong with it is returned, so that others go on."""
    try:
        base = models.base(task.base_model)
        prompts = _prompts(models.store, base, task, given)
        adapters, errors = _adapters(models, task)
        sources: dict[str, RunnableAdapter | None] = {"base model": None, **adapters}
        texts = {source: _texts(base, adapter, prompts, max_new_tokens) for source, adapter in sources.items()}
        answers = [_side_by_side(prompt, texts, place) for place, prompt in enumerate(prompts)]
        return TaskOutputs(task.name, answers, errors)
    except (BaseModelNotFound, BaseModelUnsuited) as error:
        return BaseUnavailable(error)
    except FAILURES as error:
        return Failed(as_error(error, models.loaded(task.base_model)))


def _prompts(store: Store, base: BaseModel, task: TaskRecord, given: Given | None) -> list[Prompt]:
    if given is not None:
        return given_prompts(base, given, adapter_template(store, task.name))
    if task.eval_data is None:
        raise DataError("it has no held-out text to take prompts from", hint="name a file with --prompts")
    found = prompts_of(own_text(store, task, base).examples, PROMPTS)
    if not found:
        raise DataError("no prompt can be made of its held-out text", hint="name a file with --prompts")
    return found


def _adapters(models: Models, task: TaskRecord) -> tuple[dict[str, RunnableAdapter], Sequence[GroupError]]:
    """Return the original and the best code of a task, as far as the store has them, and the errors of its codes."""
    store, found = models.store, dict[str, "RunnableAdapter"]()
    final, (code, generator) = store.tasks.final(task.name), current_code(store, task)
    if not final.is_evicted:
        found["original"] = read_runnable(store, final)
    if code is None or generator is None:
        return found, ()
    codes = decoded(store, models.generator_file(generator), code)
    best = list(codes)[-1]
    found[best] = read_form(store, final).runnable(codes[best])
    return found, () if final.is_evicted else errors_of(final, read_original(store, final), codes)


def _texts(base: BaseModel, adapter: RunnableAdapter | None, prompts: Sequence[Prompt], most: int) -> list[str]:
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(adapted(base, adapter))
        texts = [base.modality.answer(base, prompt, most) for prompt in prompts]
    if None in texts:
        fact = f"base model {base.label!r} is {with_article(base.modality.name)}, which does not continue texts"
        raise DataError(fact, hint="outputs are shown of causal and sequence-to-sequence language models")
    return [text for text in texts if text is not None]


def _side_by_side(prompt: Prompt, texts: Mapping[str, Sequence[str]], place: int) -> Answers:
    written = {source: found[place] for source, found in texts.items()}
    coded = next((source for source in written if source.startswith("code")), None)
    parts = {source: [Part(text)] for source, text in written.items()}
    are_equal = None
    if "original" in written and coded is not None:
        parts["original"], parts[coded] = differing(written["original"], written[coded])
        are_equal = written["original"] == written[coded]
    return Answers(prompt.text, prompt.expected, [Answer(*pair) for pair in parts.items()], are_equal)


def differing(one: str, other: str) -> tuple[list[Part], list[Part]]:
    """Split two texts into parts that they share and parts that only one of them has, word by word."""
    words = _WORDS.findall(one), _WORDS.findall(other)
    matcher = SequenceMatcher(None, *words, autojunk=False)
    parts: tuple[list[Part], list[Part]] = [], []
    for kind, first, end, other_first, other_end in matcher.get_opcodes():
        for side, (start, stop) in enumerate(((first, end), (other_first, other_end))):
            if start < stop:
                parts[side].append(Part("".join(words[side][start:stop]), kind != "equal"))
    return parts
