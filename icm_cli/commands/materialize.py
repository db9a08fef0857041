"""`icm materialize`: write a task's adapter in its own format or another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from icm_cli.command import plain_command as command
from icm_cli.errors import UsageProblem
from icm_cli.options import DtypeName, ForceOpt, FromOpt, SeedOpt, argument, option
from icm_cli.session import Session
from icm_cli.text import claim_json, claim_text
from icmlora.fleet.measure.metric_result import measured_in

if TYPE_CHECKING:
    from icmlora.fleet.write.materialize import MaterializeReport


# "generate" is the former name of "recalled".
SourceName = Literal["auto", "original", "code", "recalled", "generate", "network"]

WrittenOpt = Annotated[
    Path,
    option(
        "--output -o PATH",
        "New or empty folder to write, or a file: NAME.gguf, or NAME.safetensors for image adapters.",
    ),
]
FormatOpt = Annotated[
    str | None,
    option(
        "--format NAME",
        "peft: a PEFT folder. mlx: a folder for MLX-LM. gguf: a file for llama.cpp. For image adapters: diffusers, "
        "kohya, comfyui, xlabs or lycoris, one file each. `icm convert --list-formats` lists possible conversions. "
        "Default: the adapter's own format.",
        completes="format",
    ),
]
SourceOpt = Annotated[
    SourceName,
    option(
        "--source",
        "original: the ingested files. code: the decoded code. recalled: the code of the task recognized from the "
        "vectors. network: the network's prediction from the vectors. auto: the original if the store has it, else "
        "the code.",
    ),
]
DtypeOpt = Annotated[
    DtypeName | None,
    option(
        "--dtype",
        "Number format of decoded or converted weights. Default: as in the original, or float32 for converted ones.",
    ),
]
PadOpt = Annotated[
    int | None,
    option(
        "--pad-rank N",
        "Pad all modules with zeros to rank N, for engines that need a uniform rank. Default: the original ranks.",
        min=1,
    ),
]
ErrorOpt = Annotated[
    float | None,
    option(
        "--max-error X",
        "Write nothing and exit with code 14 if the relative error ||dW' - dW|| / ||dW|| exceeds X.",
        min=0.0,
    ),
]


# Deprecated: `icm recognize -q` finds the task of some samples.
SamplesOpt = Annotated[Path | None, option("--samples FILE", hidden=True)]
LoaderOpt = Annotated[str | None, option("--loader", hidden=True)]
DeviceOpt = Annotated[str | None, option("--device", hidden=True)]
MaybeTaskArg = Annotated[str | None, argument("TASK", "Name of a task (see `icm ls`).", completes="task")]
BaseOpt = Annotated[
    str | None,
    option(
        "--base-model PATH",
        "Folder or GGUF file of the base model, for its configuration; with --from and --format gguf.",
    ),
]


@command
def materialize(
    session: Session,
    output: WrittenOpt,
    task: MaybeTaskArg = None,
    samples: SamplesOpt = None,
    bundle: FromOpt = None,
    source: SourceOpt = "auto",
    adapter_format: FormatOpt = None,
    seed: SeedOpt = None,
    dtype: DtypeOpt = None,
    pad_rank: PadOpt = None,
    max_error: ErrorOpt = None,
    base_model: BaseOpt = None,
    loader: LoaderOpt = None,
    device: DeviceOpt = None,
    force: ForceOpt = False,
) -> None:
    """Write the adapter of TASK to a folder or file.

    A decoded adapter has the configuration, tensor names, ranks and number formats of its original. Decoding needs
    neither the base model nor a GPU, and output is reproducible byte for byte. --seed samples the latent instead of
    using its mean. --from decodes the adapter from a bundle, after checking every byte, and needs no store.

    Converting to or from gguf reads the base model's configuration from its folder or GGUF file.

    Example:
      icm materialize dog-detection -o adapter/
      icm materialize "$(icm recognize -q --samples queries.jsonl)" -o adapter/
    """
    from icmlora.fleet.write.materialize import materialize

    _check_options(task, samples, bundle, source, adapter_format, seed, base_model)
    if samples is None and (loader, device) != (None, None):
        raise UsageProblem("`icm materialize` does not run the base model", hint="remove --loader and --device")
    if samples is not None:
        from icm_cli.recognized import recognized

        task = recognized(session, samples, base_model, bundle, loader, device).known_task()
    assert task is not None
    write: Callable[..., MaterializeReport] = partial(materialize, session.context, source=source, seed=seed)
    if bundle is not None:
        from icmlora.fleet.bundles.bundles import Bundle

        write = partial(Bundle(bundle).materialize, base_model=base_model)
    done = write(
        task,
        output,
        adapter_format=adapter_format,
        dtype=dtype,
        pad_rank=pad_rank,
        max_error=max_error,
        force=force,
    )
    if bundle is None and source == "auto" and done.source == "code":
        session.out.note(f"the original of {task} was evicted; used {_FROM[done.source]} instead")
    _print_result(session, task, done)


def _check_options(
    task: str | None,
    samples: Path | None,
    bundle: Path | None,
    source: SourceName,
    adapter_format: str | None,
    seed: int | None,
    base_model: str | None,
) -> None:
    if bool(task) == (samples is not None):  # the name is empty if `icm recognize -q` found no task
        raise UsageProblem("no task was given", hint="pass a task name from `icm ls`")
    if adapter_format is not None:
        from icmlora.formats import catalogue

        names = [known.name for known in catalogue.FORMATS]
        if adapter_format not in names:
            raise UsageProblem(f"unknown format {adapter_format!r}", hint=f"choose one of {', '.join(names)}")
    if bundle is not None and (seed is not None or source not in ("auto", "code")):
        hint = "use --from without --seed and with --source auto or code"
        raise UsageProblem("a bundle contains only codes", hint=hint)
    if samples is None and base_model is not None and (bundle is None or adapter_format not in _WITH_BASE):
        hint = "for tasks in a store, set the path of the base model with `icm base add NAME PATH`"
        raise UsageProblem("--base-model needs --from and --format gguf or peft", hint=hint)


def _print_result(session: Session, task: str, done: MaterializeReport) -> None:
    out = session.out
    out.document(
        {
            "task": done.task,
            "output": str(done.directory),
            "format": done.adapter_format,
            "source": done.source,
            "generator": done.generator,
            "relative_error": done.relative_error,
            "squared_error": done.squared_error,
            "retained_gain": done.retained_gain,
            "precision": done.precision,
            "claimed": claim_json(done.claim),
            "weights": done.weights,
            "recognized": done.recognized,
            "left_out": list(done.left_out),
        }
    )
    out.answer(str(done.directory))
    known = [("relative error", done.relative_error), ("retained gain", done.retained_gain)]
    if done.source == "original":
        known = []  # an original loses nothing
    figures = "".join(f", {name} {value:.4f}" for name, value in known if value is not None)
    figures += measured_in([done.precision]) if known and done.retained_gain is not None else ""
    if done.claim is not None:
        figures += f", {claim_text(done.claim)} (claimed by the bundle)"
    origin = _FROM["network" if done.source == "recalled" else done.source]
    if done.recognized is not None:
        origin = f"the code of {done.recognized}, the task recognized from its vectors"
    if done.converted:
        name = done.adapter_format
        origin = f"{origin.removesuffix(_EXACTLY)}, converted for {_PROGRAMS.get(name, name)}"
    out.note(f"wrote {task} from {origin}{figures}")
    if done.left_out:
        out.note(f"skipped extra files, which only --format peft writes: {', '.join(done.left_out)}")
    if done.source == "recalled" and done.recognized is None:
        out.note("recognized no stored task; used the network's prediction")


_WITH_BASE = ("gguf", "peft")  # peft for adapters in GGUF files
_EXACTLY = ", byte for byte"
_PROGRAMS = {"gguf": "llama.cpp", "mlx": "MLX-LM", "peft": "PEFT", "comfyui": "ComfyUI", "xlabs": "XLabs"}
_FROM = {
    "original": f"its original{_EXACTLY}",
    "code": "its code",
    "network": "the network's prediction from its task vectors",
}
