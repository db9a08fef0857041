"""The public face of a fleet: one method per use case, each a call into the file of that name.

A method imports what it needs when it is called, so that `import icmlora` and listing tasks never load torch. The
methods that list and maintain a store are in `icmlora.fleet.api_store`, those that delete originals and bring adapters
back in `icmlora.fleet.api_originals`; `Fleet` inherits them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
from icmlora.fleet.write.materialize import load_many

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
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

    train = train

    update = update

    encode = encode

    # evaluate

    evaluate = evaluate

    measurable = measurable

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
