"""Use a bundle without a store: list its tasks, write or load their adapters. Listing imports neither torch nor SQL.

The quality that a bundle states for its codes is a claim: it was not measured here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.bundle.file import ReopenedBundle
from icmlora.fleet.context import Context
from icmlora.fleet.resources.code_source import open_codes
from icmlora.fleet.write.materialize import load, load_many, materialize, read_files

if TYPE_CHECKING:
    from icmlora.fleet.vectors.recognize import RecognizeReport
    from registry.manifests import Generator, Task


class Bundle(ReopenedBundle):
    """A file with a generator and the codes of some tasks, as `Fleet.export_bundle` writes it.

        bundle = Bundle("fleet.icm")
        print([task.name for task in bundle.tasks])
        bundle.materialize("dog-detection", "adapter")

    `materialize`, `read_files`, `load` and `load_many` are those of `Fleet`. They give the same bytes as the codes in
    the store, and raise `BundleError` if the bundle is damaged or the file was replaced. `max_error` is compared with
    the claim of the bundle, and `base_model` is the folder or GGUF file of the base model, whose configuration a
    conversion from or to `gguf` needs. By default it is searched for in the Hugging Face cache.

    Args:
        path: The file. Its index is read and checked; the rest is checked before an adapter is decoded.

    Attributes:
        path: The file.
        index: The manifests in the bundle: its generator and tasks.
        digest: SHA-256 that identifies the whole file.
        size: Length of the file in bytes.

    Raises:
        BundleError: Not a bundle, damaged, cut short, or of another format.
        UnsafeInput: It exceeds a limit, or is not a regular file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.context = Context(self.path, bundle=self)

    @property
    def base_model(self) -> str:
        """The name that the adapters give their base model."""
        return self.index.base_model

    @property
    def generator(self) -> Generator:
        """The generator that decodes all codes of the bundle."""
        return self.index.generator

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, by name."""
        return self.index.tasks

    materialize = materialize
    read_files = read_files
    load = load
    load_many = load_many

    def recognize(
        self,
        samples: str | Path,
        *,
        base_model: str | Path | None = None,
        loader: str | None = None,
        device: str = "auto",
        cache: str | Path | None = None,
    ) -> RecognizeReport:
        """Recognize the task of the bundle that some samples belong to, by their task vectors.

        Args:
            samples: File of samples as JSON lines; up to 32 are read, and 16 are enough.
            base_model: Folder or GGUF file of the base model; by default it is searched for in the Hugging Face cache.
            loader: `MODULE:FUNCTION` of a function marked with `icmlora.base_model_loader`, for a base model outside
                transformers; it requires `base_model`. Bundles never name one.
            device: Where to compute.
            cache: Folder for a base model converted from GGUF; by default `icm` in the Hugging Face home.

        Raises:
            BundleError: The bundle is damaged, or the file was replaced.
            DataError: The samples cannot be used, or too few tasks of the bundle have context vectors.
            BaseModelNotFound: The base model is not on this machine, or its loader cannot be used.
            ValueError: There is a loader, but no base model.
        """
        from icmlora.fleet.vectors.recognize import recognize_among

        if loader is not None and base_model is None:
            raise ValueError("a loader needs a base model")
        context = self.context if cache is None else replace(self.context, cache_folder=Path(cache))
        with open_codes(context, base_model=base_model, loader=loader) as codes:
            return recognize_among(codes, Path(samples), None, device)
