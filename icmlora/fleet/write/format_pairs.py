"""Convert an adapter into another format, for `icm materialize --format` and `icm convert`.

    language models   content ──read──▶ RunnableAdapter, named as in transformers ──write──▶ content
    image models      content ──read──▶ factors ──renamed by diffusers──▶ content

Parts that the other format cannot represent are refused by name. Of the base model, only the configuration is read, and
only from and to GGUF files, which use llama.cpp's names and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icmlora.base_models.finding.lookup import FoundBase, read_config
from icmlora.errors import AdapterRefused, BaseModelNotFound, BaseModelUnsuited, DataError, located
from icmlora.fleet.params import Param
from icmlora.formats import catalogue
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import AdapterBytes, AdapterFormat, AdapterSummary
from icmlora.formats.pairs.gguf import architecture_of
from icmlora.formats.pairs.mlx import encode_mlx

if TYPE_CHECKING:
    from icmlora.formats.pairs.gguf_lora import GgufBase

# Formats for images -> the formats that diffusers can rename into them.
_RENAMED: Mapping[str, tuple[str, ...]] = {
    "diffusers": ("comfyui", "xlabs", "lycoris", "kohya"),
    "kohya": ("diffusers", "lycoris"),
}
_UNCHANGED = "leave out --format to write it unchanged"


@dataclass(frozen=True, eq=False)
class SourceAdapter:
    """An adapter to convert."""

    name: str
    format: AdapterFormat
    content: AdapterBytes
    find_base: Callable[[], FoundBase]  # finds its base model; called only if its configuration is needed
    path: Path | None = field(default=None, kw_only=True)  # for messages
    initial: bytes | None = field(default=None, kw_only=True)  # weights that training subtracted from the base model

    @property
    def summary(self) -> AdapterSummary:
        """Facts about it; raises as `AdapterFormat.inspect` does."""
        content = self.content
        return self.format.inspect(content.config, content.weights, path=self.path, initial=self.initial)


OutputFormat = Annotated[
    str | None,
    Param(
        f"Output format: {', '.join(known.name for known in catalogue.FORMATS)}. `icm convert --list-formats` "
        "describes them and lists the possible conversions. Default: the adapter's own format.",
        "--format NAME",
        parse=lambda name: format_to_write(name).name,
        completes="format",
    ),
]


def format_to_write(name: str) -> AdapterFormat:
    """Return the format with a name that a user wrote; raises `DataError` if there is none."""
    names = [known.name for known in catalogue.FORMATS]
    if name not in names:
        raise DataError(f"unknown format {name!r}", hint=f"choose one of {', '.join(names)}")
    return format_named(name)


def written_from(target: AdapterFormat) -> tuple[str, ...]:
    """Return the names of the formats whose adapters can be written in a format, including its own."""
    return tuple(known.name for known in catalogue.FORMATS if _obstacle(known, target) is None)


def check_pair(source: AdapterFormat, target: AdapterFormat) -> None:
    """Raise `AdapterRefused` if adapters of one format cannot be converted to the other."""
    fact = _obstacle(source, target)
    if fact is not None:
        others = [known for known in catalogue.FORMATS if known.name != source.name]
        names = [known.name for known in others if _obstacle(source, known) is None]
        hint = f"it can be converted to {', '.join(names)}" if names else _UNCHANGED
        raise AdapterRefused(fact, kind="layers", hint=hint)


def _obstacle(source: AdapterFormat, target: AdapterFormat) -> str | None:
    if source.name == target.name:
        return None
    if source.is_for_images != target.is_for_images:
        own, other = ("image" if known.is_for_images else "language" for known in (source, target))
        return f"{source.name} is a format of {own} models, and {target.name} one of {other} models"
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
        AdapterRefused: The pair of formats, or a part of the adapter, cannot be converted.
        BaseModelNotFound: The configuration of its base model is needed, and is not on this machine.
        BaseModelUnsuited: icm cannot write adapters for its base model for llama.cpp.
    """
    check_pair(source.format, target)
    known, content = source.format, source.content
    with located(source.path):
        if target.is_for_images:
            return catalogue.convert_image(content, known, target, metadata=metadata, dtype=dtype)
        base = _gguf_base(source.find_base) if "gguf" in (known.name, target.name) else None
        if base is not None:
            from icmlora.formats.pairs.gguf_lora import encode_gguf, with_base_names
        if known.name == "gguf" and base is not None:
            loaded = known.read(content.config, content.weights)
            if loaded.extras:
                fact = f"it also has the tensor {next(iter(loaded.extras))}, which only a GGUF adapter has"
                raise AdapterRefused(fact, kind="extras", hint="use `--format gguf` to write it unchanged")
            adapter = with_base_names(loaded.adapter, architecture_of(content.weights), base)
        else:
            adapter = known.runnable(content.config, content.weights, initial=source.initial)
        if base is not None and target.name == "gguf":
            # Keys of a GGUF file are words with dots between them.
            dotted = {key.replace("_", ".", 1): text for key, text in metadata.items()}
            return AdapterBytes(encode_gguf(adapter, base, task=source.name, metadata=dotted, dtype=dtype))
        if target.name == "mlx":
            return encode_mlx(adapter, metadata=metadata, dtype=dtype)
        if target.name != "peft":
            if (other := adapter.beyond_lora()) is not None:
                fact = f"it also has {other}, which the format {target.name} cannot hold"
                raise AdapterRefused(fact, kind="extras", hint=_UNCHANGED)
            return target.encode(adapter.adapter, card="", metadata=metadata, dtype=dtype)
        from icmlora.formats.peft.tensors import write_fresh

        if (other := replace(adapter, magnitudes={}).beyond_lora()) is not None:
            fact = f"icm converts LoRA factors and DoRA magnitudes for PEFT, and it also has {other}"
            raise AdapterRefused(fact, kind="extras", hint=_UNCHANGED)
        # PEFT names the factors of an embedding differently, and only the base model shows which module is one.
        if odd := next((module.name for module in adapter.adapter.modules if "embed" in module.name), None):
            fact = f"{odd} may be an embedding, which icm does not convert for PEFT"
            raise AdapterRefused(fact, kind="layers", hint=_UNCHANGED)
        weights, config = write_fresh(adapter.adapter, dtype, metadata, magnitudes=adapter.magnitudes)
        return AdapterBytes(weights, config, content.card)


def _gguf_base(find: Callable[[], FoundBase]) -> GgufBase:
    """Return the facts about a base model that a GGUF adapter needs; its weights are not read."""
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
