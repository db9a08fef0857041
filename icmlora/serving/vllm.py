"""The plug-in for vLLM: a request for the model `dog-detection` gets the task of that name.

    icm serve --print-config vllm        prints the environment and the command line that enable it

vLLM imports it in each of its processes through the entry point `vllm.general_plugins`, so this module has no heavy
imports. vLLM calls the resolver on the event loop of its API server, for any name that a client sends, and treats
exceptions as its own failure. So every error becomes one log line and the result None.

vLLM resolves a name once and caches the result until it is restarted. `_follow_tasks` makes it check at each request
whether the task has changed, and replace the adapter. The new adapter has a different path, so that vLLM does not use
the old prefix cache, and a different number, so that requests in flight keep the old adapter.

Environment variables: ICM_STORE or ICM_BUNDLE, and ICM_BASE_MODEL, ICM_ADAPTERS (folder for the written adapters) and
ICM_ADAPTERS_SIZE (their size limit, such as 4GiB).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from icmlora.errors import TaskChanged
from icmlora.io.text import parse_bytes
from icmlora.serving.folders import AdapterFolders, default_root
from icmlora.serving.requirements import CHECKED_VERSIONS
from registry.errors import StoreUnavailable
from registry.names import address_of

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from icmlora.serving.base import EngineBase
    from icmlora.serving.tasks import ServedTask, ServedTasks

NAME = "icm"
_CHECKING = (
    ("vllm.entrypoints.serve.engine.serving", "BaseServing"),
    ("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing"),
)
"""The classes of vLLM whose method `_check_model` checks whether the model of a request exists."""
_WRITING = 16
"""Tasks written at once: only one is decoded at a time, but others may wait for downloads."""

_away: ContextVar[StoreUnavailable | None] = ContextVar("icm_away", default=None)
"""The error that prevented looking up a request's task."""
_log = logging.getLogger("vllm.icm")  # vLLM shows only loggers below its own name


def register() -> None:
    """Register the resolver with vLLM once, if the environment names a store or a bundle."""
    store, bundle = os.environ.get("ICM_STORE"), os.environ.get("ICM_BUNDLE")
    if not (store or bundle):
        return
    fact = None
    if bundle:
        fact = None if Path(bundle).is_file() else f"ICM_BUNDLE={bundle} is not a file"
    elif store and isinstance(address := address_of(store), Path) and not (address / "registry.db").is_file():
        fact = f"ICM_STORE={store} is not a store"
    if fact is not None:
        _log.error("icm: %s; no tasks will be found until it exists", fact)
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolver.register(IcmResolver)
        LoRAResolverRegistry.register_resolver(NAME, IcmResolver())


class IcmResolver:
    """A `vllm.lora.resolver.LoRAResolver` that opens the store and folders at the first lookup."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_WRITING, thread_name_prefix="icm-write")
        self._source: Source | None = None
        self._opening = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the folder of the task with a name, written if necessary; None if it does not exist or fails."""
        from vllm.lora.request import LoRARequest

        loop = asyncio.get_running_loop()
        try:
            async with self._opening:
                if self._source is None:
                    self._source = await loop.run_in_executor(self._threads, open_source, base_model_name)
                    _follow_tasks(self)
            while True:
                task = await self._source.tasks.latest(lora_name)
                if task is None:
                    _log.info("icm: there is no task named %.128r", lora_name)
                    return None
                try:
                    folder = await loop.run_in_executor(self._threads, self._source.folder, task)
                except TaskChanged:
                    continue
                # vLLM replaces this number with its own.
                return (
                    None if folder is None else LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))
                )
        except StoreUnavailable as error:
            _away.set(error)  # already logged once
            return None
        except Exception as error:
            _log.error("icm: %.128r: %s", lora_name, error or type(error).__name__)
            return None

    async def renew(self, models: Any, name: object) -> None:
        """Replace a task's adapter in vLLM if the task has changed.

        Args:
            models: vLLM's `OpenAIServingModels`, or its substitute if there are no adapters.
            name: The model of a request.
        """
        served, source = models.lora_requests.get(name), self._source
        if source is None or served is None or await self._is_current(source, served):
            return
        async with models.lora_resolver_lock[name]:
            served = models.lora_requests.get(name)
            if served is None or await self._is_current(source, served):
                return  # already done by another request
            request = await self.resolve_lora(models.model_config.model, served.lora_name)
            if request is None:
                del models.lora_requests[name]  # vLLM resolves it again and then reports an unknown name
                return
            request.lora_int_id = models.lora_id_counter.inc(1)
            try:
                await models.engine_client.add_lora(request)
            except Exception as error:
                _log.error("icm: vLLM refused the new adapter of %.128r: %s", name, error)
                del models.lora_requests[name]
                return
            models.lora_requests[name] = request
            _log.info("icm: loaded the new adapter of %r", name)

    async def _is_current(self, source: Source, served: LoRARequest) -> bool:
        """Return whether vLLM has the current adapter of a task, or an adapter not from icm."""
        folder = Path(served.lora_path)
        if folder.parent != source.folders.root:
            return True
        try:
            task = await source.tasks.latest(served.lora_name)
        except StoreUnavailable:
            return True
        except Exception as error:  # must not fail the request
            _log.error("icm: cannot check whether %.128r has changed: %s", served.lora_name, error)
            return True
        return task is not None and source.folders.path(task.key) == folder


