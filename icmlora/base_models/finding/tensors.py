"""The tensors in a base model's safetensors files, read one at a time. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from icmlora.base_models.finding.lookup import FoundBase
from icmlora.errors import BaseModelNotFound
from icmlora.io.safetensors import RawTensor, TensorInfo, read_tensor, read_tensor_header

_MAX_FILE_BYTES = 1 << 40  # base model files are larger than adapter files


class BaseTensors:
    """The tensors of a base model on this machine, by name."""

    def __init__(self, found: FoundBase) -> None:
        if found.is_gguf:
            fact = f"base model {found.label!r}: a GGUF file does not contain the exact tensors"
            raise BaseModelNotFound(
                fact, path=found.path, hint="run `icm base add NAME PATH` with its safetensors folder"
            )
        self.label = found.label
        # A loader may read other files too. Parts of a pipeline use the same names for different tensors.
        files = () if found.is_pipeline else found.weights
        self._files = [file for file in files if file.suffix == ".safetensors"]

    def counterpart(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return the tensor that an adapter's tensor may copy: by module name, or the only one of its shape."""
        # Tied weights are stored once, under one of their names; other classes of a model add a prefix.
        own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        alike = [tensor for tensor, (_, info) in self._places.items() if info.shape == shape]
        if own in alike:
            return own
        named = [tensor for tensor in alike if own.endswith(f".{tensor}") or tensor.endswith(f".{own}")] or alike
        return named[0] if len(named) == 1 else None

    def read(self, name: str) -> RawTensor | None:
        """Read one tensor; return None if it does not exist."""
        if name not in self._places:
            return None
        path, info = self._places[name]
        return read_tensor(path, info, max_bytes=_MAX_FILE_BYTES)

    @cached_property
    def _places(self) -> dict[str, tuple[Path, TensorInfo]]:
        files = [file.resolve() for file in self._files]  # symlinks in the Hugging Face cache
        headers = ((file, read_tensor_header(file, max_bytes=_MAX_FILE_BYTES)) for file in files)
        return {info.name: (file, info) for file, header in headers for info in header.tensors}


def needed_tensors(find: Callable[[], FoundBase]) -> BaseTensors:
    """Open a base model whose tensors an adapter needs; mention this reason in any `BaseModelNotFound`."""
    try:
        return BaseTensors(find())
    except BaseModelNotFound as error:
        error.message = f"the adapter needs tensors from its base model: {error.message}"
        raise
