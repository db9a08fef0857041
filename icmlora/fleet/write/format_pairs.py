"""Convert an adapter into another format: what `icm materialize --format` and `icm convert` have in common.

    language models   content ──read──▶ RunnableAdapter, named as in transformers ──write──▶ content
    image models      content ──read──▶ factors ──renamed by diffusers──▶ content

What the other format has no place for is refused by name. Only the configuration of a base model is read, and only from
and to GGUF files, whose names and rows are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused, BaseModelNotFound, BaseModelUnsuited, DataError, located
from icmlora.formats import catalogue
from icmlora.formats.catalogue import convert_image, format_named
from icmlora.formats.format import AdapterBytes, AdapterFormat, AdapterSummary, RunnableAdapter

if TYPE_CHECKING:
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.formats.pairs.gguf_lora import GgufBase

# Formats for images -> those that can be renamed into them: what diffusers has converters for.
_RENAMED: Mapping[str, tuple[str, ...]] = {
    "diffusers": ("comfyui", "xlabs", "lycoris", "kohya"),
    "kohya": ("diffusers", "lycoris"),
}


@dataclass(frozen=True, eq=False)
class SourceAdapter:
    """An adapter that is to be converted."""

    name: str  # what it is called
    format: AdapterFormat  # its format
    content: AdapterBytes  # its files
    find_base: Callable[[], FoundBase]  # finds its base model; called only if its configuration is needed
    path: Path | None = field(default=None, kw_only=True)  # where it came from, for messages
    # What its training took out of the base model to begin with, if that is known.
    initial: bytes | None = field(default=None, kw_only=True)

    @property
    def summary(self) -> AdapterSummary:
        """What it is; raises as `AdapterFormat.inspect` does."""
        content = self.content
        return self.format.inspect(content.config, content.weights, path=self.path, initial=self.initial)


def format_to_write(name: str) -> AdapterFormat:
    """Return the format that somebody asks for.

    Raises:
        DataError: There is none of that name.
    """
    names = [known.name for known in catalogue.FORMATS]
    if name not in names:
        raise DataError(f"unknown format {name!r}", hint=f"choose one of {', '.join(names)}")
    return format_named(name)


def written_from(target: AdapterFormat) -> tuple[str, ...]:
    """Name the formats whose adapters can be written in a format; its own always can."""
    return tuple(known.name for known in catalogue.FORMATS if _why_not(known, target) is None)


def check_pair(source: AdapterFormat, target: AdapterFormat) -> None:
    """Check that there is a way from one format to another, before the work of going it.

    Raises:
        AdapterRefused: There is none.
    """
    fact = _why_not(source, target)
    if fact is not None:
        others = [
            known.name for known in catalogue.FORMATS if known.name != source.name and _why_not(source, known) is None
        ]
        hint = f"it can be converted to {', '.join(others)}" if others else _AS_IT_IS
        raise AdapterRefused(fact, kind="layers", hint=hint)


def _why_not(source: AdapterFormat, target: AdapterFormat) -> str | None:
    if source.name == target.name:
        return None
    if source.is_for_images != target.is_for_images:
        kinds = ("language models", "image models")
        return (
            f"{source.name} is a format of {kinds[source.is_for_images]}, "
            f"and {target.name} one of {kinds[target.is_for_images]}"
        )
    if target.is_for_images and source.name not in _RENAMED.get(target.name, ()):
        return f"diffusers has no converter from {source.name} to {target.name} names"
    return None


def convert_content(
    source: SourceAdapter, target: AdapterFormat, *, metadata: Mapping[str, str], dtype: str
) -> AdapterBytes:
    """Write an adapter in another format than its own; the same arguments give the same bytes.

    Args:
        source: The adapter.
        target: The format.
        metadata: Short facts for the header of the weights.
        dtype: "bfloat16", "float16" or "float32" for the factors. Scales are multiplied into them, so all but float32
            may round once more.

    Raises:
        AdapterRefused: There is no way from one format to the other, or none for a part of the adapter.
        BaseModelNotFound: The configuration of its base model is needed, and is not on this machine.
        BaseModelUnsuited: Its base model is none whose adapters icm writes for llama.cpp.
    """
    check_pair(source.format, target)
    with located(source.path):
        if target.is_for_images:
            return convert_image(source.content, source.format, target, metadata=metadata, dtype=dtype)
        base = _gguf_base(source.find_base) if "gguf" in (source.format.name, target.name) else None
        adapter = _runnable(source, base)
        if target.name == "gguf":
            assert base is not None
            from icmlora.formats.pairs.gguf_lora import encode_gguf

            # Keys of a GGUF file are words with dots between them.
            dotted = {key.replace("_", ".", 1): text for key, text in metadata.items()}
            return AdapterBytes(encode_gguf(adapter, base, task=source.name, metadata=dotted, dtype=dtype))
        if target.name == "mlx":
            from icmlora.formats.pairs.mlx import encode_mlx

            return encode_mlx(adapter, metadata=metadata, dtype=dtype)
        if target.name == "peft":
            return _for_peft(adapter, metadata, source.content.card, dtype)
        if (other := adapter.beyond_lora()) is not None:
            fact = f"it also has {other}, which the format {target.name} cannot hold"
            raise AdapterRefused(fact, kind="extras", hint=_AS_IT_IS)
        return target.encode(adapter.adapter, card="", metadata=metadata, dtype=dtype)


def _gguf_base(find: Callable[[], FoundBase]) -> GgufBase:
    """Find out what a GGUF adapter has to know of its base model; its weights are not read."""
    from icmlora.base_models.finding.lookup import read_config
    from icmlora.formats.pairs.gguf_lora import GgufBase

    try:
        found = find()
    except BaseModelNotFound as error:
        error.message = f"a GGUF adapter needs the configuration of its base model: {error.message}"
        raise
    found.refuse_pipeline()
    with located(found.path):
        if found.loader is not None:
            raise BaseModelUnsuited(f"llama.cpp does not support base model {found.label!r}, which has its own loader")
        return GgufBase.of_file(found.path) if found.is_gguf else GgufBase.of_config(read_config(found.path))


def _runnable(source: SourceAdapter, base: GgufBase | None) -> RunnableAdapter:
    """Read an adapter under the names that its base model has in transformers."""
    known, content = source.format, source.content
    if known.name != "gguf" or base is None:
        return known.runnable(content.config, content.weights, initial=source.initial)
    from icmlora.formats.pairs.gguf import architecture_of
    from icmlora.formats.pairs.gguf_lora import with_base_names

    loaded = known.read(content.config, content.weights)
    if loaded.extras:
        fact = f"it also has the tensor {next(iter(loaded.extras))}, which only a GGUF adapter has"
        raise AdapterRefused(fact, kind="extras", hint="use `--format gguf` to write it unchanged")
    return with_base_names(loaded.adapter, architecture_of(content.weights), base)


def _for_peft(adapter: RunnableAdapter, metadata: Mapping[str, str], card: bytes | None, dtype: str) -> AdapterBytes:
    from icmlora.formats.peft.tensors import write_fresh

    if (other := replace(adapter, magnitudes={}).beyond_lora()) is not None:
        fact = f"icm converts LoRA factors and DoRA magnitudes for PEFT, and it also has {other}"
        raise AdapterRefused(fact, kind="extras", hint=_AS_IT_IS)
    # PEFT has the factors of an embedding under other names, and only the base model tells an embedding.
    if odd := next((module.name for module in adapter.adapter.modules if "embed" in module.name), None):
        fact = f"{odd} may be an embedding, which icm does not convert for PEFT"
        raise AdapterRefused(fact, kind="layers", hint=_AS_IT_IS)
    weights, config = write_fresh(adapter.adapter, dtype, metadata, magnitudes=adapter.magnitudes)
    return AdapterBytes(weights, config, card)


_AS_IT_IS = "leave out --format to write it unchanged"
