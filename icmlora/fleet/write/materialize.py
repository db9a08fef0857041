"""Write a task's adapter as a folder or file, or load it: from its original, its code, or its task vectors.

    task ──resolve_source──▶ ResolvedSource ──render──▶ AdapterBytes ──▶ folder or file

Codes come from a store or from a bundle. torch is imported only to decode, convert or load: an original is written
unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from icmlora.errors import OptionsConflict
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import DtypeName, Force, NamedTasks, Param, TaskName
from icmlora.fleet.resources.adapter_row import original_files
from icmlora.fleet.resources.code_source import Decoded, open_codes
from icmlora.fleet.write.format_pairs import OutputFormat, SourceAdapter, check_pair, convert_content, format_to_write
from icmlora.fleet.write.sources import ResolvedSource, Source, resolve_source
from icmlora.formats.catalogue import format_named
from icmlora.formats.format import AdapterBytes, check_target, write_adapter_files
from registry.manifests import Claim, WithRelativeError

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter

_SIDE_BY_SIDE = 32
"""Adapters that `load_many` has in memory at a time."""
_WITH_BASE = ("gguf", "peft")  # peft for adapters in GGUF files

SourceOf = Annotated[
    Source,
    Param(
        "original: the ingested files. code: the decoded code. recalled: the code of the task recognized from the "
        "vectors. network: the network's prediction from the vectors. auto: the original if the store has it, else "
        "the code."
    ),
]
Dtype = Annotated[
    DtypeName | None,
    Param("Number format of decoded or converted weights. Default: as in the original, or float32 for converted ones."),
]
PadRank = Annotated[
    int | None,
    Param(
        "Pad all modules with zeros to rank N, for engines that need a uniform rank. Default: the original ranks.",
        "--pad-rank N",
        min=1,
    ),
]
MaxWrittenError = Annotated[
    float | None,
    Param(
        "Write nothing and exit with code 14 if the relative error ||dW' - dW|| / ||dW|| exceeds X.",
        "--max-error X",
        min=0.0,
    ),
]
Seed = Annotated[int | None, Param("Random seed.", "--seed N")]


@dataclass(frozen=True)
class MaterializeReport(WithRelativeError):
    """A written adapter."""

    task: str
    directory: Path
    source: Literal["original", Decoded]
    generator: str | None  # digest of the generator that decoded it; None for an original
    squared_error: float | None  # None if it was not measured
    retained_gain: float | None  # as `icm eval` measured it
    weights: str  # SHA-256 of the written weights
    recognized: str | None = None  # of `recalled`: the task with the code; None for the network's prediction
    adapter_format: str = "peft"
    converted: bool = False  # from another format
    left_out: tuple[str, ...] = ()  # files of the original that the format cannot include
    precision: str | None = None  # of the base model that the gain was measured on
    claim: Claim | None = None  # of the bundle with the code


@use_case
def materialize(
    context: Context,
    task: TaskName,
    directory: Annotated[
        str | Path,
        Param(
            "New or empty folder to write, or a file: NAME.gguf, or NAME.safetensors for image adapters.",
            "--output -o PATH",
        ),
    ],
    *,
    source: SourceOf = "auto",
    adapter_format: OutputFormat = None,
    seed: Seed = None,
    dtype: Dtype = None,
    pad_rank: PadRank = None,
    max_error: MaxWrittenError = None,
    base_model: Annotated[
        str | Path | None,
        Param(
            "Folder or GGUF file of the base model, for its configuration; with --from and --format gguf.",
            "--base-model PATH",
        ),
    ] = None,
    force: Force = False,
) -> MaterializeReport:
    """Write the adapter of TASK to a folder or file.

    A decoded adapter has the configuration, tensor names, ranks and number formats of its original. Decoding needs
    neither the base model nor a GPU, and output is reproducible byte for byte. --seed samples the latent instead of
    using its mean. --from decodes the adapter from a bundle, after checking every byte, and needs no store.

    Converting to or from gguf reads the base model's configuration from its folder or GGUF file.

    Example:
      icm materialize dog-detection -o adapter/
      icm materialize "$(icm recognize -q --samples queries.jsonl)" -o adapter/

    Raises:
        DataError: The task does not have this source.
        OptionsConflict: The options contradict each other.
        TooLossy: The error is above `max_error`. With a bundle, the error that it claims counts.
        OutputExists: The folder is not empty, or the file exists, and `force` is not given.
        AdapterRefused: The format cannot represent a part of the adapter, such as a head.
        BaseModelNotFound: From and to `gguf`: it is not on this machine.
        BaseModelUnsuited: From and to `gguf`: icm cannot write adapters for its architecture.
        BundleError: The bundle is damaged, or the file was replaced.
    """
    if not task:  # `icm recognize -q` found none
        raise OptionsConflict("no task was given", hint="pass a task name from `icm ls`")
    if context.bundle is not None and (seed is not None or source not in ("auto", "code")):
        hint = "use --from without --seed and with --source auto or code"
        raise OptionsConflict("a bundle contains only codes", hint=hint)
    if base_model is not None and (context.bundle is None or adapter_format not in _WITH_BASE):
        hint = "for tasks in a store, set the path of the base model with `icm base add NAME PATH`"
        raise OptionsConflict("--base-model needs --from and --format gguf or peft", hint=hint)
    output, target = Path(directory), None if adapter_format is None else format_to_write(adapter_format)
    check_target(output, target, as_file=True, force=force)
    with open_codes(context, base_model=base_model) as codes:
        stored = codes.get(task)
        name, own = stored.name, format_named(stored.final.format)
        target = target or own
        is_converted = target.name != own.name
        if is_converted:
            check_pair(own, target)
        found = resolve_source(codes, stored, source, seed)
        found.check_error(max_error)
        content = made = render(found, dtype=None if is_converted else dtype, pad_rank=pad_rank)
        if is_converted:
            # The rounded factors of the own format are converted.
            initial = stored.final.initial if found.source == "original" else None
            adapter = SourceAdapter(
                name,
                own,
                made,
                lambda: codes.locate(stored.base_model),
                path=output,
                initial=None if initial is None else codes.read(initial),
            )
            content = convert_content(adapter, target, metadata=found.metadata, dtype=dtype or "float32")
    write_adapter_files(output, target, content, name, force=force)
    report = MaterializeReport(
        task=name,
        directory=output,
        source=found.source,
        generator=found.generator,
        squared_error=found.squared_error,
        retained_gain=found.retained_gain,
        weights=hashlib.sha256(content.weights).hexdigest(),
        recognized=found.recognized,
        adapter_format=target.name,
        converted=is_converted,
        left_out=tuple(file for file in made.companions if file not in content.companions),
        precision=None if found.measured is None else found.measured.precision,
        claim=found.claim,
    )
    if found.source == "original" and is_converted and dtype not in (None, "float32"):
        return replace(report, squared_error=None, retained_gain=None)  # the rounding error was not measured
    return report


@use_case
def read_files(
    context: Context,
    task: TaskName,
    *,
    source: SourceOf = "auto",
    dtype: Dtype = None,
    pad_rank: PadRank = None,
    seed: Seed = None,
    max_error: MaxWrittenError = None,
) -> dict[str, bytes]:
    """Return name -> content of the files that `materialize` writes; its arguments and errors apply."""
    with open_codes(context) as codes:
        found = resolve_source(codes, codes.get(task), source, seed)
        found.check_error(max_error)
        return found.format.lay_out(render(found, dtype=dtype, pad_rank=pad_rank), found.task.name)


@use_case
def load(
    context: Context,
    task: TaskName,
    *,
    source: SourceOf = "auto",
    seed: Seed = None,
    max_error: MaxWrittenError = None,
) -> Adapter:
    """Load a task's adapter into memory: float32 tensors, with the scale folded into B.

        for module in fleet.load("dog-detection").modules:
            delta = module.b @ module.a  # (out, in)

    Arguments and errors are as in `materialize`.
    """
    with open_codes(context) as codes:
        found = resolve_source(codes, codes.get(task), source, seed)
        found.check_error(max_error)
        return found.reader()()


@use_case
def load_many(
    context: Context,
    tasks: NamedTasks,
    *,
    source: SourceOf = "auto",
    device: Annotated[str, Param("Device for the factors.")] = "cpu",
) -> Iterator[tuple[str, Adapter]]:
    """Load the adapters of many tasks, as `load` does: (name, adapter) in the order of `tasks`.

    The generator is opened once, and several codes are decoded side by side, on the CPU, so that the results do not
    depend on the machine; then the factors go to the device. At most 32 adapters are in memory besides those that the
    caller keeps, and the store is not held while the caller works.
    """
    from icmlora.io.devices import resolve_device
    from icmlora.io.threads import side_by_side

    place = resolve_device(device)
    with side_by_side() as each:
        for first in range(0, len(tasks), _SIDE_BY_SIDE):
            names: Sequence[str] = tasks[first : first + _SIDE_BY_SIDE]
            with open_codes(context) as codes:  # released before the caller continues
                readers = [resolve_source(codes, codes.get(name), source).reader() for name in names]
            adapters = each(lambda read: read().to(place), readers)
            yield from zip(names, adapters, strict=True)


def render(found: ResolvedSource, *, dtype: str | None = None, pad_rank: int | None = None) -> AdapterBytes:
    """Return the files of an adapter in its own format, with a model card. Equal arguments give equal bytes."""
    codes, task = found.codes, found.task
    if found.source != "original":
        from icmlora.fleet.write.cards import card_text

        form = codes.form(task)
        return form.write(
            found.reader()(),
            card=card_text(found, form.files),
            metadata=found.metadata,
            dtype=dtype,
            pad_rank=pad_rank,
        )
    if task.final.card is not None:
        card = codes.read(task.final.card)
    else:
        from icmlora.fleet.write.cards import original_card

        card = original_card(task).encode()
    return replace(original_files(codes.read, task.final), card=card)
