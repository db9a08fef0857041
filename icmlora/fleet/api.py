"""The public face of a fleet: one method per use case, each a call into the file of that name.

A method imports what it needs when it is called, so that `import icmlora` and listing tasks never load torch. The
methods that list and maintain a store are in `icmlora.fleet.api_store`, those that delete originals and bring adapters
back in `icmlora.fleet.api_originals`; `Fleet` inherits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.api_originals import FleetOriginals
from icmlora.fleet.bundles.export import export_bundle
from icmlora.fleet.bundles.import_ import import_bundle
from icmlora.fleet.encode.encode import encode
from icmlora.fleet.few_shot.generate import generate
from icmlora.fleet.few_shot.train import check_few_shot, train_few_shot
from icmlora.fleet.measure.evaluate import evaluate, measurable
from icmlora.fleet.measure.module_errors import module_errors
from icmlora.fleet.train.train import train
from icmlora.fleet.train.update import update
from icmlora.fleet.vectors.recognize import recognize
from icmlora.fleet.vectors.vectors import extract_vectors
from icmlora.fleet.write.materialize import load, load_many, materialize, read_files

if TYPE_CHECKING:
    from icmlora.fleet.ingest.ingest import Conflict, IngestReport


class Fleet(FleetOriginals):
    """The tasks of a store, and everything that can be done with them.

        fleet = Fleet("store", on_event=print)
        fleet.ingest(["loras"])
        fleet.train(device="cuda")
        fleet.materialize("dog-detection", "adapter")

    A device is "auto", "cpu", "cuda", "cuda:N" or "mps". The methods do not repeat these errors: `StoreNotFound`;
    `StoreLocked`, if another process uses the store or works on the same base model; `TaskNotFound`, before anything
    changes; `DeviceUnavailable`; and `Cancelled`, whose `report` holds what was finished.

    `workers` is None to compute in this process, `"4"` for four processes on this machine, or `"ray://HOST:PORT"` for a
    Ray cluster whose machines have the store, the base models and icm at the same paths; `WorkersUnavailable` is raised
    without one. `shard` is None for all tasks, or `"3/8"` for the third of eight parts: several processes, each with a
    part of its own, may work on one store at the same time.

    Args:
        path: The store folder.
        cache: Folder for files that can be created again (base models converted from GGUF), or a function that
            returns it; by default `icm` in the Hugging Face home.
        lock_timeout: Seconds to wait for other processes, in one call.
        command: What this process does, as others see it when they have to wait.
        on_event: Called with a `Progress` after each unit of work, and with each result. To stop, raise `Cancelled`
            in it: what was finished is kept.
    """

    module_errors = module_errors

    # ingest, vectors

    def ingest(
        self,
        paths: Sequence[str | Path],
        *,
        name: str | None = None,
        name_from: str | None = None,
        samples: str | Path | None = None,
        base_model: str | None = None,
        texts: bool = True,
        strict: bool = False,
        on_conflict: Conflict = "fail",
        restore: bool = False,
        read_bin: bool = False,
        initial: str | Path | None = None,
        dry_run: bool = False,
    ) -> IngestReport:
        """Take adapters into the store, which is created if necessary. Ingesting the same again changes nothing.

        What cannot be taken is in the report's `problems` and does not stop the rest. A base model under a new label,
        such as a known mirror, is joined to the one that the store has; these labels are in `joined`.

        Args:
            paths: Adapters in any format of `icm formats`, training runs with checkpoint-N folders, or folders of those
                at any depth.
            name: Name for the task, if exactly one is found. By default a task is named after its folder.
            name_from: Pattern for the names, such as `{parent}-{name}`; see `icm ingest --help`.
            samples: Samples for the task as JSON lines, if exactly one is found. By default the `samples.jsonl` next
                to its adapter.
            base_model: Base model of the adapters that name none. A task that was ingested without one gets it.
            texts: Also ingest the `samples.jsonl` and `eval.jsonl` found next to adapters.
            strict: Check everything first, and store nothing if anything cannot be taken.
            on_conflict: If the store has a task of that name with another adapter: `skip`, `replace` or `fail`.
            restore: Bring evicted originals back. By default they stay evicted.
            read_bin: Also read weights that are a pickle, `adapter_model.bin`, in a process of its own with limits;
                the store keeps them as safetensors.
            initial: Folder with the weights that a PiSSA, OLoRA or CorDA adapter began with. By default `pissa_init`,
                `olora_init` or `corda_init` in or next to its folder.
            dry_run: Check everything and report what would change, but write nothing.

        Raises:
            AdapterRefused: Nothing was found, or nothing could be taken; with `strict`, an input was refused.
            TaskConflict: The same, where a task has another adapter in the store and `on_conflict` is `fail`.
        """
        from icmlora.base_models.finding.labels import typed_label
        from icmlora.fleet.ingest.ingest import IngestRequest, ingest

        found, given = tuple(map(Path, paths)), None if samples is None else Path(samples)
        told = None if base_model is None else typed_label(base_model)
        began = None if initial is None else Path(initial).resolve()
        request = IngestRequest(
            found, name, name_from, given, told, texts, strict, on_conflict, restore, dry_run, read_bin, began
        )
        return ingest(self._context, request)

    extract_vectors = extract_vectors

    # train, update, encode

    train = train

    update = update

    encode = encode

    # evaluate

    evaluate = evaluate

    measurable = measurable

    # materialize, bundles

    materialize = materialize

    read_files = read_files

    load = load

    load_many = load_many

    export_bundle = export_bundle

    import_bundle = import_bundle

    # recognize, generate

    recognize = recognize

    check_few_shot = check_few_shot

    train_few_shot = train_few_shot

    generate = generate
