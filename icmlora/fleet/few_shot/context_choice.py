"""The context of a task: samples that stand before its requests, kept next to its adapter.

samples ──left out──▶ four to measure context and adapter
   └──the others──▶ context ──▶ context.txt, context.json ──▶ extras of the adapter
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icmlora.base_models.catalogue import check_examples
from icmlora.base_models.examples.examples import spread
from icmlora.base_models.examples.media_archive import read_examples
from icmlora.base_models.reading import unread_examples
from icmlora.errors import BaseModelUnsuited, DataError
from icmlora.fewshot.context_choice import ContextScorer, choose_context
from icmlora.fewshot.guard import AblationReport, ContextAblation, left_out
from icmlora.fleet.context import Context, has_loaders
from icmlora.fleet.few_shot.generated import ContextReport
from icmlora.fleet.resources.code_source import StoreCodes
from icmlora.fleet.resources.loading import open_base, read_runnable
from icmlora.fleet.resources.texts import adapter_template
from icmlora.fleet.write.materialize import render
from icmlora.fleet.write.sources import ResolvedSource, resolve_source
from icmlora.formats.catalogue import format_named
from icmlora.formats.extras import pack
from icmlora.formats.peft.peft import CONTEXT_NAMES
from icmlora.io.devices import resolve_device
from registry.manifests import Extra, File, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from icmlora.base_models.modality import BaseModel
    from registry.storage.blobs.content import Blobs
    from registry.store import Store


def choose(context: Context, task: str, samples: Path | None, count: int, tokens: int, device: str) -> ContextReport:
    """Do the work of `set_context`."""
    place, path = resolve_device(device), samples
    with context.open() as store:
        codes = StoreCodes(store, context)
        chosen = resolve_source(codes, codes.get(task))
        data = _samples(store, chosen, path)
        check_examples(data, path=path, any_row=has_loaders())
        check_place(chosen.task.final.format)
        context.progress(0, None, f"loading {chosen.task.base_model}")
        base = open_base(store, chosen.task.base_model, place, cache=context.cache)
        prompted = ContextScorer(base, adapter_template(store, chosen.task))
        found = usable_samples(prompted, data, path, count)
        held, others = left_out(found)
        with _on(base, codes, chosen):
            on_progress = partial(context.progress, note="choosing the context")
            made = choose_context(prompted, others, tokens, total=len(found), on_progress=on_progress)
            measure = partial(ContextAblation.of, prompted, made, held or found, leave_one_out=not held)
            adapted = measure()
        guard = AblationReport.of(measure(), adapted, leave_one_out=not held)
        made = prompted.filled(made, held, tokens)
        files = kept_files(store.blobs, made.context.files)
        store.update(chosen.task.name, partial(with_files, files=files))
    size = sum(file.packed_size for file in files)
    return ContextReport(chosen.task.name, len(made.samples), made.tokens, size, guard, base.dtype)


def check_place(adapter_format: str) -> None:
    """Raise `DataError` if the adapters of a format have no place for a context."""
    if not format_named(adapter_format).companions >= CONTEXT_NAMES:
        raise DataError(f"an adapter in the format {adapter_format!r} cannot include a context")


def usable_samples(prompted: ContextScorer, data: bytes, path: Path | None, count: int) -> list[Any]:
    """Return at most `count` samples of a file that can stand before a request."""
    base = prompted.base
    if not base.modality.takes_context:
        fact = f"{base.label} is a {base.modality.name}, and only a causal language model reads a context"
        raise BaseModelUnsuited(fact)
    return prompted.usable(spread(unread_examples(base, data, path=path).items, count))


def kept_files(blobs: Blobs, files: Mapping[str, bytes]) -> tuple[Extra, ...]:
    """Store files, and return them as extras of an adapter."""
    found = []
    for name, data in files.items():
        packed = pack(data)
        found.append(Extra(blob=File(blobs.put(packed), len(packed)), file=name, size=len(data)))
    return tuple(found)


def with_files(task: Task, *, files: Sequence[Extra]) -> Task:
    """Return a task with other files for its context."""
    others = (extra for extra in task.final.extras if extra.file not in CONTEXT_NAMES)
    return replace(task, final=replace(task.final, extras=(*others, *files)))


def _samples(store: Store, chosen: ResolvedSource, path: Path | None) -> bytes:
    if path is not None:
        return read_examples(path)
    if chosen.task.samples is None:
        raise DataError(f"task {chosen.task.name!r} has no samples", hint="add some with --samples FILE")
    return store.blobs.read(chosen.task.samples)


def _on(base: BaseModel, codes: StoreCodes, chosen: ResolvedSource) -> AbstractContextManager[Any]:
    """Put the adapter that `materialize` would write on the base model."""
    from icmlora.base_models.running.attach import adapted

    if chosen.source == "original":
        return adapted(base, read_runnable(codes.store, chosen.task.final))
    files = render(chosen)
    return adapted(base, chosen.format.runnable(files.config, files.weights))
