"""The public face of a fleet: one method per use case, each a call into the file of that name.

A method imports what it needs when it is called, so that `import icmlora` and listing tasks never load torch. The
methods that list and maintain a store are in `icmlora.fleet.api_store`, those that delete originals and bring adapters
back in `icmlora.fleet.api_originals`; `Fleet` inherits them.
"""

from __future__ import annotations

from icmlora.fleet.api_originals import FleetOriginals
from icmlora.fleet.bundles.export import export_bundle
from icmlora.fleet.bundles.import_ import import_bundle
from icmlora.fleet.encode.encode import encode
from icmlora.fleet.few_shot.generate import generate
from icmlora.fleet.few_shot.train import check_few_shot, train_few_shot
from icmlora.fleet.ingest.ingest import ingest
from icmlora.fleet.measure.evaluate import evaluate, measurable
from icmlora.fleet.measure.module_errors import module_errors
from icmlora.fleet.train.train import train
from icmlora.fleet.train.update import update
from icmlora.fleet.vectors.recognize import recognize
from icmlora.fleet.vectors.vectors import extract_vectors
from icmlora.fleet.write.materialize import load, load_many, materialize, read_files


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

    ingest = ingest

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
