"""Generate an adapter for a task that has none, from some of its samples.

samples ──base model──▶ context vectors ──▶ how far the task is from known ones
   ├──base model + few-shot start──▶ steps ──▶ adapter ──(gradient steps)──▶ PEFT folder
   └──left out──▶ losses without and with the adapter, and after the others: the context, in the same folder

register:  adapter ──encode, refine──▶ code ──┐
           written folder ──▶ configuration, card ──┼──▶ an evicted task: one transaction, no weights
           context vectors ───────────────────┘
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.catalogue import check_examples
from icmlora.base_models.examples.examples import Examples, plain
from icmlora.base_models.examples.media_archive import read_examples
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.reading import examples_for
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.errors import DataError, NotCovered
from icmlora.fewshot.described import described_samples
from icmlora.fleet.context import Context, base_name, has_loaders
from icmlora.fleet.encode.refiner import Refiner, TrialCode, refine_all
from icmlora.fleet.few_shot.context_choice import kept_files
from icmlora.fleet.few_shot.from_samples import make_from
from icmlora.fleet.few_shot.generated import SAMPLE_TOKENS, Generated, GenerateOptions
from icmlora.fleet.few_shot.start import read_few_shot_start
from icmlora.fleet.resources.adapter_row import new_adapter
from icmlora.fleet.resources.loading import open_base
from icmlora.fleet.resources.stored_vectors import comparable_vectors, comparison_key
from icmlora.fleet.vectors.extraction import VECTOR_DTYPE, put_vectors
from icmlora.fleet.write.cards import GeneratedCard
from icmlora.formats.format import AdapterBytes, write_adapter_files
from icmlora.formats.peft.peft import PEFT
from icmlora.generator.codec.encoding import Encoded, encode_adapter
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.generator.codec.limits import Limits
from icmlora.io.devices import gradient_dtype, resolve_device
from icmlora.io.staging import check_free
from icmlora.task_vectors.distances import MIN_TASKS, Familiarity, familiarity
from icmlora.task_vectors.extraction import extract_context
from icmlora.task_vectors.vector import TaskVector
from icmlora.training.refinement import RefineConfig
from registry.errors import RegistryError, TaskConflict
from registry.filters import Selection
from registry.manifests import Code, File, Generator, Task, now
from registry.names import check_name, check_note, split_label

if TYPE_CHECKING:
    from registry.store import Store

# A generated adapter has few directions that matter: finer rounding without refinement is larger and worse.
_CODE_TOLERANCE = 0.7


def generate_in(
    context: Context,
    name: str,
    folder: Path,
    options: GenerateOptions,
    base_model: str | None,
    device: str,
    dtype: str,
    *,
    register: bool,
    force: bool,
) -> Generated:
    """Do the work of `generate`."""
    place, path, description = resolve_device(device), options.samples, options.description
    check_name(name)
    check_free(folder, force=force)
    note = check_note(description) if description is not None and (register or path is None) else None
    if path is None and description is None:
        raise DataError("neither samples nor a description were given", hint="specify samples or a description")
    with context.open() as store:
        data = None if path is None else read_examples(path)
        if data is not None:  # before a model is loaded
            check_examples(data, path=path, any_row=has_loaders())
        if register and (taken := store.find(name)) is not None:
            raise TaskConflict(taken.name, choices=None)
        generator = _generator_with_start(store, base_model)
        file = GeneratorFile(store.blobs.read(generator.blob))
        start = read_few_shot_start(store, generator, file)
        most = max(file.configs[number].slots for number in file.covering(start.adapter.layout))
        if register and options.rank is not None and options.rank > most:
            fact = f"codes of this generator have at most rank {most}, and rank {options.rank} was requested"
            raise NotCovered(fact, hint=f"use --rank {most}, or leave out --register to write the folder only")
        context.progress(0, None, f"loading {generator.base_model}")
        base, found, vectors = _load_base(context, store, generator.base_model, place, options, data)
        prepared = base.modality.prepare(base, found.items, SAMPLE_TOKENS)
        made = make_from(context, base, start, replace(options, rank=options.rank or most), data, prepared)
        adapter, chosen = made.adapter, made.context
        nats = list[float]()
        for factors in ({}, factors_of(adapter)):
            with added(base.model, factors):
                nats.append(base.modality.measure(base, found.items, SAMPLE_TOKENS).value)
        known = _familiarity(store, generator, vectors)
        code = _encode(context, file, adapter, vectors, base, found.items) if register else None
        context.progress(0, None, "writing the adapter")  # the last moment to stop: then the folder, then the task
        files = {} if chosen is None else chosen.context.files
        card = GeneratedCard(
            task=name,
            base_model=generator.base_model,
            generator=generator,
            samples=len(found.items),
            refined=options.refine,
            distilled=options.distil,
            description=description,
            guard=made.guard,
            has_context=bool(files),
            is_made_for_it=bool(files) and path is not None,
        )
        label, revision = split_label(card.base_model)
        written = replace(adapter, base_model=label, revision=revision)
        content = PEFT.encode(written, dtype=dtype, card=card.text(), metadata=card.metadata())
        write_adapter_files(folder, PEFT, replace(content, companions=files), folder.name, force=force)
        if code is not None:
            try:
                store.publish([_generated_task(store, generator, name, note, content, vectors, code, files)])
            except RegistryError as error:
                again = "run the same command again with --force to register it"
                error.hint = f"the adapter was written to {folder}; {again}"
                raise
    return Generated(
        task=name,
        directory=folder,
        base_model=generator.base_model,
        generator=generator.blob,
        samples=len(found.items),
        reaching=sum(sample.size == SAMPLE_TOKENS for sample in prepared),
        base_nats=nats[0],
        nats=nats[1],
        known=known,
        rank=max(shape.rank for shape in adapter.layout),
        precision=base.dtype,
        weights=hashlib.sha256(content.weights).hexdigest(),
        is_described=path is None,
        context_samples=0 if chosen is None else len(chosen.samples),
        context_tokens=0 if chosen is None else chosen.tokens,
        guard=made.guard,
        code_size=None if code is None else len(code.data),
        code_squared_error=None if code is None else code.squared_error,
    )


def _generator_with_start(store: Store, base_model: str | None) -> Generator:
    """Return the current generator that has a few-shot start; there must be exactly one."""
    bases = sorted({one.base_model for one in store.generators(base_name(store, base_model))})
    current = [one for one in map(store.generator, bases) if one is not None]
    if not current:
        of_it = "" if base_model is None else f" for {base_model}"
        hint = "run `icm train`, then `icm train --few-shot`"
        if store.generators():
            hint = f"run `icm generators` to list generators of other base models; {hint}"
        raise DataError(f"there is no generator{of_it}", hint=hint)
    found = [row for row in current if row.start is not None]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(row.base_model for row in found)
        raise DataError(f"there are generators for several base models: {names}", hint="choose one with --base-model")
    fact = f"the generator of {current[0].base_model} has no few-shot start"
    raise DataError(fact, hint="run `icm train --few-shot` to train one; codes do not change")


def _load_base(
    context: Context, store: Store, label: str, device: torch.device, options: GenerateOptions, data: bytes | None
) -> tuple[BaseModel, Examples, tuple[TaskVector, ...]]:
    """Load the base model, and extract context vectors in the precision of all task vectors."""
    base = open_base(store, label, device, VECTOR_DTYPE, cache=context.cache)
    if data is not None:
        examples = examples_for(base, data, path=options.samples, most=options.count)
    elif not base.modality.takes_context:
        raise DataError(f"{label} is a {base.modality.name}, which cannot write samples", hint="specify --samples")
    else:
        context.progress(0, None, "writing samples with the base model")
        examples = Examples(plain(described_samples(base, str(options.description), options.count, SAMPLE_TOKENS)))
    vectors = extract_context(base, examples.items, template=examples.template)
    if base.load_in is None and gradient_dtype(device) is not VECTOR_DTYPE:
        del base  # a device may have no room for two copies
        base = open_base(store, label, device, gradient_dtype(device), cache=context.cache)
    return base, examples, vectors


def _familiarity(store: Store, generator: Generator, vectors: Sequence[TaskVector]) -> Familiarity | None:
    """Compare a new task with the known ones by their context vectors; None if fewer than three are comparable."""
    of_base = store.tasks(Selection(base_model=generator.base_model))
    tasks = [task for task in of_base if not task.final.is_generated]
    known = comparable_vectors(store, tasks, "context")
    if len(known.vectors) < MIN_TASKS or known.extractor != comparison_key(json.loads(vectors[0].extractor.to_json())):
        return None
    return familiarity(_mean(vectors).numpy(), known.vectors)


def _mean(vectors: Sequence[TaskVector]) -> torch.Tensor:
    """Average the vectors of several support sets, shape (hidden,)."""
    return torch.stack([vector.values for vector in vectors]).mean(dim=0)


def _encode(
    context: Context,
    file: GeneratorFile,
    adapter: Adapter,
    vectors: Sequence[TaskVector],
    base: BaseModel,
    examples: Sequence[Any],
) -> Encoded:
    """Encode a generated adapter coarsely, and refine the code on the samples."""
    codec = file.codec_for(adapter.layout)
    coarse = encode_adapter(codec, adapter, {"context": _mean(vectors)}, limits=Limits(tolerance=_CODE_TOLERANCE))
    refiner = Refiner.of(base, adapter, examples, RefineConfig())
    code = TrialCode(refiner, codec, adapter, coarse)
    return refine_all([code], lambda note: context.progress(0, None, note))[0].encoded


def _generated_task(
    store: Store,
    generator: Generator,
    name: str,
    note: str | None,
    content: AdapterBytes,
    vectors: Sequence[TaskVector],
    code: Encoded,
    files: Mapping[str, bytes],
) -> Task:
    """Store the code of a generated adapter with everything it needs, and return its task, without weights."""

    def put(data: bytes) -> File:
        return File(store.blobs.put(data), len(data))

    weights = File(hashlib.sha256(content.weights).hexdigest(), len(content.weights))
    final = new_adapter(
        PEFT.inspect(content.config, content.weights),
        weights=weights,
        config=put(content.config),
        card=None if content.card is None else put(content.card),
        source=f"generated {name}",
    )
    final = replace(final, is_generated=True, evicted_at=now(), extras=kept_files(store.blobs, files))
    made = Code(blob=put(code.data), generator=generator.blob, squared_error=code.squared_error)
    vectors_kept = put_vectors(store, vectors)
    return Task(name=name, base_model=generator.base_model, final=final, note=note, vectors=vectors_kept, code=made)
