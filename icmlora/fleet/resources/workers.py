"""Call a function on tasks, in this process or on Ray workers. The caller records the results.

    in this process    compute ──▶ record ──▶ compute ──▶ record
    on workers         compute ─┐
                       compute ─┼─▶ record     each worker keeps its models loaded and only reads the store
                       compute ─┘

The caller is the only writer, and holds the job lock if there is one. If a worker dies, nothing of its task is in the
store yet, and another worker computes it again.

Each worker opens the store itself. A folder has to be at the same path on every machine. A team's store is opened by
its address, with the credentials in the worker's own environment, and read through the cache of its own home. Base
models and icm have to be on every machine.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from icmlora.errors import InvalidWorkers, WorkerDied, WorkersUnavailable
from icmlora.fleet.context import Context, ignore
from icmlora.fleet.failures import Failed
from icmlora.fleet.resources.loading import BaseFacts, ModelCache
from icmlora.io.devices import resolve_device
from registry.errors import StoreUnavailable

if TYPE_CHECKING:
    from registry.manifests import Task
    from registry.store import Store

ATTEMPTS = 3
"""How often a task is computed if its worker dies each time."""

_POLL_SECONDS = 0.2  # between two checks whether the user wants to stop
_OBJECT_STORE_BYTES = 128 << 20  # of a local cluster; results are codes and vectors, a few megabytes at most

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_worker_niceness": "0",  # workers have the priority of this process; Ray's default is 15, the last in the queue
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do by default with processes that have no card
}

OnProgress = Callable[[str], None]
"""Called with a note between the steps of a task; may raise `Cancelled`."""

P = ParamSpec("P")
R = TypeVar("R")
Work = Callable[Concatenate[ModelCache, Sequence["Task"], OnProgress, P], Iterator[tuple["Task", R]]]
"""A function of a module that yields tasks of one base model with their results, and writes nothing."""


@contextmanager
def worker_pool(context: Context, store: Store, *, device: str, workers: str | None) -> Iterator[_ThisProcess | _Pool]:
    """Start workers for a block.

    `workers` is as in `check_place`, and `device` is the device of each worker.

    Raises:
        RegistryError: The address of the store has a password, which is not sent to workers.
        WorkersUnavailable: Ray is not installed, or there is no cluster.
    """
    if workers is None:
        yield _ThisProcess(ModelCache(store, resolve_device(device), context.cache))
        return
    address = context.address
    if isinstance(address, Path):
        address = address.absolute()
    else:
        address.check_shareable()
    with _cluster(workers) as ray:
        if workers.isdecimal():  # divide this machine
            count = int(workers)
            cards = torch.cuda.device_count() if device in ("auto", "cuda") else 0
            cpus, gpus = 1, 1 / math.ceil(count / cards) if cards else 0
            threads = max(1, torch.get_num_threads() // count)
        else:
            count, cpus, gpus = _of_cluster(ray, workers, device)
            threads = cpus
        here = replace(context, address=address, on_event=ignore, deadline=None)
        actor = ray.remote(_Worker).options(num_cpus=cpus, num_gpus=gpus)
        pool = _Pool(ray, lambda: actor.remote(here, device, threads), count, store)
        try:
            yield pool
        finally:
            pool.stop()


def check_place(device: str, workers: str | None) -> None:
    """Check where to compute, before a store is opened.

    Args:
        device: The device of this process or of each worker.
        workers: None for this process, the number of processes to start here, or `ray://HOST:PORT`.

    Raises:
        DeviceUnavailable: This process is to compute, and the machine does not have the device.
        InvalidWorkers: `workers` is neither a number nor an address, or `device` is one card for all of them.
    """
    if workers is None:
        resolve_device(device)
    elif ":" in device:
        hint = "use --device cuda to give each worker its own GPU"
        raise InvalidWorkers(f"workers cannot share device {device!r}", hint=hint)
    elif not (workers.isdecimal() and 1 <= int(workers) <= 1024) and not workers.startswith("ray://"):
        fact = f"{workers!r} is neither a number of workers nor an address"
        raise InvalidWorkers(fact, hint="write 4, or ray://HOST:10001")


def naming(task: Task, on_progress: OnProgress) -> OnProgress:
    """Return a function that reports the work on one task, with its name in front."""
    return lambda note: on_progress(f"{task.name}: {note}")


@dataclass(frozen=True)
class _ThisProcess:
    """Calls a function here, on all tasks at once."""

    models: ModelCache

    def each(
        self, work: Work[P, R], tasks: Sequence[Task], on_progress: OnProgress, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[tuple[Task, R | Failed]]:
        """Call `work` with models, tasks, `on_progress` and the other arguments; yield tasks with their results."""
        yield from work(self.models, tasks, on_progress, *args, **kwargs)


class _Worker:
    """An actor in the process of a worker."""

    def __init__(self, context: Context, device: str, threads: int) -> None:
        self._context, self._device, self._threads = context, device, threads
        self._facts: list[BaseFacts] = []

    @cached_property
    def _models(self) -> ModelCache:  # not in the constructor, so that an error fails a task instead of the worker
        torch.set_num_threads(self._threads)
        store = self._context.open(read_only=True)
        return ModelCache(store, resolve_device(self._device), self._context.cache, self._facts.append)

    def run(
        self, task: Task, call: tuple[Callable[..., Iterator[tuple[Task, R]]], Any, Any]
    ) -> tuple[R, list[BaseFacts]]:
        """Return the result of a task, and the facts of base models that were loaded for it."""
        work, args, kwargs = call
        self._facts.clear()
        try:
            # The notes are not shown: the bar counts the tasks of all workers.
            ((_, result),) = work(self._models, [task], lambda note: None, *args, **kwargs)
        except StoreUnavailable as error:
            hint = "each worker needs credentials for the database and the bucket in its own environment"
            raise StoreUnavailable(f"a worker on {socket.gethostname()}: {error}", path=error.path, hint=hint) from None
        return result, list(self._facts)

    def close(self) -> None:
        """Close the store and forget its models until the next task."""
        if "_models" in self.__dict__:
            self.__dict__.pop("_models").store.close()


class _Pool:
    """Actors of a Ray cluster; a dead one is replaced."""

    def __init__(self, ray: Any, start: Callable[[], Any], workers: int, store: Store) -> None:
        self._ray, self._start, self._store = ray, start, store
        self._idle = [start() for _ in range(workers)]
        self._running: dict[Any, tuple[Any, Task]] = {}

    def each(
        self, work: Work[P, R], tasks: Sequence[Task], on_progress: OnProgress, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[tuple[Task, R | Failed]]:
        """Call `work` as `_ThisProcess` does, with one task at a time; its arguments and results are pickled."""
        call = self._ray.put((work, args, kwargs))  # once: a file of held-out text may be among the arguments
        # Large ones first: a large one at the end keeps the other workers waiting.
        waiting = deque(sorted(tasks, key=lambda task: -task.final.parameters))
        died = Counter[str]()
        while waiting or self._running:
            self._hand_out(waiting, call)
            done, _ = self._ray.wait(list(self._running), timeout=_POLL_SECONDS)
            on_progress(f"{len(self._running)} in work")
            for reference in done:
                worker, task = self._running.pop(reference)
                try:
                    result, facts = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:  # raised by the computation
                    raise error.cause from error
                except self._ray.exceptions.RayError:
                    self._ray.kill(worker)  # it may only be unreachable
                    self._idle.append(self._start())
                    died[task.name] += 1
                    if died[task.name] < ATTEMPTS:
                        waiting.appendleft(task)
                        continue
                    fact = f"its worker died {ATTEMPTS} times"
                    result = Failed(WorkerDied(fact, hint="use fewer workers if memory ran out"))
                else:
                    self._idle.append(worker)
                    for one in facts:
                        one.record(self._store)
                self._hand_out(waiting, call)  # before the caller records this one
                yield task, result
        # The caller may wait for a lock now, while no process of its own may hold the store.
        with suppress(self._ray.exceptions.RayError):
            self._ray.get([worker.close.remote() for worker in self._idle])

    def _hand_out(self, waiting: deque[Task], call: Any) -> None:
        while waiting and self._idle:
            worker, task = self._idle.pop(), waiting.popleft()
            self._running[worker.run.remote(task, call)] = worker, task

    def stop(self) -> None:
        """Kill the workers; unfinished results are lost."""
        for worker in (*self._idle, *(worker for worker, _ in self._running.values())):
            self._ray.kill(worker)


def _of_cluster(ray: Any, address: str, device: str) -> tuple[int, int, int]:
    """Return the number of workers, and the CPUs and GPUs of each: one worker per GPU, or one per machine."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise WorkersUnavailable(f"no machine of {address} has a free CPU")
    with_cards = [node for node in nodes if node.get("GPU", 0) >= 1] if device != "cpu" else []
    if with_cards:
        cpus = max(1, min(int(node["CPU"] // node["GPU"]) for node in with_cards))
        return sum(int(node["GPU"]) for node in with_cards), cpus, 1
    return len(nodes), min(int(node["CPU"]) for node in nodes), 0


@contextmanager
def _cluster(workers: str) -> Iterator[Any]:
    """Start a cluster on this machine, or connect to one, for a block. A cluster of this process is used again."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        hint = "install the extra: pip install 'icm-lora[ray]'"
        raise WorkersUnavailable("workers need Ray, which is not installed", hint=hint) from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": workers}
    if workers.isdecimal():
        options = {"address": "local", "num_cpus": int(workers), "object_store_memory": _OBJECT_STORE_BYTES}
        options["include_dashboard"] = False
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises errors of many kinds, plain `Exception` among them
        first, *more = str(error).strip().splitlines() or [type(error).__name__]
        fact = f"{first} {more[-1]}" if first.endswith(":") and more else first  # the cause is on the last line
        raise WorkersUnavailable(f"no Ray cluster for --workers {workers}: {fact}") from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, handler)  # Ray replaces it
    try:
        yield ray
    finally:
        ray.shutdown()
