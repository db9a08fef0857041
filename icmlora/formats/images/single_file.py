"""Adapters in a single safetensors file without a configuration, as image programs save and share them.

    NAME.safetensors       factors, their alphas, and the trainer's notes in the header, such as trigger words
    NAME.preview.png ...   its images and notes, kept with it

The module of each such format defines the names of modules and factors (`Naming`), and the scale if the file has no
alpha. This module has the common rest. Methods import checking, decoding and writing when needed.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused
from icmlora.formats.format import (
    AdapterBytes,
    AdapterFormat,
    AdapterSummary,
    Buffer,
    Extras,
    FoundAdapter,
    LoadedAdapter,
    RunnableAdapter,
    Template,
    Texts,
    without_suffix,
)
from icmlora.formats.images.single_file_names import sort_file
from icmlora.io.safetensors import read_header

if TYPE_CHECKING:
    from torch import Tensor

    from icmlora.adapter.model import Adapter
    from icmlora.formats.discovery.tree import Folder
    from icmlora.formats.images.single_file_check import CheckedFile
    from icmlora.formats.images.single_file_names import Naming, Restated, Scales, SortedFile

SUFFIX = ".safetensors"

_IMAGES = ("png", "jpg", "jpeg", "webp", "gif")
COMPANIONS = frozenset(
    {*_IMAGES, *(f"preview.{kind}" for kind in _IMAGES), "civitai.info", "cm-info.json", "metadata.json", "json", "txt"}
)
"""File names that belong to an adapter, without the adapter's name."""

# Weights of other kinds, which this format does not read.
_OTHERS = re.compile(
    r"(adapter_model|adapters|\d+_adapters|model|diffusion_pytorch_model|value_head|optimizer|consolidated)([-.].*)?"
    r"|pytorch_model.*|.*-\d{5}-of-\d{5}"
)
_CHECKPOINT = re.compile(r"(?P<name>.+?)(-step|[-_])(?P<step>\d{6,9})")


