"""Adapters in a single safetensors file, without a configuration: what programs for images save and share.

    NAME.safetensors       factors, their alphas, and in the header what the trainer noted, such as trigger words
    NAME.preview.png ...   pictures and notes that belong to it, kept with it

Each file that names one of these formats says how its programs call modules and factors (`Naming`), and how the scale
is found where the file has no alpha. All else is the same and is here. Checking, decoding and writing are imported by
the methods that need them.
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
    AdapterPaths,
    AdapterSummary,
    Buffer,
    Extras,
    LoadedAdapter,
    RunnableAdapter,
    Template,
    Texts,
    without_suffix,
)

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
"""What follows the name of an adapter in the names of files that belong to it."""

# Weights of other kinds, which other formats or nobody reads.
_OTHERS = re.compile(
    r"(adapter_model|adapters|\d+_adapters|model|diffusion_pytorch_model|value_head|optimizer|consolidated)([-.].*)?"
    r"|pytorch_model.*|.*-\d{5}-of-\d{5}"
)
_CHECKPOINT = re.compile(r"(?P<name>.+?)(-step|[-_])(?P<step>\d{6,9})")


class SingleFileFormat(AdapterFormat):
    """One naming of adapters in a single file.

    Args:
        name: The name under which the store notes the format.
        about: What it is, in a few words.
        naming: How it names tensors.
        scales: The scale of a module without an alpha. Default: 1, as loaders take it.
        restated: The header's metadata for the ranks of its modules, where it states them. Default: word for word.
        folder_file: The name of the file where an adapter is a folder of its own, as the hub has it.
        takes_damaged: Also find files whose header cannot be read, so that somebody reports them.
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

    def find(self, folder: Folder) -> list[AdapterPaths]:
        """Find every file whose tensors have names of this format: each is an adapter, named after the file."""
        found: dict[str, AdapterPaths] = {}
        names = sorted(folder.files)
        for name in names:
            path, stem = folder.files[name], without_suffix(name, SUFFIX)
            if not stem or _OTHERS.fullmatch(stem):
                continue
            header = folder.header(name)
            if not self._takes_damaged if header is None else not self._naming.owns(header.names):
                continue
            if name == self._folder_file:
                found[name] = AdapterPaths(folder.path, path, card=folder.files.get("README.md"))
            else:
                # Next to `dog.safetensors`, `dog.SAFETENSORS` is another adapter.
                place = folder.path / (name if name != stem + SUFFIX and stem + SUFFIX in folder.files else stem)
                found[name] = AdapterPaths(place, path, companions=_companions(stem, names, folder))
        return list(_in_runs(found, folder))

    def _summary(self, config: bytes, weights: Buffer) -> AdapterSummary:
        """Check an adapter and summarise it; one of another method than LoRA is kept as it is."""
        from icmlora.formats.images.single_file_check import check_file

        return check_file(weights, self._naming).summary

    def _load(self, config: bytes, weights: bytes) -> LoadedAdapter:
        from icmlora.formats.images.single_file_check import check_file
        from icmlora.formats.images.single_file_tensors import read_adapter

        return read_adapter(weights, check_file(weights, self._naming), self._scales)

    def look(self, weights: bytes) -> tuple[SortedFile, Mapping[str, str]]:
        """Sort the tensors of an adapter by its header alone, and return its metadata; raises as `inspect` does."""
        from icmlora.formats.images.single_file_names import sort_file
        from icmlora.io.safetensors import read_header

        header = read_header(weights)
        return sort_file(header, self._naming), header.metadata

    def named_factors(self, weights: bytes) -> tuple[dict[str, Tensor], CheckedFile]:
        """Read the factors under their own names, float32 and in their own shapes, as if alpha was the rank.

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
        """Name what belongs to the file after it; the card has no place next to it."""
        laid_out = super().lay_out(files, name)
        _, weights = laid_out.popitem()
        return {**laid_out, self._folder_file or f"{name}{SUFFIX}": weights}


def _companions(stem: str, names: Sequence[str], folder: Folder) -> dict[str, Path]:
    """Return the files that belong to an adapter; `names` is all files in order, of which there may be very many."""
    start = f"{stem}."
    first = bisect_left(names, start)
    following = takewhile(lambda name: name.startswith(start), (names[place] for place in range(first, len(names))))
    endings = (name.removeprefix(start) for name in following)
    return {ending: folder.files[start + ending] for ending in endings if ending.lower() in COMPANIONS}


def _in_runs(found: Mapping[str, AdapterPaths], folder: Folder) -> Iterator[AdapterPaths]:
    """Mark the files that one training left as checkpoints of one run: those that its trainer's notes hold together.

    kohya saves `NAME-000010`, `NAME-step00000500` and `NAME`, ai-toolkit `NAME_000000500` and `NAME`. Files that only
    look alike stay apart.
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
