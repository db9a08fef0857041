"""Use a bundle without a store: list its tasks, write or load their adapters. Listing imports neither torch nor SQL.

What a bundle says of its codes is a claim of whoever made it: nothing here has measured it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.bundle.file import BundleFile, open_bundle
from icmlora.bundle.index import BundledGenerator, BundledTask, BundleIndex
from icmlora.errors import BaseModelNotFound, BundleError, DataError
from icmlora.fleet.context import OpenedGenerator
from icmlora.fleet.write.format_pairs import check_pair, format_to_write
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import check_target
from registry.records import Claim

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.fleet.vectors.recognize import RecognizeReport
    from icmlora.fleet.write.cards import Provenance
    from icmlora.fleet.write.materialize import MadeFiles, MaterializeReport
    from icmlora.generator.versions import GeneratorFile

_BETTER = "`icm train` with a higher --quality makes better codes; then export them again"


class Bundle:
    """A file with a generator and the codes of some tasks, as `Fleet.export_bundle` writes it.

        bundle = Bundle("fleet.icm")
        print([task.name for task in bundle.tasks])
        bundle.materialize("dog-detection", "adapter")

    Args:
        path: The file. Its index is read and checked; the rest is checked before an adapter is decoded.

    Attributes:
        path: The file.
        index: Everything in the bundle except the bytes of its parts.
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
        self._checked: tuple[int, ...] = ()  # the stamp of the file when every byte was checked

    @property
    def base_model(self) -> str:
        """The name that the adapters give their base model."""
        return self.index.base_model

    @property
    def generator(self) -> BundledGenerator:
        """The generator that decodes all codes of the bundle."""
        return self.index.generator

    @property
    def tasks(self) -> tuple[BundledTask, ...]:
        """The tasks, by name."""
        return self.index.tasks

    def original_size(self, task: BundledTask) -> int:
        """Return the size of a task's original in bytes: weights, configuration and card."""
        sizes = self.index.sizes
        return task.weights_size + sizes[task.config] + (0 if task.card is None else sizes[task.card])

    def code_size(self, task: BundledTask) -> int:
        """Return the size of a task's code in bytes."""
        return self.index.sizes[task.code]

    def configs(self) -> Iterator[tuple[BundledTask, bytes]]:
        """Yield each task of a PEFT adapter with the configuration that this is written with."""
        from icmlora.formats.format import Template
        from icmlora.formats.peft.initial import converted_form

        with self._open() as file:
            for task in (task for task in self.tasks if task.format == "peft"):
                yield (
                    task,
                    converted_form(Template(file.read(task.config), task.layout, task.dtype, task.template)).config,
                )

    def load(self, task: str, *, max_error: float | None = None) -> Adapter:
        """Decode a task's adapter into memory: float32, with the scale folded into B.

        Args:
            task: Name of the task, in any case.
            max_error: Refuse an adapter whose relative error is larger by what the bundle says, or not told.

        Raises:
            BundleError: The bundle is damaged, or the file was replaced.
            DataError: The bundle has no task of that name.
            TooLossy: The error is above `max_error`.
        """
        return self._decode(task, max_error)[0]

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

        Args:
            task: Name of the task, in any case.
            directory: The folder, absent or empty; with a format of single files a file, as `NAME.gguf`.
            adapter_format: Name of a format, as `icm convert --list-formats` lists them. Default: the adapter's own.
                Converting image adapters needs the extra `diffusion`.
            dtype: Number format of the factors: `bfloat16`, `float16` or `float32`. Default: that of the original, or
                `float32` if they are converted.
            pad_rank: Write one rank for all modules, filled with zeros, for engines that need it. Default: the ranks
                of the original.
            max_error: Refuse an adapter whose relative error is larger by what the bundle says, or not told.
            base_model: Folder or GGUF file of the base model, whose configuration a conversion from or to `gguf` needs;
                by default it is looked for in the Hugging Face cache.
            force: Replace the adapter in a folder that is not empty, or a file.

        Raises:
            BundleError: The bundle is damaged, or the file was replaced.
            DataError: The bundle has no task of that name.
            TooLossy: The error is above `max_error`.
            OutputExists: The folder is not empty, or the file exists, and `force` is not given.
            AdapterRefused: The format has no place for a part of the adapter, such as a head.
            BaseModelNotFound: With `gguf`: it is not on this machine.
            BaseModelUnsuited: With `gguf`: its architecture is none that icm writes adapters for.
        """
        output, target = Path(directory), None if adapter_format is None else format_to_write(adapter_format)
        check_target(output, target, as_file=True, force=force)
        own = format_named(find_task(self.index, task).format)
        if target is None or own.name == target.name:
            return self._made(task, dtype, pad_rank, max_error).write(output, force=force)
        check_pair(own, target)
        made = self._made(task, None, pad_rank, max_error)
        return made.convert(output, target, partial(self._find_base, base_model), dtype=dtype, force=force)

    def read_files(
        self, task: str, *, dtype: str | None = None, pad_rank: int | None = None, max_error: float | None = None
    ) -> dict[str, bytes]:
        """Return name -> content of the files that `materialize` writes.

        `task`, `dtype`, `pad_rank`, `max_error` and the errors are those of `materialize`.
        """
        return self._made(task, dtype, pad_rank, max_error).by_name

    def _find_base(self, given: str | Path | None) -> FoundBase:
        from icmlora.base_models.finding.lookup import find_base_model

        try:
            return find_base_model(self.base_model, aliases={} if given is None else {self.base_model: given})
        except BaseModelNotFound as error:  # without a store there are no names for copies elsewhere
            error.hint = "`--base-model PATH` says where its folder or GGUF file is; its weights are not read"
            raise

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
        from icmlora.fleet.context import default_cache
        from icmlora.fleet.vectors.recognize import recognize_in_bundle

        if loader is not None and base_model is None:
            raise ValueError("a loader needs a base model")
        with self._open() as file:
            return recognize_in_bundle(
                file,
                Path(samples),
                base_model=None if base_model is None else str(base_model),
                loader=loader,
                device=device,
                cache=default_cache() if cache is None else Path(cache),
            )

    def _made(self, task: str, dtype: str | None, pad_rank: int | None, max_error: float | None) -> MadeFiles:
        from icmlora.fleet.write.materialize import FilesRequest, encode_files

        request = FilesRequest(task=task, dtype=dtype, pad_rank=pad_rank)
        adapter, provenance, form = self._decode(task, max_error)
        return encode_files(adapter, provenance, request, form)

    def _decode(self, name: str, max_error: float | None) -> tuple[Adapter, Provenance, OriginalForm]:
        from icmlora.fleet.write.cards import Provenance
        from icmlora.fleet.write.materialize import check_error

        task = find_task(self.index, name)
        provenance = Provenance(
            task=task.name,
            base_model=self.base_model,
            source="code",
            generator=self.generator,
            squared_error=None,
            retained_gain=None,
            seed=None,
            is_generated=task.is_generated,
            claim=claim_of(task),
        )
        check_error(task.name, task.squared_error, max_error, hint=_BETTER)
        with self._open() as file:
            if file.stamp != self._checked:
                file.check()
                self._checked = file.stamp
            # The generator may have been trained when its base model had another name.
            generator_file, code = self._generator.get(self.generator.blob, file.read), file.read(task.code)
            form = form_in(file, task)
        return generator_file.decoder_of(code).decode(code), provenance, form

    @contextmanager
    def _open(self) -> Iterator[BundleFile]:
        with open_bundle(self.path, self._known) as file:
            if file.digest != self.digest:
                raise BundleError("the bundle was replaced by another one", path=self.path)
            yield file


def form_in(file: BundleFile, task: BundledTask) -> OriginalForm:
    """Read the form and the extras of the original of a task in a bundle."""
    from icmlora.fleet.resources.decoding import OriginalForm
    from icmlora.formats.extras import unpack_extras
    from icmlora.formats.format import Template, check_companions

    known = format_named(task.format)
    check_companions(known, task.files)
    template = Template(file.read(task.config), task.layout, task.dtype, task.template)
    extras = ((extra.file, extra.part) for extra in task.extras)
    base = partial(_base_tensors, file.index.base_model)
    return OriginalForm(known, template, *unpack_extras(extras, file.read, base))


def _base_tensors(label: str) -> BaseTensors:
    from icmlora.base_models.finding.lookup import find_base_model
    from icmlora.base_models.finding.tensors import needed_tensors

    try:
        return needed_tensors(lambda: find_base_model(label))
    except BaseModelNotFound as error:  # without a store there are no names for copies elsewhere
        error.hint = (
            "download it into the Hugging Face cache, or `icm import` the bundle and run `icm base add NAME PATH`"
        )
        raise


def find_task(index: BundleIndex, name: str) -> BundledTask:
    """Return a task of a bundle by name, in any case."""
    task = index.task(name)
    if task is None:
        close = difflib.get_close_matches(name, [task.name for task in index.tasks], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`icm ls --from FILE` lists its tasks"
        raise DataError(f"the bundle has no task named {name!r}", hint=hint)
    return task


def claim_of(task: BundledTask) -> Claim | None:
    """Return what a bundle says of a code: whoever made it may have measured it, or not."""
    if task.squared_error is None and task.measured is None:
        return None
    return Claim(task.squared_error, None if task.measured is None else asdict(task.measured))


def open_generator(bundle: BundleFile) -> GeneratorFile:
    """Read the generator of a bundle. The network of a version is opened with the first code that needs it."""
    from icmlora.generator.versions import GeneratorFile

    # The generator may have been trained when its base model had another name.
    return GeneratorFile(bundle.read(bundle.index.generator.blob))
