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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import Examples
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.errors import DataError, NotCovered
from icmlora.fewshot.context_choice import MAX_TOKENS
from icmlora.fewshot.guard import Guard
from icmlora.fewshot.start import FewShotStart
from icmlora.fleet.context import Context, base_name, has_loaders, use_case
from icmlora.fleet.encode.refiner import Refiner, TrialCode, refine_all
from icmlora.fleet.few_shot.from_samples import Recipe, Source, make_from
from icmlora.fleet.few_shot.start import read_few_shot_start
from icmlora.fleet.few_shot.task_context import kept_files
from icmlora.fleet.few_shot.train import SAMPLE_TOKENS
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
from registry.manifests import Code, File, Generator, Task, now, relative_error
from registry.names import check_name, check_note, split_label

if TYPE_CHECKING:
    from registry.store import Store

# A generated adapter has few directions that matter: finer rounding without refinement is larger and worse.
_CODE_TOLERANCE = 0.7


@dataclass(frozen=True)
class Generated:
    """A generated adapter."""

    task: str
    directory: Path
    base_model: str
    generator: str
    samples: int
    reaching: int  # samples with `SAMPLE_TOKENS` tokens or more, of which only these are read
    base_nats: float  # loss of the base model on the samples, in nats per token
    nats: float  # loss of the base model with the adapter
    known: Familiarity | None  # how far the task is from known ones; None if too few of them can be compared
    rank: int
    precision: str  # of the base model that read the samples, such as "float32" or "nf4"
    weights: str  # SHA-256 of the written weights
    is_described: bool  # whether the base model wrote the samples itself, from a description
    context_samples: int  # that the context is made of; 0 if there is none, or it is the description
    context_tokens: int
    guard: Guard | None  # what adapter and context are worth; None if that was not measured
    code_size: int | None  # bytes of the code that was registered; None without `register`
    code_squared_error: float | None

    @property
    def code_relative_error(self) -> float | None:
        """The relative error of that code."""
        return relative_error(self.code_squared_error)


