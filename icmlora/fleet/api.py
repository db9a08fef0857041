"""The public face of a fleet: one method per use case, each a call into the file of that name.

    fleet = Fleet("store", on_event=print)
    fleet.ingest(["loras"])
    fleet.train(device="cuda")
    fleet.materialize("dog-detection", "adapter")

A method imports what it needs when it is called, so that `import icmlora` and listing tasks never load torch. The
methods that list and maintain the store are in `icmlora.fleet.api_store`, those that train, use and list generators in
`icmlora.fleet.api_generators`; `Fleet` inherits both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.fleet.api_generators import GeneratorFleet

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.fleet.compare import MethodSummary
    from icmlora.fleet.encode import EncodeReport
    from icmlora.fleet.evaluate import EvaluateReport, Measurable
    from icmlora.fleet.evict import EvictReport, Pinned
    from icmlora.fleet.export_bundle import ExportReport
    from icmlora.fleet.import_bundle import ImportReport
    from icmlora.fleet.ingest import Conflict, IngestReport
    from icmlora.fleet.materialize import MaterializeReport, Source
    from icmlora.fleet.records import Rung
    from icmlora.fleet.vectors import VectorReport


class Fleet(GeneratorFleet):
    """The tasks of a store, and everything that can be done with them.

    Args:
        path: The store folder.
        cache: Folder for files that can be created again (base models converted from GGUF), or a function that
            returns it; by default `icm` in the Hugging Face home.
        lock_timeout: Seconds to wait for another process.
        command: What this process does, as others see it when they have to wait.
        on_event: Called with a `Progress` after each unit of work, and with what each use case has to tell. To stop,
            raise `Cancelled` in it: what was finished is kept.
    """

    # ingest, vectors

    def ingest(
        self,
        paths: Sequence[str | Path],
        *,
        name: str | None = None,
        samples: str | Path | None = None,
        texts: bool = True,
        skip_bad: bool = False,
        on_conflict: Conflict = "fail",
        restore: bool = False,
        dry_run: bool = False,
    ) -> IngestReport:
        """Take adapters into the store, which is created if necessary. Ingesting the same again changes nothing.

            report = fleet.ingest(["loras"])
            print(report.new, "new adapters,", report.known, "known")

        Args:
            paths: PEFT folders, training runs with checkpoint-N folders, or folders of those at any depth.
            name: Name for the task, if exactly one is found. By default a task is named after its folder.
            samples: Samples for the task as JSON lines, if exactly one is found. By default the `samples.jsonl` next
                to its adapter.
            texts: Also ingest the `samples.jsonl` and `eval.jsonl` found next to adapters.
            skip_bad: Report refused inputs and continue. By default the first one ends the ingest.
            on_conflict: If the store has a task of that name with another adapter: `skip`, `replace` or `fail`.
            restore: Bring evicted originals back. By default they stay evicted.
            dry_run: Check everything and report what would change, but write nothing.

        Returns:
            What was recorded and what was refused, task by task.

        Raises:
            AdapterRefused: An input was refused, nothing was found, or everything was refused.
            TaskConflict: A task has another adapter in the store and `on_conflict` is `fail`.
        """
        from icmlora.fleet.ingest import IngestRequest, ingest

        request = IngestRequest(
            paths=tuple(map(Path, paths)),
            name=name,
            samples=None if samples is None else Path(samples),
            texts=texts,
            skip_bad=skip_bad,
            on_conflict=on_conflict,
            restore=restore,
            dry_run=dry_run,
        )
        return ingest(self._context, request)

    def extract_vectors(self, tasks: Sequence[str] = (), *, device: str = "auto", again: bool = False) -> VectorReport:
        """Extract and store task vectors: the base model's hidden states on samples, with and without the adapter.

        Args:
            tasks: Names of tasks; all if empty.
            device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
            again: Also extract the vectors of tasks that already have some.

        Returns:
            Which tasks got vectors, and which did not.

        Raises:
            BaseModelNotFound: A base model is not on this machine. Tasks of the other base models are done first.
            BaseModelMismatch: An adapter does not fit its base model.
            DeviceUnavailable: The device does not exist.
        """
        from icmlora.fleet.vectors import VectorRequest, extract_vectors

        return extract_vectors(self._context, VectorRequest(tasks, device, again))

    # materialize, bundles

    def materialize(
        self,
        task: str,
        directory: str | Path,
        *,
        source: Source = "auto",
        dtype: str = "bfloat16",
        seed: int | None = None,
        max_error: float | None = None,
        force: bool = False,
    ) -> MaterializeReport:
        """Write a task's adapter as a PEFT folder. The folder appears complete or not at all.

            fleet.materialize("dog-detection", "adapter")

        Neither the base model nor a GPU is needed. The same arguments write the same bytes.

        Args:
            task: Name of the task.
            directory: The folder, absent or empty.
            source: `original`, `residual`, `code` or `generate`; `auto` takes the best there is of the first three.
            dtype: Number format of decoded weights: `bfloat16`, `float16` or `float32`. An original keeps its own.
            seed: Generate the adapter from a latent sampled with this seed.
            max_error: Refuse an adapter whose relative error is larger, or was not measured.
            force: Replace the adapter in a folder that is not empty.

        Raises:
            TaskNotFound: There is no such task.
            DataError: The store does not have this source.
            TooLossy: The error is above `max_error`.
            OutputExists: The folder is not empty and `force` is not given.
        """
        from icmlora.fleet.materialize import MaterializeRequest, materialize

        request = MaterializeRequest(
            task=task,
            directory=Path(directory),
            source=source,
            dtype=dtype,
            seed=seed,
            max_error=max_error,
            force=force,
        )
        return materialize(self._context, request)

    def load(
        self, task: str, *, source: Source = "auto", seed: int | None = None, max_error: float | None = None
    ) -> Adapter:
        """Load a task's adapter into memory: float32 tensors, with the scale folded into B.

            adapter = fleet.load("dog-detection")
            for module in adapter.modules:
                delta = module.b @ module.a  # (out, in)

        Args:
            task: Name of the task.
            source: As for `materialize`.
            seed: As for `materialize`.
            max_error: As for `materialize`.

        Raises:
            TaskNotFound: There is no such task.
            DataError: The store does not have this source.
            TooLossy: The error is above `max_error`.
        """
        from icmlora.fleet.materialize import LoadRequest, load

        return load(self._context, LoadRequest(task=task, source=source, seed=seed, max_error=max_error))

    def export_bundle(
        self, file: str | Path, tasks: Sequence[str] = (), *, base_model: str | None = None, force: bool = False
    ) -> ExportReport:
        """Write the generator and the codes of some tasks into one file; `icmlora.Bundle` reads it without a store.

        A bundle has no originals, no residuals and no texts. The same store gives the same bytes.

        Args:
            file: The bundle to write.
            tasks: Names of tasks; all that have a code if empty.
            base_model: Only tasks of this base model. Needed if the tasks have several.
            force: Replace a file that exists.

        Raises:
            DataError: A named task has no code, or the tasks have several base models.
            OutputExists: The file exists and `force` is not given.
        """
        from icmlora.fleet.export_bundle import ExportRequest, export_bundle

        return export_bundle(self._context, ExportRequest(Path(file), tasks, base_model, force))

    def import_bundle(
        self,
        file: str | Path,
        tasks: Sequence[str] = (),
        *,
        on_conflict: Literal["skip", "fail"] = "fail",
        dry_run: bool = False,
    ) -> ImportReport:
        """Take the generator, codes and tasks of a bundle into the store, which is created if necessary.

        Args:
            file: The bundle.
            tasks: Tasks of the bundle; all if empty.
            on_conflict: If the store has a task of that name with another adapter or code: `skip` or `fail`.
            dry_run: Check everything and report what would change, but write nothing.

        Raises:
            BundleError: The bundle is damaged, cut short, or of another format.
            GeneratorConflict: The store uses another generator for this base model.
            TaskConflict: A task has another adapter or code in the store, and `on_conflict` is `fail`.
        """
        from icmlora.fleet.import_bundle import ImportRequest, import_bundle

        return import_bundle(self._context, ImportRequest(Path(file), tasks, on_conflict, dry_run))

    # encode

    def encode(
        self,
        tasks: Sequence[str] = (),
        *,
        min_gain: float | None = None,
        max_error: float | None = None,
        tolerance: float | None = None,
        refine: int = 0,
        residual: bool = False,
        base_model: str | None = None,
        device: str = "auto",
        again: bool = False,
    ) -> EncodeReport:
        """Re-encode tasks with the current generator, as small as the limits allow; nothing is trained.

        A task whose present code was made with the same limits is skipped, so the same call continues after an
        interruption. Give at least one of `min_gain`, `max_error` and `tolerance`.

            fleet.encode(min_gain=0.98)

        Args:
            tasks: Names of tasks; all by default.
            min_gain: Smallest retained gain on the task's held-out text. Needs the base model.
            max_error: Largest squared relative error of dW.
            tolerance: Largest squared relative error of dW weighted by sensitivity.
            refine: Steps that fit a code to what its adapter does on the task's samples. Needs the base model.
            residual: Keep the codes, and store a residual for each task whose code misses the limits.
            base_model: Only tasks of this base model.
            device: Where to measure and refine: "auto", "cpu", "cuda", "cuda:N" or "mps".
            again: Encode tasks even if their code already meets these limits.

        Returns:
            One entry per task; `report.short` lists those without a code that meets the limits.

        Raises:
            TaskNotFound: A name is not in the store.
            DataError: There is no generator, or no task of the base model.
            StoreLocked: Another process trains, updates, encodes or evicts for the same base model.
            Cancelled: The listener stopped it; `report` of the exception has the tasks that are done.
        """
        from icmlora.fleet.encode import EncodeRequest, encode

        request = EncodeRequest(tasks, max_error, min_gain, tolerance, refine, residual, base_model, device, again)
        return encode(self._context, request)

    # evaluate

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
    ) -> EvaluateReport:
        """Measure the sources of tasks on held-out text, with the base model, and record the results.

        Base model and original are always measured. What was measured on the same text before is not measured again.

        Args:
            tasks: Names of tasks; all by default.
            sources: What else to measure, where a task has it.
            data: File of held-out text as JSON lines; each task's own by default.
            max_tokens: Tokens scored in each text.
            baselines: Other methods to compare with, such as "int8" or "svd4". Their results are not stored.
            device: Where to compute.
            again: Measure again what was measured on the same text before.

        Raises:
            TaskNotFound: A name is not in the store.
            DataError: No task has held-out text, or the text cannot be used.
            BaseModelNotFound: There is no local copy of a base model.
            UnknownBaseline: There is no method of that name.
            Cancelled: The listener stopped it; `report` of the exception has the tasks that are done.
        """
        from icmlora.fleet.evaluate import EvaluateRequest, evaluate

        path = None if data is None else Path(data)
        request = EvaluateRequest(tasks, sources, path, max_tokens, again, baselines, device)
        return evaluate(self._context, request)

    def measurable(self, base_models: Sequence[str], tasks: Sequence[str] = ()) -> Measurable:
        """Return which tasks of some base models can be measured on this machine, and why others cannot.

        Args:
            base_models: Names of base models.
            tasks: Only these tasks; all by default.
        """
        from icmlora.fleet.evaluate import measurable

        return measurable(self._context, base_models, tasks)

    def compare(self, report: EvaluateReport) -> list[MethodSummary]:
        """Sum up an evaluation by method, with the bytes that each takes, largest first.

        Args:
            report: What `evaluate` returned.
        """
        from icmlora.fleet.compare import compare

        return compare(report.tasks, self.stats())

    # evict, pin

    def evict(
        self,
        tasks: Sequence[str] = (),
        *,
        max_error: float | None = None,
        min_gain: float | None = None,
        checkpoints_only: bool = False,
        dry_run: bool = False,
        device: str = "auto",
    ) -> EvictReport:
        """Delete originals, each after a check that its code can replace it.

        The code is read back from disk, with its residual if it has one, decoded and measured. An original whose code
        misses a limit is kept. Give at least one limit.

        Args:
            tasks: Names of tasks; all by default.
            max_error: Largest squared relative error of dW.
            min_gain: Smallest retained gain on the task's held-out text. Needs the base model.
            checkpoints_only: Delete checkpoints and keep the final adapters.
            dry_run: Check everything and delete nothing.
            device: Where to measure.

        Raises:
            TaskNotFound: A name is not in the store; nothing was deleted.
            StoreLocked: Another process uses the store, or works on the same base model.
            Cancelled: The listener stopped it; `report` of the exception has the tasks that are done.
        """
        from icmlora.fleet.evict import EvictRequest, evict

        request = EvictRequest(tasks, max_error, min_gain, checkpoints_only, dry_run, device)
        return evict(self._context, request)

    def pin(self, tasks: Sequence[str]) -> Pinned:
        """Keep the originals of tasks: `evict` does not delete them.

        Raises:
            TaskNotFound: A name is not in the store; nothing was changed.
        """
        from icmlora.fleet.evict import set_pinned

        return set_pinned(self._context, tasks, pinned=True)

    def unpin(self, tasks: Sequence[str]) -> Pinned:
        """Allow `evict` to delete the originals of tasks again.

        Raises:
            TaskNotFound: A name is not in the store; nothing was changed.
        """
        from icmlora.fleet.evict import set_pinned

        return set_pinned(self._context, tasks, pinned=False)
