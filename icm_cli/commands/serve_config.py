"""`icm serve-config`: print how to start an engine that serves the tasks."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icm_cli.options import FromOpt, completing
from icm_cli.session import Session, command
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.serving.launch import Launch

EngineArg = Annotated[
    Literal["vllm", "sglang"], typer.Argument(metavar="vllm|sglang", help="The engine.", show_default=False)
]
ServedBaseOpt = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="NAME",
        help="The base model to serve, if there are several.",
        autocompletion=completing("base"),
        show_default=False,
    ),
]
GatewayOpt = Annotated[
    bool, typer.Option("--gateway", help="Put `icm serve` in front of vLLM instead of using the plug-in.")
]


@command
def serve_config(
    session: Session,
    engine: EngineArg,
    bundle: FromOpt = None,
    base_model: ServedBaseOpt = None,
    gateway: GatewayOpt = False,
) -> None:
    """Print the environment and the command line that start an engine with the tasks of the store as its models.

    vLLM asks the plug-in of icm for a task when a request names it. SGLang cannot, so `icm serve` goes in front of it.
    Stdout is shell, ready to be pasted. Notes are on stderr: where the base model is missing, and which tasks this
    engine cannot serve.

    Example:
      icm serve-config vllm
    """
    from icmlora.serving.launch import plan_launch
    from icmlora.serving.tasks import open_tasks

    bundle = None if bundle is None else bundle.resolve()
    store = None if bundle is not None else session.settings.store.value.resolve()
    tasks = open_tasks(store, bundle, command=session.command, lock_timeout=session.settings.lock_timeout.value)
    launch = plan_launch(tasks, engine, store, bundle, base_model=base_model, gateway=gateway)
    _tell(session, engine, launch, is_bundle=bundle is not None)


def _tell(session: Session, engine: str, launch: Launch, *, is_bundle: bool) -> None:
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
            "left_out": [{"task": task, "reason": reason} for task, reason in launch.left_out],
        }
    )
    for name, value in launch.environment.items():
        out.answer(f"export {name}={shlex.quote(value)}")
    for number, words in enumerate(launch.commands, 1):
        out.answer(shlex.join(words) + (" &" if number < len(launch.commands) else ""))
    out.note(f"{counted(launch.tasks, 'task')} of {launch.base_model}; largest rank {launch.max_lora_rank}")
    if not launch.is_local:
        out.warn("the base model is not on this machine, so icm cannot compare adapters with it before they are loaded")
        name = shlex.quote(launch.base_model)
        if is_bundle:
            option = "--model" if engine == "vllm" else "--model-path"
            out.hint(f"`hf download {name}` gets it; or give the engine its folder: {option} FOLDER")
        else:
            out.hint(f"`icm base add {name} PATH` says where it is")
    for task, reason in launch.left_out:
        out.warn(f"{task}: {reason}", kind="left_out", task=task)
