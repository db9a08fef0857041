"""`icm serve --print-config`: print the commands that start an inference engine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from icm_cli.session import Session
from icmlora.io.text import counted

Engine = Literal["vllm", "sglang"]


def print_config(
    session: Session, engine: Engine, bundle: Path | None, base_model: str | None, *, gateway: bool
) -> None:
    """Print the environment and the commands that start an engine with the tasks of a store or a bundle."""
    from icmlora.serving.launch import plan_launch
    from icmlora.serving.tasks import open_tasks

    bundle = None if bundle is None else bundle.resolve()
    store = None if bundle is not None else session.settings.store.value
    tasks = open_tasks(store, bundle, command=session.command, lock_timeout=session.settings.lock_timeout.value)
    launch = plan_launch(tasks, engine, store, bundle, base_model=base_model, gateway=gateway)
    out = session.out
    out.document(
        {
            "engine": engine,
            "base_model": launch.base_model,
            "model": launch.model,
            "environment": dict(launch.environment),
            "commands": [list(command) for command in launch.commands],
            "tasks_count": launch.tasks,
            "max_lora_rank": launch.max_lora_rank,
            "credentials": list(launch.credentials),
            "left_out": [{"task": task, "reason": reason} for task, reason in launch.left_out],
        }
    )
    for name, value in launch.environment.items():
        out.answer(f"export {name}={shlex.quote(value)}")
    for number, words in enumerate(launch.commands, 1):
        out.answer(shlex.join(words) + (" &" if number < len(launch.commands) else ""))
    if launch.credentials:
        out.note("the printed address has no user or password: set PGUSER and PGPASSWORD, or use ~/.pgpass")
        out.note("for a bucket, set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, or AWS_PROFILE")
    out.note(f"{counted(launch.tasks, 'task')} of {launch.base_model}; largest rank {launch.max_lora_rank}")
    if not launch.is_local:
        out.warn("the base model is not on this machine, so adapters cannot be checked against it before loading")
        name = shlex.quote(launch.base_model)
        if bundle is not None:
            option = "--model" if engine == "vllm" else "--model-path"
            out.hint(f"download it with `hf download {name}`, or pass its folder to the engine: {option} FOLDER")
        else:
            out.hint(f"run `icm base add {name} PATH` to set its location")

    for task, reason in launch.left_out:
        out.warn(f"{task}: {reason}", kind="left_out", task=task)