class SingleFileFormat(AdapterFormat):
    """One naming of adapters in a single file.

    Args:
        name: The name of the format in the store.
        about: A short description.
        naming: Its names of tensors.
        scales: The scale of a module without an alpha. Default: 1, as loaders assume.
        restated: Updates ranks in the header's metadata. Default: metadata is unchanged.
        folder_file: The file name if the adapter is a folder, as on the hub.
        takes_damaged: Also find files with an unreadable header, to report them.
    """

    is_for_images = True
    suffix = SUFFIX
    companions = COMPANIONS

    def __init__(
        self,
        name: str,
        about: str,
        naming: Naming,
        *,
        scales: Scales = lambda metadata, module, rank: 1.0,
        restated: Restated = lambda metadata, ranks: metadata,
        folder_file: str | None = None,
        takes_damaged: bool = False,
    ) -> None:
        self.name, self.about, self._naming = name, about, naming
        self._scales, self._restated = scales, restated
        self._folder_file, self._takes_damaged = folder_file, takes_damaged

    def find(self, folder: Folder) -> list[FoundAdapter]:
        """Return an adapter for every file whose tensors have names of this format."""
        found: dict[str, FoundAdapter] = {}
        names = sorted(folder.files)
        for name in names:
            path, stem = folder.files[name], without_suffix(name, SUFFIX)
            if not stem or _OTHERS.fullmatch(stem):
                continue
            header = folder.header(name)
            if not self._takes_damaged if header is None else not self._naming.owns(header.names):
                continue
            if name == self._folder_file:
                found[name] = FoundAdapter(self, folder.path, path, card=folder.files.get("README.md"))
            else:
                # Next to `dog.safetensors`, `dog.SAFETENSORS` is another adapter.
                place = folder.path / (name if name != stem + SUFFIX and stem + SUFFIX in folder.files else stem)
                found[name] = FoundAdapter(self, place, path, companions=_companions(stem, names, folder))
        return list(_in_runs(found, folder))

    def _summary(self, config: bytes, weights: Buffer) -> AdapterSummary:
        """Check an adapter and summarise it; other methods than LoRA get no code."""
        from icmlora.formats.images.single_file_check import check_file

        return check_file(weights, self._naming).summary

    def _load(self, config: bytes, weights: bytes) -> LoadedAdapter:
        from icmlora.formats.images.single_file_check import check_file
        from icmlora.formats.images.single_file_tensors import read_adapter

        return read_adapter(weights, check_file(weights, self._naming), self._scales)

    def look(self, weights: bytes) -> tuple[SortedFile, Mapping[str, str]]:
        """Return the sorted tensors of an adapter from its header alone, and its metadata; raises as `inspect` does."""
        header = read_header(weights)
        return sort_file(header, self._naming), header.metadata

    def named_factors(self, weights: bytes) -> tuple[dict[str, Tensor], CheckedFile]:
        """Read the factors in float32 with the file's names and shapes, scaled so that alpha = r.

        Raises:
            AdapterRefused: As `read` does.
        """
        from icmlora.formats.images.single_file_check import check_file
        from icmlora.formats.images.single_file_tensors import named_factors

        checked = check_file(weights, self._naming)
        return named_factors(weights, checked, self._scales), checked

    def _run(self, config: bytes, weights: bytes) -> RunnableAdapter:
        fact = f"icm cannot run the base model of a {self.name} adapter"
        hint = "run `icm report -o FILE --outputs TASK` to generate images with a diffusers pipeline"
        raise AdapterRefused(fact, kind="cannot-run", hint=hint)

    def _fresh(self, adapter: Adapter, metadata: Texts, dtype: str) -> AdapterBytes:
        from icmlora.formats.images.single_file_tensors import write_fresh

        return AdapterBytes(write_fresh(adapter, self._naming, dtype, metadata))

    def _alike(
        self, adapter: Adapter, like: Template, dtype: str | None, rank: int | None, extras: Extras, metadata: Texts
    ) -> AdapterBytes:
        from icmlora.formats.images.single_file_tensors import write_like

        if rank is not None:
            fact = f"--pad-rank applies to PEFT folders only, not to {self.name} files"
            raise AdapterRefused(fact, kind="rank", hint="leave out --pad-rank")
        return AdapterBytes(write_like(adapter, self._naming, self._scales, self._restated, like, dtype, extras))

    def lay_out(self, files: AdapterBytes, name: str) -> dict[str, bytes]:
        """Name the files; the model card is dropped."""
        laid_out = super().lay_out(files, name)
        _, weights = laid_out.popitem()
        return {**laid_out, self._folder_file or f"{name}{SUFFIX}": weights}


def _companions(stem: str, names: Sequence[str], folder: Folder) -> dict[str, Path]:
    """Return the files that belong to an adapter; `names` are all files, sorted, possibly very many."""
    start = f"{stem}."
    first = bisect_left(names, start)
    following = takewhile(lambda name: name.startswith(start), (names[place] for place in range(first, len(names))))
    endings = (name.removeprefix(start) for name in following)
    return {ending: folder.files[start + ending] for ending in endings if ending.lower() in COMPANIONS}


def _in_runs(found: Mapping[str, FoundAdapter], folder: Folder) -> Iterator[FoundAdapter]:
    """Yield the adapters, marking files with the same training in their notes as checkpoints of one run.

    kohya saves `NAME-000010`, `NAME-step00000500` and `NAME`, ai-toolkit `NAME_000000500` and `NAME`. Files that only
    have similar names stay separate.
    """
    training: dict[str, tuple[str, str]] = {}
    for file, paths in found.items():
        header = folder.header(file)
        notes = {} if header is None else header.metadata
        name = notes.get("ss_output_name") or notes.get("name")
        if name and name in (paths.place.name, _run_of(paths.place.name)[0]):
            training[file] = name, notes.get("ss_training_started_at", "")
    count = Counter(training.values())
    for file, paths in found.items():
        known, (_, step) = training.get(file), _run_of(paths.place.name)
        is_one = known is not None and count[known] > 1 and step is not None
        yield replace(paths, run=folder.path / known[0], step=step) if known is not None and is_one else paths


def _run_of(stem: str) -> tuple[str | None, int | None]:
    match = _CHECKPOINT.fullmatch(stem)
    return (None, None) if match is None else (match["name"], int(match["step"]))
