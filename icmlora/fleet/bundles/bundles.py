"""Use a bundle without a store: list its tasks, write or load their adapters. Listing imports neither torch nor SQL.

The quality that a bundle states for its codes is a claim: it was not measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.bundle.file import open_bundle
from icmlora.errors import BundleError
from icmlora.fleet.context import OpenedGenerator
from icmlora.fleet.resources.bundle_codes import BundleCodes

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.fleet.vectors.recognize import RecognizeReport
    from icmlora.fleet.write.materialize import MaterializeReport
    from registry.manifests import Generator, Task


class Bundle:
    """A file with a generator and the codes of some tasks, as `Fleet.export_bundle` writes it.

        bundle = Bundle("fleet.icm")
        print([task.name for task in bundle.tasks])
        bundle.materialize("dog-detection", "adapter")

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
        self.path = Path(path)
        with open_bundle(self.path) as file:
            self.index, self.digest, self.size = file.index, file.digest, file.size
        self._known = file
        self._generator = OpenedGenerator()

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

    def load(self, task: str, *, max_error: float | None = None) -> Adapter:
        """Decode a task's adapter into memory: float32, with the scale folded into B.

        Args:
            task: Name of the task, in any case.
            max_error: Refuse an adapter whose relative error is larger, or not stated by the bundle.

        Raises:
            BundleError: The bundle is damaged, or the file was replaced.
            DataError: The bundle has no task of that name.
            TooLossy: The error is above `max_error`.
        """
        from icmlora.fleet.write.materialize import choose

        with self.open() as codes:
            return choose(codes, codes.get(task)).reader(max_error)()

    def materialize(
        self,
        task: str,
        directory: str | Path,
        *,
        adapter_format: str | None = None,
        dtype: str | None = None,
        pad_rank: int | None = None,
        max_error: float | None = None,
        base_model: str | Path | None = None,
        force: bool = False,
    ) -> MaterializeReport:
        """Write a task's adapter: the same bytes as from the code in the store.

        Every byte of the bundle is checked before anything is written; while the file stays as it is, once.

        Arguments and errors are as in `Fleet.materialize`, but `max_error` is compared with the claim of the bundle,
        and `base_model` is the folder or GGUF file of the base model, whose configuration a conversion from or to
        `gguf` needs. By default it is looked for in the Hugging Face cache.

        Raises:
            BundleError: The bundle is damaged, or the file was replaced.
        """
        from icmlora.fleet.write.materialize import write_adapter

        return write_adapter(
            partial(self.open, base_model),
            task,
            Path(directory),
            adapter_format=adapter_format,
            dtype=dtype,
            pad_rank=pad_rank,
            max_error=max_error,
            force=force,
        )

    def read_files(
        self, task: str, *, dtype: str | None = None, pad_rank: int | None = None, max_error: float | None = None
    ) -> dict[str, bytes]:
        """Return name -> content of the files that `materialize` writes.

        `task`, `dtype`, `pad_rank`, `max_error` and the errors are as in `materialize`.
        """
        from icmlora.fleet.write.materialize import choose

        with self.open() as codes:
            made = choose(codes, codes.get(task)).files(dtype=dtype, pad_rank=pad_rank, max_error=max_error)
            return made.by_name

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
            base_model: Folder or GGUF file of the base model; by default it is looked for in the Hugging Face cache.
            loader: `MODULE:FUNCTION` of a function marked with `icmlora.base_model_loader`, for a base model that
                transformers does not load; it goes with `base_model`. Bundles never name one.
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
        with self.open(base_model, loader, None if cache is None else Path(cache)) as codes:
            return recognize_among(codes, Path(samples), None, device)

    @contextmanager
    def open(
        self, base_model: str | Path | None = None, loader: str | None = None, cache: Path | None = None
    ) -> Iterator[BundleCodes]:
        """Open the file for one piece of work; `BundleCodes` explains the arguments.

        Raises:
            BundleError: The bundle is damaged, or the file was replaced.
        """
        with open_bundle(self.path, self._known) as file:
            if file.digest != self.digest:
                raise BundleError("the bundle file was replaced", path=self.path)
            self._known = file  # it remembers whether its bytes were checked
            yield BundleCodes(file, self._generator, base_model, loader, cache)
