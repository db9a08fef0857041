"""Keep a generated task: its code and its vector, and no weights beside them.

adapter ──encode, refine──▶ code ────────┐
written folder ──▶ configuration, card ──┼──▶ a task without an original, with its code and its vectors: one transaction
samples ──base──▶ vectors ───────────────┘

An adapter for a task that was never ingested, from some of its samples.

samples ──base──▶ context vector ──▶ how far from the known tasks
   └──base + start──▶ evidence ──steps──▶ adapter ──(gradient steps)──▶ PEFT folder (──▶ store: vector and code)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icmlora.adapter.canonical import truncated
from icmlora.adapter.model import Adapter
from icmlora.base_models.catalogue import read_examples
from icmlora.base_models.examples import spread
from icmlora.base_models.factors import added, factors_of
from icmlora.base_models.modality import BaseModel, Prepared
from icmlora.errors import Cancelled, DataError, NotCovered
from icmlora.fewshot.adapt import adapt, supports
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from icmlora.fewshot.start import FewShotStart
from icmlora.fleet.cards import GeneratedCard
from icmlora.fleet.context import Context, Event, Progress, StopFlag
from icmlora.fleet.loading import open_base
from icmlora.fleet.meta_train import SAMPLE_TOKENS, read_fewshot_start
from icmlora.fleet.search import Refiner
from icmlora.fleet.stored_vectors import canonical_json, comparable_vectors
from icmlora.fleet.vectors import VECTOR_DTYPE, put_vectors
from icmlora.formats.peft import CARD_NAME, CONFIG_NAME, PEFT, WEIGHTS_NAME, save_adapter
from icmlora.generator.encoding import Encoded
from icmlora.generator.versions import GeneratorFile
from icmlora.io.devices import gradient_dtype, resolve_device
from icmlora.io.files import read_regular
from icmlora.io.staging import check_free
from icmlora.task_vectors.distances import FEWEST, Familiarity, familiarity
from icmlora.task_vectors.extraction import extract_context
from icmlora.task_vectors.vector import TaskVector
from icmlora.training.refinement import RefineConfig
from registry.bundles import BundleImport, ImportedTask
from registry.errors import TaskConflict, TaskNotFound
from registry.names import check_name
from registry.records import GeneratorRecord, NewAdapter, NewGenerator

if TYPE_CHECKING:
    from registry.store import Store

_TOLERANCE = 0.7
"""A generated adapter does what it does in few directions: finer rounding without refinement is larger and worse."""


def check_unknown(store: Store, name: str) -> None:
    """Check that a task can be registered under a name.

    Raises:
        TaskConflict: The store has a task of that name.
    """
    try:
        known = store.tasks.get(name)
    except TaskNotFound:
        return
    raise TaskConflict(known.name, choices=None)


def code_for(
    generator_file: GeneratorFile,
    adapter: Adapter,
    vectors: Sequence[TaskVector],
    base: BaseModel,
    samples: Sequence[Any],
    stop: StopFlag,
) -> Generator[Event, None, Encoded | None]:
    """Make the code of a generated adapter, a coarse one that is refined on the samples; None where the user stopped.

    Raises:
        NotCovered: Its rank is above what any version of the generator covers.
    """
    codec = generator_file.codec_for(adapter.layout)
    mean = {"context": torch.stack([vector.values for vector in vectors]).mean(dim=0)}
    coarse = codec.encode(adapter, mean, tolerance=_TOLERANCE)
    yield Progress(0, None, "refining its code")

    def tell(note: str) -> None:
        if stop.requested:
            raise Cancelled

    try:
        return Refiner(base, samples, RefineConfig()).refine(codec, adapter, coarse, tell)
    except Cancelled:
        return None


def register(
    store: Store,
    generator: GeneratorRecord,
    name: str,
    folder: Path,
    vectors: Sequence[TaskVector],
    code: Encoded,
) -> None:
    """Record the task of a written folder, which is what the code stands in for.

    Args:
        store: The open store.
        generator: The current generator.
        name: What the task is called.
        folder: The adapter as it was written.
        vectors: What the base model says of its samples.
        code: Under that generator.

    Raises:
        TaskConflict: The store has another task of that name by now.
        GeneratorConflict: Another generator is current by now.
    """
    config, weights = (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()
    card = store.blobs.put((folder / CARD_NAME).read_bytes())
    summary = PEFT.inspect(config, weights, path=folder)
    original = NewAdapter(
        weights=hashlib.sha256(weights).hexdigest(),
        config=store.blobs.put(config),
        card=card,
        step=None,
        is_final=True,
        dtype=summary.dtype,
        rank_max=summary.rank_max,
        parameters=summary.parameters,
        target_modules=summary.target_modules,
        layout=summary.layout,
        source=f"generated {name}",
        is_generated=True,
    )
    rows = put_vectors(store, name, vectors)
    blob = store.blobs.put(code.data)
    task = ImportedTask(name, original, len(weights), blob, code.dw_error, vectors=rows)
    present = NewGenerator(generator.base_model, generator.blob, generator.config, generator.metrics)
    store.bundles.add(BundleImport(present, generator.version, [task]))


_DATA_LIMIT = 64 << 20
_BATCH = 8
"""Samples a pass on an accelerator."""


@dataclass(frozen=True)
class GenerateRequest:
    """What `icm generate` was asked for."""

    name: str
    samples: Path
    directory: Path
    count: int
    """Samples that are read; fewer if there are fewer."""
    description: str | None = None
    refine: int = 0
    """Gradient steps after the generated point."""
    rank: int | None = None
    """Of what is written; that of the fleet's widest adapter where it is None."""
    base_model: str | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    register: bool = False
    force: bool = False


