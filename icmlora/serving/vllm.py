"""The plug-in for vLLM: a request for the model `dog-detection` gets the task of that name.

    icm serve --print-config vllm        prints the environment and the command line that turn it on

vLLM imports it in each of its processes through the entry point `vllm.general_plugins`, so nothing heavy is imported
here. It asks the resolver on the event loop of its API server, for any name that any client sends, and treats an
exception as a failure of its own: whatever goes wrong is one line in the log, and None.

Read from the environment: ICM_STORE or ICM_BUNDLE, and ICM_BASE_MODEL, ICM_ADAPTERS (folder for the written adapters)
and ICM_ADAPTERS_SIZE (what they may take, as 4GiB).
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from icmlora.serving.base import EngineBase
    from icmlora.serving.folders import AdapterFolders
    from icmlora.serving.tasks import ServedTasks

NAME = "icm"
_THREADS = 4
"""Names that are looked up at once; the rest waits, whatever clients send."""

_log = logging.getLogger("vllm.icm")  # vLLM shows what is logged below its own name


def register() -> None:
    """Register the resolver with vLLM, once; without a store or a bundle in the environment, do nothing."""
    if not (os.environ.get("ICM_STORE") or os.environ.get("ICM_BUNDLE")):
        return
    if (missing := _missing()) is not None:
        _log.error("icm: %s: until it is there, no task is found", missing)
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolver.register(IcmResolver)
        LoRAResolverRegistry.register_resolver(NAME, IcmResolver())


def _missing() -> str | None:
    """Say what the environment names and is not there, without opening it."""
    if bundle := os.environ.get("ICM_BUNDLE"):
        return None if Path(bundle).is_file() else f"ICM_BUNDLE={bundle} is not a file"
    store = os.environ["ICM_STORE"]
    return None if (Path(store) / "registry.db").is_file() else f"ICM_STORE={store} has no store"


class IcmResolver:
    """A `vllm.lora.resolver.LoRAResolver`. Store and folders are opened with the first name that is asked for."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="icm")
        self._source: tuple[ServedTasks, AdapterFolders, EngineBase] | None = None
        self._opening = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the folder of the task that has a name, written if necessary; None if there is none, or it fails."""
        try:
            loop = asyncio.get_running_loop()
            async with self._opening:
                if self._source is None:
                    self._source = await loop.run_in_executor(self._threads, open_source, base_model_name)
            return await loop.run_in_executor(self._threads, self._resolve, lora_name)
        except Exception as error:
            _log.error("icm: %.128r: %s", lora_name, error or type(error).__name__)
            return None

    def _resolve(self, lora_name: str) -> LoRARequest | None:
        from vllm.lora.request import LoRARequest

        assert self._source is not None
        tasks, folders, base = self._source
        task = tasks.find(lora_name)
        if task is None:
            _log.info("icm: no task has the name %.128r", lora_name)
            return None
        if (problem := base.problem(task)) is not None:
            _log.error("icm: %s", problem)
            return None
        folder = folders.get(task.key, lambda directory: tasks.write(task, directory))
        # vLLM puts its own number in place of this one.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))


def open_source(model: str) -> tuple[ServedTasks, AdapterFolders, EngineBase]:
    """Open what the environment names for an engine that runs a model."""
    from icmlora.io.text import parse_bytes
    from icmlora.serving.base import EngineBase
    from icmlora.serving.folders import AdapterFolders, default_root
    from icmlora.serving.tasks import open_tasks

    # An empty variable counts as none.
    store, bundle, label, root, size = (
        os.environ.get(f"ICM_{name}") or None for name in ("STORE", "BUNDLE", "BASE_MODEL", "ADAPTERS", "ADAPTERS_SIZE")
    )
    tasks = open_tasks(store, bundle, command="vllm")
    folders = AdapterFolders(Path(root) if root else default_root("vllm"), parse_bytes(size) if size else None)
    return tasks, folders, EngineBase(model, tasks, label, log=_log)
