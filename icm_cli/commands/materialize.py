"""`icm materialize`: write a task's adapter as it was, or in another format."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import UsageProblem
from icm_cli.options import DeviceOpt, DtypeName, ForceOpt, FromOpt, LoaderOpt, SeedOpt, completing
from icm_cli.session import Session, command
from icm_cli.text import claim_json, claim_text
from icmlora.fleet.measure.precision import measured_in

if TYPE_CHECKING:
    from icmlora.fleet.write.materialize import MaterializeReport


class SourceName(StrEnum):
    """Where the adapter comes from."""

    AUTO = "auto"
    ORIGINAL = "original"
    RESIDUAL = "residual"
    CODE = "code"
    GENERATE = "generate"
    NETWORK = "network"


WrittenOpt = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Folder to write, absent or empty, or a file: NAME.gguf, or NAME.safetensors for an image adapter.",
        show_default=False,
    ),
]
FormatOpt = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="peft: a PEFT folder. mlx: a folder for MLX-LM. gguf: one file for llama.cpp; from and to it, the "
        "configuration of the base model is read. For image adapters diffusers, kohya, comfyui, xlabs, lycoris: one "
        "file each; `icm convert --list-formats` lists which becomes which. Default: the adapter's own format.",
        show_default=False,
        autocompletion=completing("format"),
    ),
]
SourceOpt = Annotated[
    SourceName,
    typer.Option(
        "--source",
        help="original: the ingested files. residual: the code, corrected by its residual. code: the code alone. "
        "generate: the code that the task vectors bring back. network: what the network alone predicts from them. "
        "auto: the first of original, residual and code that is there.",
    ),
]
DtypeOpt = Annotated[
    DtypeName | None,
    typer.Option(
        "--dtype",
        help="Number format of decoded or converted weights. Default: that of the original, or float32 if they are "
        "converted.",
        show_default=False,
    ),
]
PadOpt = Annotated[
    int | None,
    typer.Option(
        "--pad-rank",
        metavar="N",
        min=1,
        help="Write decoded weights with rank N for all modules, filled with zeros, for engines that need one rank. "
        "Default: the ranks of the original.",
        show_default=False,
    ),
]
ErrorOpt = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        metavar="X",
        min=0.0,
        help="Exit with code 14 and write nothing if the relative error, ||dW' - dW|| / ||dW||, is above X.",
        show_default=False,
    ),
]


MaybeTaskArg = Annotated[
    str | None,
    typer.Argument(
        metavar="[TASK]",
        help="Name of a task (see `icm ls`); not with --samples.",
        autocompletion=completing("task"),
        show_default=False,
    ),
]
SamplesOpt = Annotated[
    Path | None,
    typer.Option(
        "--samples",
        metavar="FILE",
        help="Write the adapter of the known task that these samples belong to (see `icm recognize`). Needs the base "
        "model. Exit with code 17 and write nothing if the task is new.",
        show_default=False,
    ),
]
BaseOpt = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="NAME",
        help="With --samples: only tasks of this base model. With --from: folder or GGUF file of the base model.",
        autocompletion=completing("base"),
        show_default=False,
    ),
]


@command
def materialize(
    session: Session,
    output: WrittenOpt,
    task: MaybeTaskArg = None,
    samples: SamplesOpt = None,
    bundle: FromOpt = None,
    source: SourceOpt = SourceName.AUTO,
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
    """Write the adapter of TASK as a folder, or with --samples that of the task they belong to.

    A decoded adapter has the form of its original: configuration, names, ranks and number formats. Neither the base
    model nor a GPU is needed. The same command writes the same bytes. With --seed, the adapter is
    generated from a sampled latent instead of the mean. With --from, the adapter is decoded from a bundle and no store
    is needed; every byte of the bundle is checked first.

    With --format the adapter is converted if its own format is another one, also where it is the original. Only the
    configuration of the base model is read for gguf, from its folder or its own GGUF file.

    Example:
      icm materialize dog-detection -o adapter/
      icm materialize dog-detection --format gguf -o dog-detection.gguf
    """
    _check_usage(task, samples, bundle, source, seed)
    _check_base_options(samples, bundle, adapter_format, base_model, loader, device)
    if task is None:
        from icmlora.fleet.write.format_pairs import format_to_write
        from icmlora.formats.format import check_target

        # Before a model is loaded.
        target = None if adapter_format is None else format_to_write(adapter_format)
        check_target(output, target, as_file=True, force=force)
        task = _recognized(session, samples, base_model, bundle, loader, device)
    write: Callable[..., MaterializeReport] = partial(session.fleet.materialize, source=source.value, seed=seed)
    if bundle is not None:
        from icmlora.fleet.bundles.bundles import Bundle

        write = partial(Bundle(bundle).materialize, base_model=base_model)
    done = write(
        task,
        output,
        adapter_format=adapter_format,
        dtype=dtype and dtype.value,
        pad_rank=pad_rank,
        max_error=max_error,
        force=force,
    )
    if bundle is None and source is SourceName.AUTO and done.source in ("residual", "code"):
        session.out.note(f"the original of {done.task} was evicted; decoding {_FROM[done.source]} instead")
    _tell(session, done)


def _check_usage(
    task: str | None, samples: Path | None, bundle: Path | None, source: SourceName, seed: int | None
) -> None:
    if bundle is not None and (seed is not None or source not in (SourceName.AUTO, SourceName.CODE)):
        raise UsageProblem(
            "a bundle holds codes only", hint="use --from without --seed, and with --source auto or code"
        )
    if seed is not None and source not in (SourceName.AUTO, SourceName.NETWORK):
        raise UsageProblem(f"--seed is for what the network predicts, not for --source {source.value}")
    if (task is None) == (samples is None):
        raise UsageProblem("give the name of a task, or --samples FILE", hint="`icm ls` lists the tasks")


def _check_base_options(
    samples: Path | None,
    bundle: Path | None,
    adapter_format: str | None,
    base_model: str | None,
    loader: str | None,
    device: str | None,
) -> None:
    if adapter_format is not None:
        from icmlora.formats import catalogue

        names = [known.name for known in catalogue.FORMATS]
        if adapter_format not in names:
            raise UsageProblem(f"unknown format {adapter_format!r}", hint=f"choose one of {', '.join(names)}")
    if samples is None and (loader, device) != (None, None):
        raise UsageProblem("--loader and --device are for --samples: nothing else runs the base model")
    if samples is None and base_model is not None and (bundle is None or adapter_format not in _WITH_BASE):
        hint = "`icm base add NAME PATH` says where the base model of tasks in a store is"
        raise UsageProblem("--base-model is for --samples, and for --from with --format gguf or peft", hint=hint)


def _recognized(
    session: Session,
    samples: Path | None,
    base_model: str | None,
    bundle: Path | None,
    loader: str | None,
    device: str | None,
) -> str:
    """Return the known task that samples belong to."""
    from icm_cli.commands.recognize import recognized

    assert samples is not None
    found = recognized(session, samples, base_model, bundle, loader, device)
    task = found.known_task()
    session.out.note(f"recognized {task}, probability {found.candidates[0].probability:.2f}")
    return task


def _tell(session: Session, done: MaterializeReport) -> None:
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
        known = []  # nothing was lost
    figures = "".join(f", {name} {value:.4f}" for name, value in known if value is not None)
    figures += measured_in([done.precision]) if known and done.retained_gain is not None else ""
    if done.claim is not None:
        figures += f", {claim_text(done.claim)}: claimed by the bundle"
    origin = _FROM[done.source]
    if done.converted:
        name = done.adapter_format
        origin = f"{origin.removesuffix(_EXACTLY)}, converted for {_PROGRAMS.get(name, name)}"
    out.note(f"wrote {done.task} from {origin}{figures}")
    if done.left_out:
        out.note(f"without the files that came with it, which only --format peft writes: {', '.join(done.left_out)}")
    if done.source == "generate":
        code = "none of the known tasks, so this is what the network predicts"
        out.note(f"its vectors bring back {code if done.recognized is None else f'the code of {done.recognized}'}")


_WITH_BASE = ("gguf", "peft")  # the latter for an adapter that is a GGUF file
_EXACTLY = ", byte for byte"
_PROGRAMS = {"gguf": "llama.cpp", "mlx": "MLX-LM", "peft": "PEFT", "comfyui": "ComfyUI", "xlabs": "XLabs"}
_FROM = {
    "original": f"its original{_EXACTLY}",
    "residual": "its code and residual",
    "code": "its code",
    "generate": "what its task vectors bring back",
    "network": "its task vectors, as the network predicts it",
}
