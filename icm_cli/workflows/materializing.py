"""Write one task's adapter as a PEFT folder: from its original bytes, from its code, or from its task vectors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icm_cli.workflows.model_card import Provenance, card_text
from icm_cli.workflows.opening import Place
from icmlora.errors import DataError
from icmlora.peft_names import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from registry.records import AdapterRecord, CodeRecord, EvaluationRecord, GeneratorRecord

if TYPE_CHECKING:
    from icmlora.adapter import Adapter
    from registry.store import Store

Source = Literal["auto", "original", "code", "generate"]
Rung = Literal["original", "code", "generate"]


@dataclass(frozen=True)
class MaterializeRequest:
    """What `icm materialize` was asked for."""

    task: str
    directory: Path
    source: Source = "auto"
    dtype: str = "bfloat16"
    seed: int | None = None
    force: bool = False
    max_error: float | None = None


@dataclass(frozen=True)
class Materialized:
    """What was written."""

    task: str
    directory: Path
    rung: Rung
    generator: str | None
    dw_error: float | None
    retained_gain: float | None
    weights: str | None
    """SHA-256 of the written weights."""


class TooLossy(DataError):
    """The adapter would lose more than was allowed; nothing was written."""


def materialize(place: Place, request: MaterializeRequest) -> Materialized:
    """Write an adapter; the folder appears complete or not at all, and the same request gives the same bytes.

    Raises:
        TaskNotFound: No such task.
        DataError: The source that was asked for is not there.
        TooLossy: Above `max_error`.
        OutputExists: The folder is not empty and `force` is not given.
    """
    with place.open(read_only=True) as store:
        return write_rung(store, request)


def write_rung(store: Store, request: MaterializeRequest) -> Materialized:
    """Do what `materialize` does, in a store that is open already."""
    task, final = store.task(request.task), store.final_adapter(request.task)
    generator = store.current_generator(task.base_model)
    code = None if generator is None else store.code(task.name, generator.id)
    rung = _choose(request, code, generator)
    if rung == "original" or generator is None:
        return _write_original(store, task.name, final, request)
    error = code.dw_error if rung == "code" and code is not None else None
    if request.max_error is not None and (error is None or error > request.max_error):
        fact = "is not known" if error is None else f"is {error:.4f}"
        hint = "`--source original`, or `icm train` with a higher --quality"
        raise TooLossy(f"the relative dW error of {task.name!r} {fact}; {request.max_error} is allowed", hint=hint)
    adapter = _decode(store, task.name, final, code if rung == "code" else None, generator, request.seed)
    gain = _gain(store.evaluations(task.name), rung, generator)
    provenance = Provenance(task.name, task.base_model, rung, generator, error, gain, request.seed)
    return _write(adapter, provenance, request)


def _choose(
    request: MaterializeRequest, code: CodeRecord | None, generator: GeneratorRecord | None
) -> Rung:
    """Return the best rung that is there; `auto` gives the original back as long as the store has it."""
    if request.source == "auto":
        return "original" if request.seed is None else "generate"
    if request.source == "code" and code is None:
        raise DataError(f"task {request.task!r} has no code", hint="`icm train` makes it")
    if request.source == "generate" and generator is None:
        raise DataError(f"there is no generator for task {request.task!r}", hint="`icm train` makes it")
    return request.source


def _decode(
    store: Store,
    task: str,
    final: AdapterRecord,
    code: CodeRecord | None,
    generator: GeneratorRecord,
    seed: int | None,
) -> Adapter:
    # torch is imported here: writing an original back needs none.
    from icm_cli.workflows.store_fleet import mean_vectors
    from icmlora.generator.codec import Codec
    from icmlora.generator.generator_file import generator_from_bytes
    from icmlora.layout import ModuleShape

    codec = Codec(generator_from_bytes(store.read_blob(generator.blob)))
    if code is not None:
        return codec.decode(store.read_blob(code.blob))
    vectors = mean_vectors(store, store.vectors(task))
    if not vectors:
        raise DataError(f"task {task!r} has no task vector", hint="`icm vectors` makes it")
    layout = [ModuleShape(*entry) for entry in final.layout]
    return codec.generate(vectors, layout, task_type="CAUSAL_LM", seed=seed)


def _write(adapter: Adapter, provenance: Provenance, request: MaterializeRequest) -> Materialized:
    from icmlora.peft_folder import save_adapter

    save_adapter(
        adapter,
        request.directory,
        dtype=request.dtype,
        card=card_text(provenance),
        metadata=provenance.metadata(),
        force=request.force,
    )
    digest = hashlib.sha256((request.directory / WEIGHTS_NAME).read_bytes()).hexdigest()
    p = provenance
    return Materialized(p.task, request.directory, p.rung, p.generator.blob, p.dw_error, p.retained_gain, digest)


def _write_original(store: Store, task: str, final: AdapterRecord, request: MaterializeRequest) -> Materialized:
    from icmlora.output_folder import write_folder

    files = {WEIGHTS_NAME: store.read_blob(final.weights)}
    if final.card is not None:
        files[CARD_NAME] = store.read_blob(final.card)
    # Last: the configuration is what makes a folder an adapter.
    files[CONFIG_NAME] = store.read_blob(final.config)
    write_folder(request.directory, files, force=request.force)
    return Materialized(task, request.directory, "original", None, 0.0, 1.0, final.weights)


def _gain(evaluations: list[EvaluationRecord], rung: Rung, generator: GeneratorRecord) -> float | None:
    matching = [row for row in evaluations if row.rung == rung and row.generator_id == generator.id]
    return matching[-1].retained_gain if matching else None
