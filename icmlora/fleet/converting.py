"""Write an adapter in another format than its own: one file for llama.cpp, or a folder for PEFT or MLX-LM."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from icmlora.errors import AdapterRefused, BaseModelNotFound, BaseModelUnsuited, DataError, located
from icmlora.formats.format import AdapterBytes, check_target
from icmlora.io import staging

if TYPE_CHECKING:
    from icmlora.base_models.lookup import FoundBase
    from icmlora.formats.format import AdapterFormat, RunnableAdapter
    from icmlora.formats.gguf_lora import GgufBase

FormatName = Literal["peft", "gguf", "mlx"]


def check_output(path: Path, adapter_format: FormatName | None, *, force: bool) -> None:
    """Check that the output can be written, before the work of making its content; None is the adapter's own format."""
    if adapter_format is not None and adapter_format not in get_args(FormatName):
        raise DataError(f"unknown format {adapter_format!r}", hint=f"choose one of {', '.join(get_args(FormatName))}")
    if adapter_format in (None, "peft"):
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
    found.refuse_pipeline()
    with located(found.path):
        if found.loader is not None:
            raise BaseModelUnsuited(f"llama.cpp does not know base model {found.label!r}, which has its own loader")
        return GgufBase.of_file(found.path) if found.is_gguf else GgufBase.of_config(read_config(found.path))


def read_converted(
    adapter_format: AdapterFormat, files: AdapterBytes, base: GgufBase | None, initial: bytes | None
) -> RunnableAdapter:
    """Read an adapter under the names that its base model has in transformers.

    Args:
        adapter_format: Its format.
        files: Its content.
        base: Its base model, for an adapter of a GGUF file.
        initial: What its training took out of the base model, if that is known.
    """
    if adapter_format.name != "gguf" or base is None:
        return adapter_format.runnable(files.config, files.weights, initial=initial)
    from icmlora.formats.gguf import architecture_of
    from icmlora.formats.gguf_lora import with_base_names

    loaded = adapter_format.read(files.config, files.weights)
    if loaded.extras:
        fact = f"it also has the tensor {next(iter(loaded.extras))}, which only a GGUF adapter has"
        raise AdapterRefused(fact, kind="extras", hint="`--format gguf` writes it as it is")
    return with_base_names(loaded.adapter, architecture_of(files.weights), base)


def write_converted(
    path: Path,
    written: FormatName,
    adapter: RunnableAdapter,
    *,
    base: GgufBase | None,
    metadata: Mapping[str, str],
    card: str,
    dtype: str | None,
    force: bool,
) -> str:
    """Write an adapter in another format; return the digest of its weights.

    Args:
        path: The folder, or with `gguf` the file.
        written: The format.
        adapter: What to write.
        base: Its base model, for `gguf`.
        metadata: Short facts for the header of the weights.
        card: Text of the model card, which a PEFT folder has.
        dtype: Number format of the factors. Default: float32, as the scale is multiplied into B.
        force: Replace what is there.
    """
    dtype = dtype or "float32"  # a smaller format would round once more
    with located(path):
        if written == "gguf":
            assert base is not None
            return _write_gguf(path, adapter, base, metadata, dtype, force=force)
        if written == "peft":
            files = _peft_files(adapter, metadata, card, dtype)
        else:
            from icmlora.formats.mlx_writer import encode_mlx

            files = encode_mlx(adapter, metadata=metadata, dtype=dtype)
        staging.write_folder(path, files, force=force)
        return hashlib.sha256(next(iter(files.values()))).hexdigest()  # weights come first


def _write_gguf(
    path: Path, adapter: RunnableAdapter, base: GgufBase, metadata: Mapping[str, str], dtype: str, *, force: bool
) -> str:
    from icmlora.formats.gguf_lora import encode_gguf

    # Keys of a GGUF file are words with dots between them.
    dotted = {key.replace("_", ".", 1): text for key, text in metadata.items()}
    data = encode_gguf(adapter, base, task=metadata["icm_task"], metadata=dotted, dtype=dtype)
    with staging.writing_file(path, force=force) as stream:
        stream.write(data)
    return hashlib.sha256(data).hexdigest()


def _peft_files(adapter: RunnableAdapter, metadata: Mapping[str, str], card: str, dtype: str) -> dict[str, bytes]:
    from icmlora.formats.peft import PEFT
    from icmlora.formats.peft_tensors import write_fresh

    if (other := replace(adapter, magnitudes={}).beyond_lora()) is not None:
        fact = f"icm converts LoRA factors and DoRA magnitudes for PEFT, and it also has {other}"
        raise AdapterRefused(fact, kind="extras", hint="without --format it is written as it is")
    # PEFT has the factors of an embedding under other names, and only the base model tells an embedding.
    if odd := next((module.name for module in adapter.adapter.modules if "embed" in module.name), None):
        fact = f"{odd} may be an embedding, which icm does not convert for PEFT"
        raise AdapterRefused(fact, kind="layers", hint="without --format it is written as it is")
    weights, config = write_fresh(adapter.adapter, dtype, metadata, {}, magnitudes=adapter.magnitudes)
    return PEFT.lay_out(AdapterBytes(weights, config, card.encode()), "")