@dataclass(frozen=True)
class _Facts:
    """What is known of an adapter before it is written.

    Attributes:
        samples: How many samples were read.
        reaching: How many of them reach `SAMPLE_TOKENS`, which is all that is read of one.
        base_nats: Loss of the base model on these very samples, in nats per token.
        nats: Of the adapter, likewise: it has seen them, so on other text of the task it gains less.
        known: How far the task lies from the known ones; None where too few of them can be compared.
        rank: Its largest.
    """

    samples: int
    reaching: int
    base_nats: float
    nats: float
    known: Familiarity | None
    rank: int


@dataclass(frozen=True)
class Generated(_Facts):
    """What was made.

    Attributes:
        weights: SHA-256 of the written weights.
        code_size: Bytes of the code that was registered, None without registering.
        code_error: Its relative dW error.
    """

    task: str
    directory: Path
    base_model: str
    generator: str
    weights: str
    code_size: int | None
    code_error: float | None


def generate(context: Context, request: GenerateRequest, stop: StopFlag) -> Generator[Event, None, Generated | None]:
    """Make an adapter for an unseen task; the folder appears whole or not at all, and a task after its folder.

    Returns:
        What was made, or None if the user stopped; then nothing is written.

    Raises:
        DeviceUnavailable: The device is not there.
        InvalidName: A name outside the rule.
        DataError: Samples that cannot be used, or a generator that has no start.
        OutputExists: The folder is not empty and `force` is not given.
        BaseModelNotFound: The base model is not on this machine.
        TaskConflict: It is to be registered, and its name is taken.
        NotCovered: It is to be registered, and no code of the generator has the rank that is asked for.
    """
    device = resolve_device(request.device)
    check_name(request.name)
    check_free(request.directory, force=request.force)
    examples = _chosen(request)
    with context.open() as store:
        if request.register:
            check_unknown(store, request.name)
        generator = _generator(store, request.base_model)
        generator_file = GeneratorFile(store.blobs.read(generator.blob))
        start = read_fewshot_start(store, generator, generator_file)
        rank = _rank(generator_file, start, request)
        yield Progress(0, None, f"loading {generator.base_model}")
        base, vectors = _opened(store, generator.base_model, device, examples, context.cache)
        samples = base.modality.prepare(base, examples, SAMPLE_TOKENS)
        adapter = None if stop.requested else (yield from _adapted(base, start, samples, rank, request, stop))
        if adapter is None:
            return None
        facts = _Facts(
            samples=len(examples),
            reaching=sum(sample.size == SAMPLE_TOKENS for sample in samples),
            base_nats=_nats(base, None, examples),
            nats=_nats(base, adapter, examples),
            known=_familiarity(store, generator, vectors),
            rank=max(shape.rank for shape in adapter.layout),
        )
        code = None
        if request.register:
            code = yield from code_for(generator_file, adapter, vectors, base, examples, stop)
        if stop.requested:
            return None
        weights = _write(adapter, generator, facts.samples, request)
        if code is not None:
            register(store, generator, request.name, request.directory, vectors, code)
    return Generated(
        **vars(facts),
        task=request.name,
        directory=request.directory,
        base_model=generator.base_model,
        generator=generator.blob,
        weights=weights,
        code_size=None if code is None else len(code.data),
        code_error=None if code is None else code.dw_error,
    )


