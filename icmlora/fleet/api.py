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
from icmlora.fleet.ingest.ingest import ingest
from icmlora.fleet.measure.evaluate import measurable
from icmlora.fleet.measure.module_errors import module_errors
from icmlora.fleet.vectors.recognize import recognize
from icmlora.fleet.vectors.vectors import extract_vectors
from icmlora.fleet.write.materialize import load_many

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.fleet.encode.encode import EncodeReport
    from icmlora.fleet.measure.compare import MethodSummary
    from icmlora.fleet.measure.evaluate import EvaluateReport
    from icmlora.fleet.records import Rung
    from icmlora.fleet.train.train import TrainReport
    from icmlora.fleet.train.update import UpdateReport
    from icmlora.fleet.write.materialize import MaterializeReport, Source


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

    def materialize(
        self,
        task: str,
        directory: str | Path,
        *,
        source: Source = "auto",
        adapter_format: str | None = None,
        dtype: str | None = None,
        pad_rank: int | None = None,
        seed: int | None = None,
        max_error: float | None = None,
        force: bool = False,
    ) -> MaterializeReport:
        """Write a task's adapter as a folder, or as a file for llama.cpp. It appears complete or not at all.

        A decoded adapter has the form of its original: its configuration, names, ranks and number formats. Neither the
        base model nor a GPU is needed. The same arguments write the same bytes.

        Args:
            task: Name of the task.
            directory: The folder, absent or empty; with a format of single files a file, as `NAME.gguf`.
            source: `original`, `residual`, `code`, `generate` (the code that the task vectors bring back) or `network`
                (what the network alone predicts from them); `auto` takes the best there is of the first three.
            adapter_format: Name of a format, as `icm convert --list-formats` lists them. Default: the adapter's own. An
                original in another format is converted too, so it does not come back byte for byte. From and to `gguf`
                that needs the configuration of the base model, for image adapters the extra `diffusion`.
            dtype: Number format of decoded or converted factors: `bfloat16`, `float16` or `float32`. Default: that of
                the original, or `float32` if they are converted.
            pad_rank: Write decoded factors with one rank for all modules, filled with zeros, for engines that need it.
            seed: Predict the adapter from a latent sampled with this seed; for `network` or `auto`.
            max_error: Refuse an adapter whose relative error is larger, or was not measured.
            force: Replace the adapter in a folder that is not empty.

        Raises:
            DataError: The store does not have this source.
            TooLossy: The error is above `max_error`.
            OutputExists: The folder is not empty, or the file exists, and `force` is not given.
            AdapterRefused: The format has no place for a part of the adapter, such as a head.
            BaseModelNotFound: From and to `gguf`: it is not on this machine.
            BaseModelUnsuited: From and to `gguf`: its architecture is none that icm writes adapters for.
        """
        from icmlora.fleet.write.materialize import MaterializeRequest, materialize

        where = Path(directory)
        request = MaterializeRequest(
            task=task,
            directory=where,
            source=source,
            adapter_format=adapter_format,
            dtype=dtype,
            pad_rank=pad_rank,
            seed=seed,
            max_error=max_error,
            force=force,
        )
        return materialize(self._context, request)

    def read_files(
        self,
        task: str,
        *,
        source: Source = "auto",
        dtype: str | None = None,
        pad_rank: int | None = None,
        seed: int | None = None,
        max_error: float | None = None,
    ) -> dict[str, bytes]:
        """Return name -> content of the files that `materialize` writes.

        `task`, `source`, `dtype`, `pad_rank`, `seed`, `max_error` and the errors are those of `materialize`.
        """
        from icmlora.fleet.write.materialize import FilesRequest, make_files

        request = FilesRequest(task=task, source=source, seed=seed, max_error=max_error, dtype=dtype, pad_rank=pad_rank)
        return make_files(self._context, request).by_name

    def load(
        self, task: str, *, source: Source = "auto", seed: int | None = None, max_error: float | None = None
    ) -> Adapter:
        """Load a task's adapter into memory: float32 tensors, with the scale folded into B.

            for module in fleet.load("dog-detection").modules:
                delta = module.b @ module.a  # (out, in)

        `task`, `source`, `seed`, `max_error` and the errors are those of `materialize`.
        """
        from icmlora.fleet.write.materialize import LoadRequest, load

        return load(self._context, LoadRequest(task=task, source=source, seed=seed, max_error=max_error))

    load_many = load_many

    export_bundle = export_bundle

    import_bundle = import_bundle

    # recognize, generate

    recognize = recognize

    check_few_shot = check_few_shot

    train_few_shot = train_few_shot

    generate = generate
