"""Write a task's adapter as a folder or file, or load it: from its original, its code, or its task vectors.

    original   the bytes that were ingested, unchanged
    code       its code
    recalled   the code of the task recognized from its vectors
    network    what the network alone predicts from the task vectors

Codes come from a store or from a bundle alone. torch is imported only to decode, to convert or to load: an original is
written as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from icmlora.errors import DataError, OptionsConflict
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.resources.code_source import AdapterParts, CodeSource, Decoded, OpenCodes, open_store
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import AdapterBytes, AdapterFormat, check_target, write_adapter_files
from registry.manifests import Claim, Code, Task, WithRelativeError

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.fleet.write.cards import Provenance
    from registry.manifests import Adapter as StoredAdapter

# "generate" is what "recalled" was called before.
Source = Literal["auto", "original", "code", "recalled", "generate", "network"]

_SIDE_BY_SIDE = 32
"""Adapters that `load_many` has in memory at a time."""


@dataclass(frozen=True)
class MaterializeReport(WithRelativeError):
    """A written adapter."""

    task: str
    directory: Path
    source: Literal["original", Decoded]
    generator: str | None  # digest of the generator that decoded it; None for an original
    squared_error: float | None  # None if it was not measured
    retained_gain: float | None  # as `icm eval` measured it
    weights: str  # SHA-256 of the written weights
    recognized: str | None = None  # of `recalled`: the task whose code it is; None for what the network predicts
    adapter_format: str = "peft"  # of the files
    converted: bool = False  # from another one
    left_out: tuple[str, ...] = ()  # files that came with the original and have no place in this format
    precision: str | None = None  # of the base model that the gain was measured on
    claim: Claim | None = None  # of the bundle that its code came in


class TooLossy(DataError):
    """The adapter's relative error is above the limit, or was not measured; nothing was written."""