def _chosen(request: GenerateRequest) -> list[Any]:
    data = read_regular(request.samples, max_bytes=_DATA_LIMIT)
    return spread(read_examples(data, path=request.samples), request.count)


def _generator(store: Store, base_model: str | None) -> GeneratorRecord:
    current = [row for row in store.generators.all(base_model) if row.is_current]
    if not current:
        of_it = "" if base_model is None else f" of {base_model}"
        hint = "`icm train --objective both` makes one that generates"
        if store.generators.all():
            hint = f"`icm generators` lists those of other base models; {hint}"
        raise DataError(f"there is no generator{of_it}", hint=hint)
    started = [row for row in current if row.start is not None]
    if not started:
        fact = f"the generator of {current[0].base_model} has not learned where unseen tasks start"
        raise DataError(fact, hint="`icm train --objective functional` learns it, and leaves all codes as they are")
    if len(started) > 1:
        names = ", ".join(row.base_model for row in started)
        raise DataError(f"there are generators of several base models: {names}", hint="choose one with --base-model")
    return started[0]


def _rank(generator_file: GeneratorFile, start: FewShotStart, request: GenerateRequest) -> int:
    """Return the rank to write: what is asked for, else the largest that a code of the start's modules can have."""
    most = max(generator_file.configs[number].slots for number in generator_file.covering(start.adapter.layout))
    if request.register and request.rank is not None and request.rank > most:
        fact = f"codes of the generator have ranks up to {most}, and {request.rank} is asked for"
        raise NotCovered(fact, hint=f"--rank {most}, or write the folder alone, without --register")
    return most if request.rank is None else request.rank


def _opened(
    store: Store, label: str, device: torch.device, samples: Sequence[Any], cache: Path
) -> tuple[BaseModel, tuple[TaskVector, ...]]:
    """Load the base model, and read the samples in the precision in which vectors of all tasks are made."""
    base = open_base(store, label, device, VECTOR_DTYPE, cache=cache)
    vectors = extract_context(base, samples)
    if gradient_dtype(device) is not VECTOR_DTYPE:
        del base  # one copy of it at a time
        base = open_base(store, label, device, gradient_dtype(device), cache=cache)
    return base, vectors


def _adapted(
    base: BaseModel,
    start: FewShotStart,
    samples: Sequence[Prepared],
    rank: int,
    request: GenerateRequest,
    stop: StopFlag,
) -> Generator[Event, None, Adapter | None]:
    """Return the adapter at the rank that is written, or None if the user stopped."""
    batch = 1 if base.device.type == "cpu" else _BATCH
    adapter, steps = start.adapter, len(supports(samples, len(start.rates)))
    for done, adapted in enumerate(adapt(base, start, samples, batch_size=batch), start=1):
        adapter = adapted.adapter
        yield Progress(done, steps, "adapting")
        if stop.requested:
            return None
    adapter = truncated(adapter, rank)
    if request.refine:
        for done, (nats, refined) in enumerate(finetune(base, adapter, samples, FinetuneConfig(request.refine)), 1):
            adapter = refined
            yield Progress(done, request.refine, f"refining, {nats:.3f} nats per token")
            if stop.requested:
                return None
    return adapter


def _write(adapter: Adapter, generator: GeneratorRecord, samples: int, request: GenerateRequest) -> str:
    """Write the folder and return the digest of its weights."""
    card = GeneratedCard(request.name, generator.base_model, generator, samples, request.refine, request.description)
    folder = request.directory
    save_adapter(adapter, folder, dtype=request.dtype, card=card.text(), metadata=card.metadata(), force=request.force)
    return hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()


def _nats(base: BaseModel, adapter: Adapter | None, examples: Sequence[Any]) -> float:
    with added(base.model, {} if adapter is None else factors_of(adapter)):
        return base.modality.measure(base, examples, SAMPLE_TOKENS).value


def _familiarity(store: Store, generator: GeneratorRecord, vectors: Sequence[TaskVector]) -> Familiarity | None:
    rows = [row for row in store.tasks.summaries() if row.task.base_model == generator.base_model]
    tasks = [row.task for row in rows if not row.final.is_generated]
    known = comparable_vectors(store, tasks, "context")
    if len(known.vectors) < FEWEST or known.extractor != canonical_json(json.loads(vectors[0].extractor.to_json())):
        return None
    return familiarity(torch.stack([vector.values for vector in vectors]).mean(dim=0).numpy(), known.vectors)
