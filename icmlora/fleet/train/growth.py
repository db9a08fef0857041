"""Add the new tasks of one base model to its generator; earlier tasks are neither read nor changed.

    new tasks ──candidates──▶ the smallest ─┬─ same file: codes of the new tasks
                                            └─ longer file: a new generator, which decodes the codes of all tasks

Either is published in one transaction; until it commits, nothing has changed. The codes made until then are kept in a
training run, and an interrupted update continues from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from icmlora.errors import DataError, GeneratorError
from icmlora.fleet.context import Context
from icmlora.fleet.train.candidates import UpdateCandidates
from icmlora.fleet.train.publish import publish, put_files
from icmlora.fleet.train.report import CodeMade, Updated
from icmlora.fleet.train.run import TrainingRun, TrainOptions, run_metrics, usable_source
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.generator.config import tolerance_of
from registry.filters import Selection
from registry.manifests import CodeLimits, Generator

if TYPE_CHECKING:
    from registry.store import Store


def update_base(
    context: Context, store: Store, label: str, device: torch.device, options: TrainOptions
) -> tuple[Updated, Sequence[CodeMade]]:
    """Encode the new tasks of one base model, and publish their codes."""
    started = time.monotonic()
    generator = store.generator(label)
    if generator is None:
        hint = f"run `icm train --base-model {label}` to train the first one"
        raise DataError(f"{label} has no generator to add tasks to", hint=hint)
    data = store.blobs.read(generator.blob)
    present = GeneratorFile(data)
    tasks = (task for task in store.tasks(Selection(base_model=label)) if task.code_under(generator) is None)
    source = usable_source(context, store, label, tasks)
    # By default as in the generator's first training.
    tolerance = present.configs[0].tolerance if options.quality is None else tolerance_of(options.quality)
    identity: dict[str, object] = {"update": str(generator.blob), "tolerance": tolerance, "fleet": source.digest()}
    run = TrainingRun.open(store, label, identity, resume=options.resume) if source.names else None
    candidates = UpdateCandidates(context, store, source, device, run, tolerance, options)
    best = candidates.best(data)
    metrics: dict[str, object] = {
        "steps": candidates.steps,
        "update_seconds": round(time.monotonic() - started, 3),
        **run_metrics(device),
    }
    file, decodes = GeneratorFile(best.data), frozenset[str]()
    if best.data != data:
        if file.digests[: len(present.digests)] != present.digests:
            raise GeneratorError("the generator file does not continue the earlier one")
        (blob,) = put_files(store, [best.data])
        generator = Generator(
            base_model=label,
            blob=blob,
            start=generator.start,  # its mean is a code as others are
            trained_from=str(generator.blob),
            config=json.loads(file.configs[-1].to_json()),
            metrics=metrics,
        )
        decodes = frozenset(present.digests)
    asked, ends_run = CodeLimits(tolerance=tolerance), run is not None
    published = publish(store, source, generator, best.codes, asked, decodes=decodes, ends_run=ends_run)
    left_out = {name: reason for name, reason in candidates.left_out.items() if name not in best.codes}
    updated = Updated(
        base_model=label,
        version=published.generator.version,
        generator=str(generator.blob),
        generator_size=len(best.data),
        epochs=len(file.digests),
        added=candidates.added,
        tasks=list(published.codes),
        codes_size=sum(len(code.data) for code in published.codes.values()),
        kept_size=candidates.kept_size,
        tuned_size=candidates.tuned_size,
        metrics=metrics,
        left_out=left_out | published.left_out,
        replaced_bytes=published.replaced_bytes,
    )
    made = [CodeMade(name, len(code.data), code.squared_error) for name, code in published.codes.items()]
    return updated, made
