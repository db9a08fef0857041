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
from icmlora.fleet.context import Shard
from icmlora.fleet.few_shot.generate import generate
from icmlora.fleet.few_shot.train import check_few_shot, train_few_shot
from icmlora.fleet.measure.evaluate import measurable
from icmlora.fleet.measure.module_errors import module_errors
from icmlora.fleet.vectors.recognize import recognize
from icmlora.fleet.vectors.vectors import extract_vectors
from icmlora.fleet.write.materialize import load, load_many, materialize, read_files

if TYPE_CHECKING:
    from icmlora.fleet.encode.encode import EncodeReport
    from icmlora.fleet.ingest.ingest import Conflict, IngestReport
    from icmlora.fleet.measure.compare import MethodSummary
    from icmlora.fleet.measure.evaluate import EvaluateReport
    from icmlora.fleet.records import Rung
    from icmlora.fleet.train.train import TrainReport
    from icmlora.fleet.train.update import UpdateReport


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

    def train(
        self,
        *,
        device: str = "auto",
        base_model: str | None = None,
        quality: int | None = None,
        tolerance: float | None = None,
        width: int | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        resume: bool = True,
        fresh: bool = False,
    ) -> TrainReport:
        """Train one generator per base model on all its tasks, and store a code for every task.

        Training starts from the current generator if there is one. All originals are needed; after evicting some, use
        `update` to add tasks. The same call resumes a training that was stopped, and ends with the same generator.
        Codes are plain; `encode` refines them.

        Several processes of PyTorch's launcher train together. The first one writes to the store and returns the
        report; that of the others is empty.

        Args:
            device: Where to train.
            base_model: Train only the generator of this base model.
            quality: 1 (smallest codes) to 8 (most accurate); by default that of the current generator, at first 4.
            tolerance: The same as a number: the largest squared error, weighted by how sensitive each channel is.
            width: Hidden width of a new generator's decoder; by default it depends on the number of tasks.
            steps: Adapters to draw; by default it depends on the number of tasks and adapters, and on the device.
            learning_rate: Peak learning rate.
            seed: Seed for all random numbers: the same seed on the same machine gives the same bytes.
            resume: Resume a training that was stopped.
            fresh: Start from scratch instead of from the current generator.

        Returns:
            One entry per base model; its `left_out` names tasks that have no code, and why.

        Raises:
            DataError: There is nothing to train on, or a task is evicted.
            GeneratorError: The training diverged, or no task could be encoded.
        """
        from icmlora.fleet.train.run import TrainRequest
        from icmlora.fleet.train.train import train

        network = width, steps, learning_rate, seed
        return train(self._context, TrainRequest(device, base_model, quality, tolerance, *network, resume, fresh))

    def update(
        self,
        *,
        device: str = "auto",
        base_model: str | None = None,
        quality: int | None = None,
        tolerance: float | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
    ) -> UpdateReport:
        """Store codes for the tasks that have none, and let the generator grow if that makes them smaller.

        Only the new tasks are read. Existing codes decode to the same adapters as before, and their originals may be
        evicted. It takes as long as the new tasks take.

        Args:
            device: Where to compute.
            base_model: Update only the generator of this base model.
            quality: Of the new codes: 1 (smallest) to 8 (most accurate); by default that of the first training.
            tolerance: The same as a number: the largest squared error, weighted by how sensitive each channel is.
            steps: Adapters to draw; by default it depends on the number of new tasks, and on the device.
            learning_rate: Peak learning rate.
            seed: Seed for all random numbers.

        Raises:
            DataError: The store has no tasks, or a base model has no generator yet.
            GeneratorError: The training diverged; nothing changed.
            GeneratorConflict: Another generator became current in the meantime; nothing changed.
        """
        from icmlora.fleet.train.candidates import UpdateRequest
        from icmlora.fleet.train.update import update

        request = UpdateRequest(device, base_model, quality, tolerance, steps, learning_rate, seed)
        return update(self._context, request)

    def encode(
        self,
        tasks: Sequence[str] = (),
        *,
        quality: int | None = None,
        min_gain: float | None = None,
        max_error: float | None = None,
        tolerance: float | None = None,
        size: int | None = None,
        refine: int | None = None,
        residual: bool = False,
        base_model: str | None = None,
        device: str = "auto",
        again: bool = False,
        workers: str | None = None,
        shard: str | None = None,
    ) -> EncodeReport:
        """Re-encode tasks with the current generator, as small as the limits allow; nothing is trained.

        A task whose code was made with the same limits is skipped, so the same call continues after an interruption.
        A code meets all of `min_gain`, `max_error`, `tolerance` and `size` that are given. Without any, the quality
        counts.

        Args:
            tasks: Names of tasks; all by default.
            quality: 1 (smallest codes) to 8 (most accurate); by default that of the generator. Codes are refined where
                the base model is at hand.
            min_gain: Smallest retained gain on the task's held-out text. Needs the base model.
            max_error: Largest relative error, ||dW' - dW|| / ||dW||: 0.3 for 30 %.
            tolerance: Largest squared error, weighted by how sensitive each channel is: what `quality` sets.
            size: Bytes that the file of each code may have. The codes are as accurate as that allows.
            refine: Steps that fit a code to what its adapter does, on the task's samples or on texts that the adapted
                model writes itself. Needs the base model. By default 40 with a quality, and none with other limits.
            residual: Keep the codes, and store a residual for each task whose code misses the limits.
            base_model: Only tasks of this base model.
            device: Where to measure and refine.
            again: Encode tasks even if their code already meets these limits.
            workers: Where to compute, as described for the class.
            shard: Which part of the tasks to work on, as described for the class.

        Returns:
            One entry per task; `report.short` lists those without a code that meets the limits.

        Raises:
            DataError: There is no generator, or the base model has no tasks.
        """
        from icmlora.fleet.encode.encode import EncodeRequest, encode

        limits = quality, max_error, min_gain, tolerance, refine, residual
        request = EncodeRequest(tasks, *limits, base_model, device, again, workers, Shard.of(shard), size)
        return encode(self._context, request)

    # evaluate, compare

    def evaluate(
        self,
        tasks: Sequence[str] = (),
        *,
        sources: Sequence[Rung] = ("residual", "code", "generate"),
        data: str | Path | None = None,
        max_tokens: int = 256,
        baselines: Sequence[str] = (),
        device: str = "auto",
        again: bool = False,
        workers: str | None = None,
        shard: str | None = None,
    ) -> EvaluateReport:
        """Measure the sources of tasks on held-out text, with the base model, and record the results.

        Args:
            tasks: Names of tasks; all by default.
            sources: What to measure in addition to base model and original, where a task has it.
            data: File of held-out text as JSON lines; each task's own by default.
            max_tokens: Tokens scored in each text.
            baselines: Other methods to compare with, such as "int8" or "svd4". Their results are not stored.
            device: Where to compute.
            again: Measure again what was measured on the same text before.
            workers: Where to compute, as described for the class.
            shard: Which part of the tasks to work on, as described for the class.

        Raises:
            DataError: No task has held-out text, or the text cannot be used.
            BaseModelNotFound: None of the base models is on this machine. The report names those that are missing.
            UnknownBaseline: No method has that name.
        """
        from icmlora.fleet.measure.evaluate import EvaluateRequest, evaluate

        path = None if data is None else Path(data)
        request = EvaluateRequest(tasks, sources, path, max_tokens, again, baselines, device, workers, Shard.of(shard))
        return evaluate(self._context, request)

    measurable = measurable

    def compare(self, report: EvaluateReport) -> list[MethodSummary]:
        """Sum up the `report` of `evaluate` by method, with the bytes that each takes, largest first."""
        from icmlora.fleet.measure.compare import compare

        return compare(report.tasks, self.stats())

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
