"""Read and write one adapter folder in any format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused, located
from icmlora.formats import catalogue
from icmlora.formats.catalogue import format_named
from icmlora.formats.discovery.placeholder import PLACEHOLDER_NAME
from icmlora.formats.discovery.tree import Folder
from icmlora.formats.format import write_adapter_files
from icmlora.formats.peft.config import MAX_CONFIG_BYTES
from icmlora.formats.weights import read_weights
from icmlora.io.files import read_regular
from registry.names import some

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter


def load_adapter(folder: str | Path) -> Adapter:
    """Read the adapter in a folder or single file into memory: float32, with LoRA's scale folded into B.

    Args:
        folder: A folder with one adapter in any supported format, or a file. Subfolders are not searched.

    Raises:
        UnsafeInput: A pickle, a link, or a file beyond the limits.
        AdapterRefused: There is no adapter, or several, it is damaged, or icm could not reproduce it exactly; `kind`
            states the reason.
    """
    place = Path(folder)
    if place.is_file():
        searched = Folder(place.parent, {place.name: place})
    else:
        searched = Folder(
            place, {path.name: path for path in place.iterdir() if path.is_file()} if place.is_dir() else {}
        )
    found = [adapter for known in catalogue.FORMATS for adapter in known.find(searched)]
    if len({adapter.weights for adapter in found}) > 1:
        names = some([adapter.weights.name for adapter in found])
        raise AdapterRefused(
            f"it holds several adapters: {names}", kind="several", path=place, hint="specify one of them"
        )
    for one in found:
        config = b"" if one.config is None else read_regular(one.config, max_bytes=MAX_CONFIG_BYTES)
        return one.format.read(config, read_weights(one.weights, one.format), path=place).adapter
    if PLACEHOLDER_NAME in searched.files:
        hint = f"run `icm restore {place}` to restore it"
        raise AdapterRefused("this is a placeholder, not an adapter", kind="placeholder", path=place, hint=hint)
    for refusal in (refusal for known in catalogue.FORMATS for refusal in known.refuse(searched)):
        raise refusal
    if place.is_file():
        hint = "run `icm convert --list-formats` to list the supported formats"
        raise AdapterRefused("is not an adapter in a supported format", kind="empty", path=place, hint=hint)
    hint = "specify the folder that contains adapter_config.json, or a file"
    raise AdapterRefused("there is no adapter in this folder", kind="empty", path=place, hint=hint)


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    adapter_format: str = "peft",
    dtype: str = "bfloat16",
    card: str = "",
    metadata: Mapping[str, str] | None = None,
    companions: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> None:
    """Write an adapter atomically and durably. The same arguments give the same bytes.

    Args:
        adapter: The adapter.
        folder: Absent or empty, unless `force`; or a file such as `NAME.safetensors`, for a single-file format.
        adapter_format: Name of the format.
        dtype: Number format of the weights: "bfloat16", "float16" or "float32".
        card: Text of the model card.
        metadata: Short facts for the header of the weights file.
        companions: Name to content of files to write next to it.
        force: Replace the adapter in a folder that is not empty.

    Raises:
        OutputExists: The folder is not empty, or the file exists, and `force` is not set.
        AdapterRefused: A value overflows `dtype`.
    """
    known, place = format_named(adapter_format), Path(folder)
    with located(place):
        files = known.encode(adapter, dtype=dtype, card=card, metadata=metadata or {})
    write_adapter_files(place, known, replace(files, companions=companions or {}), place.name, force=force)
