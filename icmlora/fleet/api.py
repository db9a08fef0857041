"""The public face of a fleet: every use case as a method. Each is the function of that name, and nothing in between.

Importing this imports torch and SQLAlchemy. A command imports only its own use case.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from icmlora.fleet.bases.base_models import (
    add_base_model,
    alias_base_model,
    forget_base_model,
    list_base_models,
    separate_labels,
)
from icmlora.fleet.bundles.export import export_bundle
from icmlora.fleet.bundles.import_ import import_bundle
from icmlora.fleet.context import Context, Event, default_cache, ignore
from icmlora.fleet.encode.encode import encode
from icmlora.fleet.evict.evict import evict
from icmlora.fleet.evict.restore import restore
from icmlora.fleet.few_shot.generate import generate
from icmlora.fleet.few_shot.task_context import remove_context, set_context, task_context
from icmlora.fleet.few_shot.train import train_few_shot
from icmlora.fleet.ingest.ingest import ingest
from icmlora.fleet.map.map import map_fleet
from icmlora.fleet.measure.evaluate import evaluate, measurable
from icmlora.fleet.measure.module_errors import module_errors
from icmlora.fleet.report.report import write_report
from icmlora.fleet.stats.stats import stats
from icmlora.fleet.tasks.copies import copy_tasks
from icmlora.fleet.tasks.described import find_described
from icmlora.fleet.tasks.details import show_task
from icmlora.fleet.tasks.doctor import examine
from icmlora.fleet.tasks.duplicates import find_duplicates
from icmlora.fleet.tasks.editing import edit_tasks, plan_removal, remove_tasks
from icmlora.fleet.tasks.generators import list_generators, rollback
from icmlora.fleet.tasks.init import init
from icmlora.fleet.tasks.listing import list_tags, list_tasks
from icmlora.fleet.tasks.log import list_versions
from icmlora.fleet.tasks.verify import prune, rebuild_database, repair_files, verify
from icmlora.fleet.train.train import train
from icmlora.fleet.train.update import update
from icmlora.fleet.vectors.recognize import recognize
from icmlora.fleet.vectors.vectors import extract_vectors
from icmlora.fleet.write.materialize import load, load_many, materialize, read_files
from icmlora.fleet.write.merge import merge
from registry.names import DatabaseUrl, address_of


class Fleet:
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
        store: The store folder, or the address of a database such as `postgresql://HOST/DATABASE`.
        cache: Folder for files that can be created again (base models converted from GGUF), or a function that
            returns it; by default `icm` in the Hugging Face home.
        lock_timeout: Seconds to wait for other processes, in one call.
        command: What this process does, as others see it when they have to wait.
        on_event: Called with a `Progress` after each unit of work, and with each result. To stop, raise `Cancelled`
            in it: what was finished is kept.
    """

    def __init__(
        self,
        store: str | Path | DatabaseUrl,
        *,
        cache: str | Path | Callable[[], Path] = default_cache,
        lock_timeout: float = 30.0,
        command: str = "icm",
        on_event: Callable[[Event], None] = ignore,
    ) -> None:
        cache = Path(cache) if isinstance(cache, str) else cache
        self.context = Context(address_of(store), cache, lock_timeout, command, on_event)

    @property
    def path(self) -> Path:
        """The folder of the store; raises `DataError` if it is in a database."""
        return self.context.path

    # From adapters to codes and back.
    init = init
    ingest = ingest
    extract_vectors = extract_vectors
    train = train
    update = update
    encode = encode
    evaluate = evaluate
    measurable = measurable
    materialize = materialize
    read_files = read_files
    load = load
    load_many = load_many

    # List, show and edit tasks.
    tasks = list_tasks
    show = show_task
    versions = list_versions
    module_errors = module_errors
    edit = edit_tasks
    tags = list_tags
    stats = stats
    task_map = map_fleet
    duplicates = find_duplicates
    report = write_report

    # Base models.
    base_models = list_base_models
    add_base_model = add_base_model
    forget_base_model = forget_base_model
    alias_base_model = alias_base_model
    separate_base_model = separate_labels

    # New adapters.
    recognize = recognize
    find_described = find_described
    train_few_shot = train_few_shot
    generate = generate
    set_context = set_context
    task_context = task_context
    remove_context = remove_context
    merge = merge

    # Use codes elsewhere.
    export_bundle = export_bundle
    import_bundle = import_bundle
    copy = copy_tasks

    # Delete, restore and check.
    evict = evict
    restore = restore
    plan_removal = plan_removal
    remove = remove_tasks
    prune = prune
    verify = verify
    repair = repair_files
    rebuild_database = rebuild_database
    generators = list_generators
    rollback = rollback
    doctor = examine
