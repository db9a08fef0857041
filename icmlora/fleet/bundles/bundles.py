"""Use a bundle without a store: list its tasks, write or load their adapters. Listing imports neither torch nor SQL.

The quality that a bundle states for its codes is a claim: it was not measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.bundle.file import ReopenedBundle
from icmlora.fleet.context import Context, default_cache
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
        cache: Folder for a base model converted from GGUF, or a function that returns it; by default `icm` in the
            Hugging Face home.

    Attributes:
        path: The file.
        index: The manifests in the bundle: its generator and tasks.
        digest: SHA-256 that identifies the whole file.
        size: Length of the file in bytes.

    Raises:
        BundleError: Not a bundle, damaged, cut short, or of another format.
        UnsafeInput: It exceeds a limit, or is not a regular file.
    """

    def __init__(self, path: str | Path, *, cache: str | Path | Callable[[], Path] = default_cache) -> None:
        super().__init__(path)
        self.context = Context(self.path, Path(cache) if isinstance(cache, str) else cache, bundle=self)

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
    ) -> RecognizeReport:
        """Recognize the task of the bundle that some samples belong to, as `Fleet.recognize` does."""
        from icmlora.fleet.vectors.recognize import recognize  # imports torch

        return recognize(self, samples, base_model=base_model, loader=loader, device=device)
