"""An original as PEFT may load it: the same adapter under a configuration that this package wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter import Adapter
from icmlora.peft_folder import load_adapter, save_adapter
from registry.records import AdapterRecord

if TYPE_CHECKING:
    from registry.store import Store


def read_original(store: Store, final: AdapterRecord) -> Adapter:
    """Read an original with its scale folded in."""
    return load_adapter(store.read_blob(final.config), store.read_blob(final.weights))


def write_plain_copy(store: Store, final: AdapterRecord, folder: Path) -> None:
    """Write an original for PEFT to load here.

    PEFT runs the patterns of a configuration as regular expressions, and one from outside may never end. The copy
    names its modules literally; in float32 its weights, scale included, are those of the original.
    """
    save_adapter(read_original(store, final), folder, dtype="float32", card="", metadata={})
