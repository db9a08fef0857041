"""Find a base model on this machine by the name in its adapters. Never uses the network, never imports torch.

    name -> path from the caller -> absolute path -> Hugging Face cache, by revision -> BaseModelNotFound

Only safetensors and GGUF weights are accepted: a pickled checkpoint is recognised and reported, but never opened. A
base model with a loader may be any file or folder; only its loader reads it. A folder with a `model_index.json` is a
diffusers pipeline: the base model of image adapters, run only to generate images (`pipeline.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, DataError
from registry.names import LOAD_IN, LoadIn, split_label

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIPELINE = "model_index.json"
_CONFIG_LIMIT = 16 * 2**20
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class FoundBase:
    """A base model on disk, not loaded yet."""

    label: str  # the name that adapters use
    path: Path  # a Hugging Face model folder, a diffusers pipeline folder, or a `.gguf` file
    weights: tuple[Path, ...]  # the weight files, sorted by name; all files of a base model with a loader
    loader: str | None = None  # MODULE:FUNCTION that loads it, if transformers does not
    task_type: str | None = None  # PEFT's task type of its adapters: "SEQ_CLS" adds a classification head
    is_pipeline: bool = False  # a diffusers pipeline, with each network in its own folder
    load_in: LoadIn | None = None  # quantised format for loading the weights; None for the device's default

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file, which must be dequantised before use."""
        return self.path.suffix == ".gguf" and self.loader is None

    @property
    def has_config(self) -> bool:
        """Whether it is a Hugging Face folder with a `config.json` that describes the model."""
        return not self.is_gguf and self.loader is None and not self.is_pipeline

    def refuse_pipeline(self) -> None:
        """Raise `BaseModelUnsuited` if it is a diffusers pipeline, which cannot run examples through one network."""
        if self.is_pipeline:
            fact = f"base model {self.label!r} is a diffusers pipeline, which icm uses only to generate images"
            raise BaseModelUnsuited(fact, hint="run `icm report -o FILE --outputs TASK` to generate them")

    def stamp(self) -> str:
        """Hash path, size and mtime of the files: a cheap cache key for the fingerprint."""
        described = [PIPELINE] if self.is_pipeline else ["config.json"] if self.has_config else []
        files = (*self.weights, *(self.path / name for name in described))
        parts: list[Any] = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        parts += [] if self.loader is None else [self.loader]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_base_model(
    label: str,
    *,
    aliases: Mapping[str, str | Path] | None = None,
    cache_dir: Path | None = None,
    loader: str | None = None,
) -> FoundBase:
    """Find the local copy of base model `label`, or of its alias; raise `BaseModelNotFound` if there is none."""
    # A label is opaque: it may be a hub name or a path. A revision of None means `main`.
    name, revision = split_label(label)
    alias = (aliases or {}).get(label)
    if alias is not None:
        return inspect_base(label, Path(alias), loader)
    reason = "no local copy of the base model was found"
    # A path takes precedence over the cache, because the trainer loaded that path on this machine. A relative label was
    # already resolved from its adapter (see `labels.py`); in the current directory it could be another model.
    places: list[Path] = []
    with suppress(OSError, ValueError):  # labels come from untrusted files: a NUL, too long, no repository
        if os.path.isabs(label) and Path(label).exists():
            places.append(Path(label))
        from huggingface_hub import try_to_load_from_cache

        for config in ("config.json", PIPELINE):
            if isinstance(file := try_to_load_from_cache(name, config, cache_dir=cache_dir, revision=revision), str):
                places.append(Path(file).parent)
                break
    for path in places:
        try:
            return inspect_base(label, path)
        except BaseModelNotFound as error:
            reason = str(error)
    raise BaseModelNotFound(f"base model {label!r}: {reason}", hint=_add_hint(label))


def inspect_base(label: str, path: Path, loader: str | None = None) -> FoundBase:
    """Check that a base model is loadable, without loading it; raise `BaseModelNotFound` if `path` has none."""
    hint = _add_hint(label)
    if loader is not None:
        files = (path,) if path.is_file() else tuple(sorted(file for file in path.rglob("*") if file.is_file()))
        if not files:
            fact = "holds no file" if path.exists() else "does not exist"
            raise BaseModelNotFound(f"base model {label!r}: {fact}", path=path, hint=hint)
        return FoundBase(label, path, files, loader)
    if (path / PIPELINE).is_file():
        return FoundBase(label, path, _pipeline_weights(path, hint), is_pipeline=True)
    if path.is_dir():
        # A folder without config.json and with one GGUF file means that file; several are ambiguous.
        lone = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file() or len(lone) != 1:
            return FoundBase(label, path, _folder_weights(path, hint))
        path = lone[0]
    if path.suffix == ".gguf" and path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BaseModelNotFound("the file is not GGUF", path=path, hint=hint)
        return FoundBase(label, path, (path,))
    fact = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise BaseModelNotFound(f"base model {label!r}: {fact}", path=path, hint=hint)


