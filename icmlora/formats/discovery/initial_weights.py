"""Find the initial weights of adapters that were subtracted from the base model (PiSSA, OLoRA, CorDA).

myrun/                 a PiSSA adapter, or myrun/checkpoint-80/
myrun/pissa_init/      its initial weights, as saved by PEFT's examples and LLaMA-Factory; not a task
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused
from icmlora.formats.peft.config import MAX_CONFIG_BYTES
from icmlora.formats.peft.peft import CONFIG_NAME, WEIGHTS_NAME, PeftFormat
from icmlora.io.files import read_regular
from icmlora.io.safetensors import read_tensor_header

if TYPE_CHECKING:
    from icmlora.formats.discovery.found import FoundTask
    from icmlora.formats.format import FoundAdapter

_METHODS = ("pissa", "olora", "corda")


def with_initial_weights(tasks: Sequence[FoundTask], given: Path | None = None) -> list[FoundTask]:
    """Return tasks with the initial weights of their adapters; drop tasks that are only initial weights.

    Args:
        tasks: The tasks.
        given: A folder with initial weights for all adapters that they fit; searched for if None.

    Raises:
        AdapterRefused: The initial weights in the given folder fit no adapter.
    """
    found = [replace(task, adapters=tuple(_with_initial(one, given) for one in task.adapters)) for task in tasks]
    used = {adapter.initial.parent for task in found for adapter in task.adapters if adapter.initial is not None}
    if given is not None and found and given not in used:
        hint = "specify the folder that PEFT saved before training, with adapter_config.json"
        raise AdapterRefused("not the initial weights of an adapter", kind="initial", path=given, hint=hint)
    return [task for task in found if not all(adapter.place in used for adapter in task.adapters)]


def _with_initial(adapter: FoundAdapter, given: Path | None) -> FoundAdapter:
    if adapter.config is None or adapter.format.name != PeftFormat.name:
        return adapter
    # Inside the adapter's folder, or next to it.
    near = [home / f"{method}_init" for home in (adapter.place, adapter.place.parent) for method in _METHODS]
    near = [folder for folder in near if folder.is_dir() and not folder.is_symlink()]
    folders = near if given is None else [given]
    folders = [folder for folder in folders if folder != adapter.place]
    folder = next((folder for folder in folders if _fits(adapter.config, adapter.weights, folder)), None)
    return adapter if folder is None else replace(adapter, initial=folder / WEIGHTS_NAME)


def _fits(config: Path, weights: Path, folder: Path) -> bool:
    from icmlora.formats.peft.initial import changed_base, check_initial  # few adapters have such a folder

    try:
        own = read_regular(config, max_bytes=MAX_CONFIG_BYTES)
        if changed_base(own) is None:
            return False
        initial = read_regular(folder / CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
        check_initial(own, read_tensor_header(weights), initial, read_tensor_header(folder / WEIGHTS_NAME))
    except AdapterRefused:
        return False
    return True
