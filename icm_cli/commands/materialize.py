"""`icm materialize`: write a task's adapter as it was, or in another format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from icm_cli.errors import UsageProblem
from icm_cli.options import DtypeName, ForceOpt, FromOpt, SeedOpt, argument, option
from icm_cli.session import Session, command
from icm_cli.text import claim_json, claim_text
from icmlora.fleet.measure.metric_result import measured_in

if TYPE_CHECKING:
    from icmlora.fleet.write.materialize import MaterializeReport


# "generate" is what "recalled" was called before.
SourceName = Literal["auto", "original", "residual", "code", "recalled", "generate", "network"]

WrittenOpt = Annotated[
    Path,
    option(
        "--output -o PATH",
        "Folder to write, absent or empty, or a file: NAME.gguf, or NAME.safetensors for an image adapter.",
    ),
]
FormatOpt = Annotated[
    str | None,
    option(
        "--format NAME",
        "peft: a PEFT folder. mlx: a folder for MLX-LM. gguf: one file for llama.cpp; from and to it, the "
        "configuration of the base model is read. For image adapters diffusers, kohya, comfyui, xlabs, lycoris: one "
        "file each; `icm convert --list-formats` lists which becomes which. Default: the adapter's own format.",
        completes="format",
    ),
]
SourceOpt = Annotated[
    SourceName,
    option(
        "--source",
        "original: the ingested files. residual: the code, corrected by its residual. code: the code alone. "
        "recalled: the code of the task recognized from its vectors. network: what the network alone predicts from "
        "them. auto: the first of original, residual and code that is there.",
    ),
]
DtypeOpt = Annotated[
    DtypeName | None,
    option(
        "--dtype",
        "Number format of decoded or converted weights. Default: that of the original, or float32 if they are "
        "converted.",
    ),
]
PadOpt = Annotated[
    int | None,
    option(
        "--pad-rank N",
        "Write decoded weights with rank N for all modules, filled with zeros, for engines that need one rank. "
        "Default: the ranks of the original.",
        min=1,
    ),
]
ErrorOpt = Annotated[
    float | None,
    option(
        "--max-error X",
        "Exit with code 14 and write nothing if the relative error, ||dW' - dW|| / ||dW||, is above X.",
        min=0.0,
    ),
]


# `icm recognize -q` names the task that samples belong to; these three are what was there before.
SamplesOpt = Annotated[Path | None, option("--samples FILE", hidden=True)]
LoaderOpt = Annotated[str | None, option("--loader", hidden=True)]
DeviceOpt = Annotated[str | None, option("--device", hidden=True)]
MaybeTaskArg = Annotated[str | None, argument("TASK", "Name of a task (see `icm ls`).", completes="task")]
BaseOpt = Annotated[
    str | None,
    option(
        "--base-model PATH",
        "With --from and --format gguf: folder or GGUF file of the base model, whose configuration is needed.",
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
    """Write the adapter of TASK as a folder.

    A decoded adapter has the form of its original: configuration, names, ranks and number formats. Neither the base
    model nor a GPU is needed. The same command writes the same bytes. With --seed, the adapter is
    generated from a sampled latent instead of the mean. With --from, the adapter is decoded from a bundle and no store
    is needed; every byte of the bundle is checked first.

    With --format the adapter is converted if its own format is another one, also where it is the original. Only the
    configuration of the base model is read for gguf, from its folder or its own GGUF file.

    Example:
      icm materialize dog-detection -o adapter/
      icm materialize dog-detection --format gguf -o dog-detection.gguf
      icm materialize "$(icm recognize -q --samples queries.jsonl)" -o adapter/
    """
    from icmlora.fleet.write.materialize import materialize

    _check_options(task, samples, bundle, source, adapter_format, seed, base_model)
    if samples is None and (loader, device) != (None, None):
        raise UsageProblem("nothing runs the base model", hint="leave out --loader and --device")
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
    if bundle is None and source == "auto" and done.source in ("residual", "code"):
        session.out.note(f"the original of {done.task} was evicted; decoding {_FROM[done.source]} instead")
    _tell(session, done)


def _check_options(
    task: str | None,
    samples: Path | None,
    bundle: Path | None,
    source: SourceName,
    adapter_format: str | None,
    seed: int | None,
    base_model: str | None,
) -> None:
    if bool(task) == (samples is not None):  # the name is empty where `icm recognize -q` found no task
        raise UsageProblem("give the name of a task", hint="`icm ls` lists the tasks")
    if adapter_format is not None:
        from icmlora.formats import catalogue

        names = [known.name for known in catalogue.FORMATS]
        if adapter_format not in names:
            raise UsageProblem(f"unknown format {adapter_format!r}", hint=f"choose one of {', '.join(names)}")
    if bundle is not None and (seed is not None or source not in ("auto", "code")):
        hint = "use --from without --seed, and with --source auto or code"
        raise UsageProblem("a bundle holds codes only", hint=hint)
    if samples is None and base_model is not None and (bundle is None or adapter_format not in _WITH_BASE):
        hint = "`icm base add NAME PATH` says where the base model of tasks in a store is"
        raise UsageProblem("--base-model is for --from with --format gguf or peft", hint=hint)


def _tell(session: Session, done: MaterializeReport) -> None:
    out = session.out
    out.document(
        {
            "task": done.task,
            "output": str(done.directory),
            "format": done.adapter_format,
            "source": "generate" if done.source == "recalled" else done.source,  # the key is older than the word
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
        known = []  # nothing was lost
    figures = "".join(f", {name} {value:.4f}" for name, value in known if value is not None)
    figures += measured_in([done.precision]) if known and done.retained_gain is not None else ""
    if done.claim is not None:
        figures += f", {claim_text(done.claim)}: claimed by the bundle"
    origin = _FROM["network" if done.source == "recalled" else done.source]
    if done.recognized is not None:
        origin = f"the code of {done.recognized}, the task recognized from its vectors"
    if done.converted:
        name = done.adapter_format
        origin = f"{origin.removesuffix(_EXACTLY)}, converted for {_PROGRAMS.get(name, name)}"
    out.note(f"wrote {done.task} from {origin}{figures}")
    if done.left_out:
        out.note(f"without the files that came with it, which only --format peft writes: {', '.join(done.left_out)}")
    if done.source == "recalled" and done.recognized is None:
        out.note("No known task recognized; used the network's prediction.")


_WITH_BASE = ("gguf", "peft")  # the latter for an adapter that is a GGUF file
_EXACTLY = ", byte for byte"
_PROGRAMS = {"gguf": "llama.cpp", "mlx": "MLX-LM", "peft": "PEFT", "comfyui": "ComfyUI", "xlabs": "XLabs"}
_FROM = {
    "original": f"its original{_EXACTLY}",
    "residual": "its code and residual",
    "code": "its code",
    "network": "its task vectors, as the network predicts it",
}