@use_case
def materialize(
    context: Context,
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
        context: The store.
        task: Name of the task, or `NAME@VERSION`.
        directory: The folder, absent or empty; with a format of single files a file, as `NAME.gguf`.
        source: `original`, `code`, `recalled` (the code of the task recognized from its vectors) or `network` (what
            the network alone predicts from them); `auto` takes the original if the store has it, else the code.
        adapter_format: Name of a format, as `icm convert --list-formats` lists them. Default: its own. An original in
            another format is converted too, so it does not come back byte for byte. From and to `gguf` that needs
            the configuration of the base model, for image adapters the extra `diffusion`.
        dtype: Number format of decoded or converted factors: `bfloat16`, `float16` or `float32`. Default: as in
            the original, or `float32` if they are converted.
        pad_rank: Write decoded factors with one rank for all modules, filled with zeros, for engines that need it.
        seed: Predict the adapter from a latent sampled with this seed; for `network` or `auto`.
        max_error: Refuse an adapter whose relative error is larger, or was not measured.
        force: Replace the adapter in a folder that is not empty.

    Raises:
        DataError: The store does not have this source.
        OptionsConflict: A seed, and a source that samples nothing.
        TooLossy: The error is above `max_error`.
        OutputExists: The folder is not empty, or the file exists, and `force` is not given.
        AdapterRefused: The format has no place for a part of the adapter, such as a head.
        BaseModelNotFound: From and to `gguf`: it is not on this machine.
        BaseModelUnsuited: From and to `gguf`: its architecture is none that icm writes adapters for.
    """
    return write_adapter(
        partial(open_store, context),
        task,
        Path(directory),
        source=source,
        adapter_format=adapter_format,
        dtype=dtype,
        pad_rank=pad_rank,
        seed=seed,
        max_error=max_error,
        force=force,
    )


@use_case
def read_files(
    context: Context,
    task: str,
    *,
    source: Source = "auto",
    dtype: str | None = None,
    pad_rank: int | None = None,
    seed: int | None = None,
    max_error: float | None = None,
) -> dict[str, bytes]:
    """Return name -> content of the files that `materialize` writes.

    `task`, `source`, `dtype`, `pad_rank`, `seed`, `max_error` and the errors are as in `materialize`.
    """
    with open_store(context) as codes:
        chosen = choose(codes, codes.get(task), source, seed)
        return chosen.files(dtype=dtype, pad_rank=pad_rank, max_error=max_error).by_name


@use_case
def load(
    context: Context, task: str, *, source: Source = "auto", seed: int | None = None, max_error: float | None = None
) -> Adapter:
    """Load a task's adapter into memory: float32 tensors, with the scale folded into B.

        for module in fleet.load("dog-detection").modules:
            delta = module.b @ module.a  # (out, in)

    `task`, `source`, `seed`, `max_error` and the errors are as in `materialize`.
    """
    with open_store(context) as codes:
        return choose(codes, codes.get(task), source, seed).reader(max_error)()


@use_case
def load_many(
    context: Context, tasks: Sequence[str], *, source: Source = "auto", device: str = "cpu"
) -> Iterator[tuple[str, Adapter]]:
    """Load the adapters of many tasks, as `load` does: (name, adapter) in the order of `tasks`.

    The generator is opened once, and several codes are decoded side by side, on the CPU, whose results do not depend
    on the machine; then the factors go to the device. At most 32 adapters are in memory besides those that the caller
    keeps, and the store is not held while the caller works.

    Args:
        context: The store.
        tasks: Names of tasks.
        source: As for `materialize`.
        device: Where the factors are put.
    """
    from icmlora.io.devices import resolve_device
    from icmlora.io.threads import side_by_side

    place = resolve_device(device)
    with side_by_side() as each:
        for first in range(0, len(tasks), _SIDE_BY_SIDE):
            names = tasks[first : first + _SIDE_BY_SIDE]
            with open_store(context) as codes:  # released before the caller continues
                readers = [choose(codes, codes.get(name), source).reader() for name in names]
            adapters = each(lambda read: read().to(place), readers)
            yield from zip(names, adapters, strict=True)


@dataclass(frozen=True, eq=False)
class MadeFiles:
    """An adapter as the files of its format, in memory."""

    task: str
    format: AdapterFormat
    content: AdapterBytes
    provenance: Provenance | None  # None for an original
    initial: bytes | None = None  # of an original: what its training took out of the base model

    @property
    def by_name(self) -> dict[str, bytes]:
        """File name -> content; the file that makes the adapter valid comes last."""
        return self.format.lay_out(self.content, self.task)

    def write(self, output: Path, *, force: bool) -> MaterializeReport:
        """Write the files as a folder, or as a single file where the format has those; completely, or not at all."""
        write_adapter_files(output, self.format, self.content, self.task, force=force)
        return self._report(output, self.content.weights, (0.0, 1.0))

    def convert(
        self, output: Path, target: AdapterFormat, find_base: Callable[[], FoundBase], *, dtype: str | None, force: bool
    ) -> MaterializeReport:
        """Write the adapter in another format than its own; `find_base` is called if its base model is needed."""
        from icmlora.fleet.write.format_pairs import SourceAdapter, convert_content

        own = {"icm_task": self.task, "icm_rung": "original"}
        metadata = own if self.provenance is None else self.provenance.metadata()
        # The adapter that `write` would write is converted, with its rounded factors.
        source = SourceAdapter(self.task, self.format, self.content, find_base, path=output, initial=self.initial)
        content = convert_content(source, target, metadata=metadata, dtype=dtype or "float32")
        write_adapter_files(output, target, content, self.task, force=force)
        is_rounded = dtype not in (None, "float32")  # by an error that is not measured
        report = self._report(output, content.weights, (None, None) if is_rounded else (0.0, 1.0))
        left_out = tuple(name for name in self.content.companions if name not in content.companions)
        return replace(report, adapter_format=target.name, converted=True, left_out=left_out)

    def _report(
        self, output: Path, weights: bytes, of_original: tuple[float | None, float | None]
    ) -> MaterializeReport:
        digest, own, p = hashlib.sha256(weights).hexdigest(), self.format.name, self.provenance
        if p is None:
            return MaterializeReport(self.task, output, "original", None, *of_original, digest, None, own)
        figures = p.squared_error, p.retained_gain, digest, p.recognized, own
        made = MaterializeReport(self.task, output, p.source, str(p.generator), *figures)
        return replace(made, precision=p.precision, claim=p.claim)


def write_adapter(
    open_codes: OpenCodes,
    name: str,
    output: Path,
    *,
    source: Source = "auto",
    adapter_format: str | None = None,
    dtype: str | None = None,
    pad_rank: int | None = None,
    seed: int | None = None,
    max_error: float | None = None,
    force: bool = False,
) -> MaterializeReport:
    """Write an adapter from a store or a bundle; `materialize` explains the arguments."""
    target = None
    if adapter_format is not None:  # most adapters keep theirs
        from icmlora.fleet.write.format_pairs import check_pair, format_to_write

        target = format_to_write(adapter_format)
    check_target(output, target, as_file=True, force=force)
    with open_codes() as codes:
        task = codes.get(name)
        own = format_named(task.final.format)
        other = None if target is None or target.name == own.name else target
        if other is not None:
            check_pair(own, other)
        written = dtype if other is None else None
        made = choose(codes, task, source, seed).files(dtype=written, pad_rank=pad_rank, max_error=max_error)
    if other is None:
        return made.write(output, force=force)

    def find_base() -> FoundBase:
        with open_codes() as codes:
            return codes.locate(task.base_model)

    return made.convert(output, other, find_base, dtype=dtype, force=force)


@dataclass(frozen=True)
class Chosen:
    """What the adapter of a task is made from."""

    codes: AdapterParts  # of the store or the bundle
    task: Task
    source: Literal["original"] | Decoded  # where the adapter comes from
    generator: str | None = None  # digest of the network that decodes it; None for an original
    code: Code | None = None  # to decode; None for an original, and for a prediction of the network
    recognized: str | None = None  # of `recalled`: the task whose code it is
    seed: int | None = None  # of a sampled latent; None for the mean

    def reader(self, max_error: float | None = None) -> Callable[[], Adapter]:
        """Read what the adapter is made from, and return what makes it, on any thread.

        Raises:
            TooLossy: The error is above `max_error`.
        """
        if self.source != "original":
            if max_error is not None:
                self._provenance(max_error)  # it holds the error against the limit
            return self._decoder()
        final, read = self.task.final, self.codes.read
        known = format_named(final.format)
        initial = None if final.initial is None else read(final.initial)
        config, weights = read(final.config), read(final.weights)
        return lambda: known.read(config, weights, initial=initial).adapter

    def files(
        self, *, dtype: str | None = None, pad_rank: int | None = None, max_error: float | None = None
    ) -> MadeFiles:
        """Make the files of the adapter in memory, a decoded one with its model card. Equal arguments give equal bytes.

        Raises:
            TooLossy: The error is above `max_error`.
        """
        if self.source == "original":
            return self._original_files()
        from icmlora.fleet.write.cards import card_text

        provenance, form = self._provenance(max_error), self.codes.form(self.task)
        files = form.format.encode(
            self._decoder()(),
            card=card_text(provenance, form.files),
            metadata=provenance.metadata(),
            like=form.template,
            dtype=dtype,
            pad_rank=pad_rank,
            extras=form.tensors,
        )
        return MadeFiles(provenance.task, form.format, replace(files, companions=form.files), provenance)

    def _original_files(self) -> MadeFiles:
        codes, task, final = self.codes, self.task, self.task.final
        if final.card is None:
            from icmlora.fleet.write.cards import original_card

            card = original_card(task.name, task.base_model, final.weights).encode()
        else:
            card = codes.read(final.card)
        content = replace(original_files(codes, final), card=card)
        initial = None if final.initial is None else codes.read(final.initial)
        return MadeFiles(task.name, format_named(final.format), content, None, initial)

    def _decoder(self) -> Callable[[], Adapter]:
        codes = self.codes
        assert self.generator is not None
        if self.code is None:
            predicted = codes.predict(self.task, self.seed)
            return lambda: predicted
        from icmlora.fleet.resources.decoding import code_reader

        return code_reader(codes.read, codes.generator_file(self.generator), self.code)

    def _provenance(self, max_error: float | None) -> Provenance:
        """Return the provenance of an adapter before it is decoded, and check its error against a limit."""
        from icmlora.fleet.write.cards import Provenance

        task, source, generator, code, codes = self.task, self.source, self.generator, self.code, self.codes
        assert source != "original"
        assert generator is not None
        error = gain = precision = None
        if self.seed is None:  # nothing was measured of a sampled adapter
            measured = task.latest(source, generator)
            if measured is not None:
                error, gain, precision = measured.squared_error, measured.retained_gain, measured.precision
        if code is not None and self.recognized in (None, task.name):
            error = code.squared_error
        claim = code.claim if code is not None and source == "code" else None
        found = Provenance(
            task=task.name,
            base_model=task.base_model,
            source=source,
            generator=generator,
            version=codes.version_of(generator, task.base_model),
            squared_error=error,
            retained_gain=gain,
            seed=self.seed,
            is_generated=task.final.is_generated,
            recognized=self.recognized,
            precision=precision,
            claim=claim,
        )
        claimed = None if claim is None else claim.relative_error
        said = claimed if codes.takes_claims else found.relative_error
        if max_error is not None and (said is None or said > max_error):
            fact = "was not measured" if said is None else f"is {said:.4f}"
            if said is None and claimed is not None:
                fact = f"was not measured here (its bundle claims {claimed:.4f})"
            fact = f"the relative error of {task.name!r} {fact}, but the limit is {max_error}"
            raise TooLossy(fact, hint=codes.better)
        return found


def choose(codes: CodeSource, task: Task, source: Source = "auto", seed: int | None = None) -> Chosen:
    """Return what an adapter is made from, without reading blobs unless its vectors are looked at.

    Raises:
        DataError: There is no such source, or the task does not have it.
    """
    if source not in get_args(Source):
        names = [name for name in get_args(Source) if name != "generate"]
        raise DataError(f"unknown source {source!r}", hint=f"choose one of {', '.join(names)}")
    if seed is not None and source not in ("auto", "network"):
        raise OptionsConflict("--seed needs --source network or auto")
    if source == "original" or (source == "auto" and seed is None and not task.final.is_evicted):
        _check_original(task)
        return Chosen(codes, task, "original")
    if task.not_encodable is not None:
        fact = f"task {task.name!r} has only its original: {task.not_encodable}"
        raise DataError(fact, hint="use `--source original`")
    if source == "auto":
        source = "code" if seed is None else "network"
    code = task.code
    if source == "code" and code is not None:
        return Chosen(codes, task, source, code.generator, code)
    current = codes.current(task.base_model)
    if source == "code":
        train = "icm train" if current is None else "icm train --update"
        raise DataError(f"task {task.name!r} has no code", hint=f"run `{train}` to make one")
    if current is None:
        raise DataError(f"there is no generator for task {task.name!r}", hint="run `icm train` to make one")
    if source == "network":
        return Chosen(codes, task, source, current.blob, seed=seed)
    known = codes.recalled(task)
    if known is None or known.code is None:
        return Chosen(codes, task, "recalled", current.blob)
    return Chosen(codes, task, "recalled", known.code.generator, known.code, known.name)


def _check_original(task: Task) -> None:
    final = task.final
    if not final.is_evicted:
        return
    fact = f"the original of task {task.name!r} was evicted at {final.evicted_at}"
    way = "restore it with `icm ingest --restore PATH`"
    if final.is_generated:
        fact = f"task {task.name!r} was generated, so the store has a code but no original"
        way = "ingest the folder that `icm generate` wrote with `icm ingest --restore PATH`"
    elif final.was_never_here:
        fact = f"the original of task {task.name!r} was never in this store: its code was imported from a bundle"
        way = "add it with `icm ingest PATH`"
    raise DataError(fact, hint=f"use `--source code` to decode the stored code, or {way}")


def original_files(codes: AdapterParts, row: StoredAdapter, weights: bytes | None = None) -> AdapterBytes:
    """Read the files of an original as they were ingested, without the card; given weights are not read again."""
    companions: dict[str, bytes] = {}
    if row.extras:
        from icmlora.fleet.resources.decoding import read_companions

        companions = read_companions(codes.read, row)
    return AdapterBytes(
        codes.read(row.weights) if weights is None else weights, codes.read(row.config), None, companions
    )