def check_load_in(found: FoundBase) -> None:
    """Check, from its files and the installed packages, that a base model can be quantised.

    Raises:
        DataError: The format is unknown.
        BaseModelUnsuited: Models of its kind cannot be quantised.
        BaseModelNotFound: bitsandbytes or accelerate is not installed.
    """
    if found.load_in is None:
        return
    if found.load_in not in LOAD_IN:
        raise DataError(f"a base model cannot be loaded in {found.load_in!r}", hint="use nf4 or int8")
    odd = None
    if found.loader is not None:
        odd = "its own loader decides how it is loaded"
    elif found.is_pipeline:
        odd = "it is a diffusers pipeline"
    elif found.is_gguf:
        odd = "the weights in a GGUF file are already quantised, and quantising them again would change them"
    elif "quantization_config" in read_config(found.path):
        odd = "its files are already quantised"
    if odd is not None:
        fact = f"base model {found.label!r} cannot be loaded in {found.load_in}: {odd}"
        raise BaseModelUnsuited(fact, hint="leave out --load-in, or use a safetensors folder in full precision")
    if missing := [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]:
        fact = f"loading {found.label!r} in {found.load_in} needs {missing[0]}, which is not installed"
        raise BaseModelNotFound(fact, hint="install the extra: pip install 'icm-lora[quantized]'")


def read_config(path: Path) -> dict[str, object]:
    """Read the `config.json` of a base model's folder."""
    return _json_object(path / "config.json", hint="specify a complete Hugging Face model folder")


def _folder_weights(path: Path, hint: str) -> tuple[Path, ...]:
    read_config(path)
    if (path / SINGLE).is_file():
        return (path / SINGLE,)
    if (path / INDEX).is_file():
        table = _json_object(path / INDEX, hint=hint).get("weight_map")
        names = set(table.values()) if isinstance(table, dict) else set()
        if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
            raise BaseModelNotFound("the index of weight files is malformed", path=path / INDEX, hint=hint)
        files = tuple(path / name for name in sorted(names))
        if missing := [file.name for file in files if not file.is_file()]:
            raise BaseModelNotFound(f"weight file {missing[0]!r} is missing (of {len(files)})", path=path, hint=hint)
        return files
    if any(next(path.glob(pattern), None) for pattern in _PICKLED):
        fact = "the base model has only pickled weights, which are never opened"
        raise BaseModelNotFound(fact, path=path, hint=f"get the safetensors version of this model, then {hint}")
    raise BaseModelNotFound("the folder holds no safetensors weights", path=path, hint=hint)


def _pipeline_weights(path: Path, hint: str) -> tuple[Path, ...]:
    """Return the weights of all parts of a pipeline; raise `BaseModelNotFound` if a part has only pickled weights."""
    _json_object(path / PIPELINE, hint=hint)
    weights: list[Path] = []
    for part in sorted(folder for folder in path.iterdir() if folder.is_dir()):
        found = sorted(part.glob("*.safetensors"))
        if not found and any(next(part.glob(pattern), None) for pattern in (*_PICKLED, "*.bin")):
            fact = f"its part {part.name!r} has only pickled weights, which are never opened"
            raise BaseModelNotFound(fact, path=path, hint=f"get the safetensors version of this pipeline, then {hint}")
        weights += found
    if not weights:
        raise BaseModelNotFound("the pipeline holds no safetensors weights", path=path, hint=hint)
    return tuple(weights)


def _json_object(file: Path, *, hint: str) -> dict[str, object]:
    try:
        if file.stat().st_size > _CONFIG_LIMIT:
            raise ValueError("larger than 16 MiB")
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise BaseModelNotFound(f"{file.name} {reason}", path=file.parent, hint=hint) from error
    if not isinstance(value, dict):
        raise BaseModelNotFound(f"{file.name} is not a JSON object", path=file.parent, hint=hint)
    return value


def _add_hint(label: str) -> str:
    name = label if label.isascii() and label.isprintable() and " " not in label and label else "NAME"
    return f"run `icm base add {name} PATH` to specify a local copy"
