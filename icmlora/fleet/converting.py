"""Write an adapter for a program that does not read its format: one file for llama.cpp, or a folder for MLX-LM."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, DataError, located
from icmlora.formats.format import check_target
from icmlora.io import staging

if TYPE_CHECKING:
    from icmlora.base_models.lookup import FoundBase
    from icmlora.formats.format import RunnableAdapter
    from icmlora.formats.gguf_lora import GgufBase

FormatName = Literal["peft", "gguf", "mlx"]


def check_output(path: Path, adapter_format: FormatName, *, force: bool) -> None:
    """Check that the output can be written, before the work of making its content."""
    if adapter_format not in get_args(FormatName):
        raise DataError(f"unknown format {adapter_format!r}", hint=f"choose one of {', '.join(get_args(FormatName))}")
    if adapter_format == "peft":
        check_target(path, force=force)
    elif adapter_format == "mlx":
        staging.check_free(path, force=force)
    elif path.suffix != ".gguf" or path.is_dir():
        raise DataError("a GGUF adapter is one file", path=path, hint="name it: `-o NAME.gguf`")
    else:
        staging.check_absent(path, force=force)


def gguf_base(find: Callable[[], FoundBase]) -> GgufBase:
    """Find out what a GGUF adapter has to know of its base model; its weights are not read.

    Raises:
        BaseModelNotFound: It is not on this machine.
        BaseModelUnsuited: It is none whose adapters icm writes for llama.cpp.
    """
    from icmlora.base_models.lookup import read_config
    from icmlora.formats.gguf_lora import GgufBase

    try:
        found = find()
    except BaseModelNotFound as error:
        error.message = f"a GGUF adapter needs the configuration of its base model: {error.message}"
        raise
    with located(found.path):
        if found.loader is not None:
            raise BaseModelUnsuited(f"llama.cpp does not know base model {found.label!r}, which has its own loader")
        return GgufBase.of_file(found.path) if found.is_gguf else GgufBase.of_config(read_config(found.path))


def write_converted(
    path: Path,
    adapter: RunnableAdapter,
    *,
    base: GgufBase | None,
    metadata: Mapping[str, str],
    dtype: str | None,
    force: bool,
) -> str:
    """Write an adapter for llama.cpp if its `base` is given, else for MLX-LM; return the digest of its weights."""
    dtype = dtype or "float32"  # the scale is multiplied into B: a smaller format would round once more
    with located(path):
        if base is None:
            from icmlora.formats.mlx import WEIGHTS_NAME, encode_mlx

            files = encode_mlx(adapter, metadata=metadata, dtype=dtype)
            staging.write_folder(path, files, force=force)
            return hashlib.sha256(files[WEIGHTS_NAME]).hexdigest()
        from icmlora.formats.gguf_lora import encode_gguf

        # Keys of a GGUF file are words with dots between them.
        dotted = {key.replace("_", ".", 1): text for key, text in metadata.items()}
        data = encode_gguf(adapter, base, task=metadata["icm_task"], metadata=dotted, dtype=dtype)
        with staging.writing_file(path, force=force) as stream:
            stream.write(data)
        return hashlib.sha256(data).hexdigest()