@use_case
def generate(
    context: Context,
    name: str,
    samples: str | Path | None,
    directory: str | Path,
    *,
    count: int = 64,
    description: str | None = None,
    refine: int = 0,
    distil: int = 0,
    rank: int | None = None,
    base_model: str | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
    register: bool = False,
    context_tokens: int = MAX_TOKENS,
    force: bool = False,
) -> Generated:
    """Generate an adapter for a new task from a few samples of it, and write it as a PEFT folder with its context.

    Of 8 samples or more, 4 are held out to measure the adapter and the context, alone and together. Afterwards they are
    used too; with 32 or more, the adapter is not made again for them. Of fewer than 8, each is read after the others by
    the base model. A context that does not help by itself is not kept. The adapter is made for its context and is less
    effective without it; with `context_tokens=0` it is made for use without one. Needs the base model, and a
    generator with a few-shot start (`train_few_shot`).

    Args:
        context: The store.
        name: Name of the new task.
        samples: File of JSON lines with "text", or with "prompt" and "completion". None: the base model writes
            samples itself, from the description, which then is the context.
        directory: The folder to write.
        count: Number of samples to read, spread over the file, or to be written.
        description: What the task is, in a sentence; also for the model card, and the note of a registered task.
        refine: Gradient steps on the samples after generating.
        distil: Then gradient steps towards what the base model and the adapter predict with the samples in the prompt,
            which is not needed then: no context is kept.
        rank: Rank to write; by default the largest that a code can have.
        base_model: Which base model; needed only if several have a few-shot start.
        device: Where to compute.
        dtype: Number format of the weights: `bfloat16`, `float16` or `float32`.
        register: Also keep the task in the store, by a code and its task vectors; weights are not stored.
        context_tokens: Tokens of the context at most; 0 for none, and then nothing is measured.
        force: Replace the folder if it is not empty.

    Returns:
        The written adapter, its loss on the samples, and the nearest known tasks.

    Raises:
        DataError: There are neither samples nor a description, the samples cannot be used, or no generator has a
            few-shot start.
        OutputExists: The folder is not empty and `force` is not given.
        TaskConflict: The task is to be registered, and its name is taken.
        NotCovered: The task is to be registered, and no code can have the rank.
    """
    place = resolve_device(device)
    path, folder = None if samples is None else Path(samples), Path(directory)
    check_name(name)
    check_free(folder, force=force)
    note = check_note(description) if description is not None and (register or path is None) else None
    with context.open() as store:
        source = Source.read(path, count, description, any_row=has_loaders())
        if register and (taken := store.find(name)) is not None:
            raise TaskConflict(taken.name, choices=None)
        generator = _generator_with_start(store, base_model)
        file = GeneratorFile(store.blobs.read(generator.blob))
        start = read_few_shot_start(store, generator, file)
        most = _largest_rank(file, start, rank if register else None)
        context.progress(0, None, f"loading {generator.base_model}")
        base, found, vectors = _load_base(context, store, generator.base_model, place, source)
        prepared = base.modality.prepare(base, found.items, SAMPLE_TOKENS)
        made = make_from(context, base, start, source, prepared, Recipe(rank or most, refine, distil, context_tokens))
        adapter, chosen = made.adapter, made.context
        base_nats, nats = (_nats(base, one, found.items) for one in (None, adapter))
        known = _familiarity(store, generator, vectors)
        code = _encode(context, file, adapter, vectors, base, found.items) if register else None
        context.progress(0, None, "writing the adapter")  # the last moment to stop: then the folder, then the task
        files = {} if chosen is None else chosen.context.files
        card = GeneratedCard(
            task=name,
            base_model=generator.base_model,
            generator=generator,
            samples=len(found.items),
            refined=refine,
            distilled=distil,
            description=description,
            guard=made.guard,
            has_context=bool(files),
            is_made_for_it=bool(files) and path is not None,
        )
        content = _encoded_files(adapter, card, dtype)
        write_adapter_files(folder, PEFT, replace(content, companions=files), folder.name, force=force)
        if code is not None:
            task = _generated_task(store, generator, name, content, vectors, code, files)
            _register(store, replace(task, note=note), folder)
    return Generated(
        task=name,
        directory=folder,
        base_model=generator.base_model,
        generator=generator.blob,
        samples=len(found.items),
        reaching=sum(sample.size == SAMPLE_TOKENS for sample in prepared),
        base_nats=base_nats,
        nats=nats,
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


def _largest_rank(file: GeneratorFile, start: FewShotStart, wanted: int | None) -> int:
    """Return the largest rank that a code can have; raise `NotCovered` if a wanted one is larger."""
    most = max(file.configs[number].slots for number in file.covering(start.adapter.layout))
    if wanted is not None and wanted > most:
        fact = f"codes of this generator have at most rank {most}, and rank {wanted} was requested"
        raise NotCovered(fact, hint=f"use --rank {most}, or leave out --register to write the folder only")
    return most


def _load_base(
    context: Context, store: Store, label: str, device: torch.device, source: Source
) -> tuple[BaseModel, Examples, tuple[TaskVector, ...]]:
    """Load the base model, and extract context vectors in the precision of all task vectors."""
    base = open_base(store, label, device, VECTOR_DTYPE, cache=context.cache)
    if source.data is None:
        context.progress(0, None, "writing samples with the base model")
    examples = source.examples(base)
    vectors = extract_context(base, examples.items, template=examples.template)
    if base.load_in is None and gradient_dtype(device) is not VECTOR_DTYPE:
        del base  # a device may have no room for two copies
        base = open_base(store, label, device, gradient_dtype(device), cache=context.cache)
    return base, examples, vectors


def _nats(base: BaseModel, adapter: Adapter | None, examples: Sequence[Any]) -> float:
    """Measure the loss on samples, in nats per token."""
    with added(base.model, {} if adapter is None else factors_of(adapter)):
        return base.modality.measure(base, examples, SAMPLE_TOKENS).value


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


def _encoded_files(adapter: Adapter, card: GeneratedCard, dtype: str) -> AdapterBytes:
    """Return the files of a generated adapter."""
    name, revision = split_label(card.base_model)
    adapter = replace(adapter, base_model=name, revision=revision)
    return PEFT.encode(adapter, dtype=dtype, card=card.text(), metadata=card.metadata())


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
    return Task(name=name, base_model=generator.base_model, final=final, vectors=vectors_kept, code=made)


def _register(store: Store, task: Task, folder: Path) -> None:
    """Publish a generated task whose folder is written."""
    try:
        store.publish([task])
    except RegistryError as error:
        error.hint = f"the adapter was written to {folder}; run the same command again with --force to register it"
        raise