def _follow_tasks(resolver: IcmResolver) -> None:
    """Make vLLM call `resolver.renew` at each request by replacing one of its methods, because there is no hook."""
    # vLLM calls a resolver from these modules, so they are already imported; a worker imports none of them.
    classes = [vars(sys.modules[module]).get(name) for module, name in _CHECKING if module in sys.modules]
    checking: list[Any] = [found for found in classes if found is not None and hasattr(found, "_check_model")]
    if not checking:
        fact = "icm: this version of vLLM serves outdated adapters of changed tasks until it is restarted; use vLLM %s"
        _log.warning(fact, CHECKED_VERSIONS["vllm"])
    for found in checking:
        _renew_and_check(found, resolver)
        if hasattr(found, "create_error_response"):  # also covers the first request, whose check has already begun
            _report_outages(found)


def _renew_and_check(serving_class: Any, resolver: IcmResolver) -> None:
    check = serving_class._check_model

    @wraps(check)
    async def renew_and_check(serving: Any, request: Any) -> Any:
        _away.set(None)
        await resolver.renew(serving.models, request.model)
        return await check(serving, request)

    serving_class._check_model = renew_and_check


def _report_outages(serving_class: Any) -> None:
    """Report an unavailable store instead of vLLM's response for unknown models."""
    respond = serving_class.create_error_response

    @wraps(respond)
    def report(*args: Any, **options: Any) -> Any:
        away = _away.get()
        if away is None or options.get("status_code") != HTTPStatus.NOT_FOUND:
            return respond(*args, **options)
        fact = f"The store is unavailable: {away.message.rstrip('.')}."
        unavailable = HTTPStatus.SERVICE_UNAVAILABLE
        return respond(message=fact, err_type="ServiceUnavailableError", status_code=unavailable)

    serving_class.create_error_response = staticmethod(report)


class Source(NamedTuple):
    """The source of adapters for one engine."""

    tasks: ServedTasks
    folders: AdapterFolders
    base: EngineBase

    def folder(self, task: ServedTask) -> Path | None:
        """Return the folder of a task, written if necessary; None if the engine cannot serve it."""
        if (problem := self.base.problem(task)) is not None:
            _log.error("icm: %s", problem)
            return None
        return self.folders.get(task.key, lambda directory: self.tasks.write(task, directory))


def open_source(model: str) -> Source:
    """Open the tasks and folders from the environment for an engine with a model."""
    from icmlora.serving.base import EngineBase
    from icmlora.serving.tasks import open_tasks

    # An empty variable counts as unset.
    store, bundle, label, root, size = (
        os.environ.get(f"ICM_{name}") or None for name in ("STORE", "BUNDLE", "BASE_MODEL", "ADAPTERS", "ADAPTERS_SIZE")
    )
    tasks = open_tasks(store, bundle, command="vllm", log=_log)
    folders = AdapterFolders(Path(root) if root else default_root("vllm"), parse_bytes(size) if size else None)
    return Source(tasks, folders, EngineBase(model, tasks, label, log=_log))
