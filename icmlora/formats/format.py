"""The interface of an adapter format.

    folder --find--> FoundAdapter --read bytes--> config, weights --inspect--> AdapterSummary      (no torch)
                                                        |---------read-------> LoadedAdapter       (tensors)
                                                        `-------runnable-----> RunnableAdapter     (tensors)
    AdapterBytes <--encode-- Adapter
        `--lay_out--> file name -> bytes

To add a format, write one file with a class that inherits from `AdapterFormat` and list it in `catalogue.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from icmlora.errors import AdapterRefused, DataError, UnsafeInput, located
from icmlora.io import staging

if TYPE_CHECKING:
    import torch

    from icmlora.adapter.layout import ModuleShape
    from icmlora.adapter.model import Adapter
    from icmlora.formats.discovery.tree import Folder
    from icmlora.io.safetensors import RawTensor, TensorInfo

Buffer = bytes | bytearray | memoryview
Extras: TypeAlias = "Mapping[str, RawTensor]"
"""The tensors of an adapter that a code cannot represent, by their names in the file."""
Texts = Mapping[str, str]
"""Short facts for the header of the weights."""


@dataclass(frozen=True)
class FoundAdapter:
    """One adapter on disk; every path is a regular file.

    Attributes:
        format: The format that found it.
        place: The folder, or for a single file the file without its suffix: the task is named after it.
        weights: The file with the tensors.
        config: The configuration file; None if the header of the weights contains the configuration.
        card: The model card, or None.
        companions: Name to path of other files that belong to the adapter, such as a tokenizer. For an adapter in a
            single file, the name omits the adapter's: `preview.png` is the file `NAME.preview.png`.
        run: For a checkpoint in a single file, the place of its run.
        step: The training step of a checkpoint; for a checkpoint in a folder, discovery sets it.
        is_final: Whether it represents its task; discovery sets it for exactly one.
        pickle: The file name of the weights if they are, or were, a pickle.
        initial: The file with its initial weights (see initial_weights.py).
    """

    format: AdapterFormat
    place: Path
    weights: Path
    config: Path | None = None
    card: Path | None = None
    companions: Mapping[str, Path] = field(default_factory=dict)
    run: Path | None = None
    step: int | None = None
    is_final: bool = False
    pickle: str | None = None
    initial: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the adapter."""
        return tuple(path for path in (self.weights, self.config, self.card, *self.companions.values()) if path)


@dataclass(frozen=True)
class AdapterBytes:
    """The files of an adapter as bytes, which the store keeps unchanged.

    Attributes:
        weights: The file with the tensors.
        config: Empty for a format without such a file.
        card: The model card, or None.
        companions: Name to content of other files that belong to the adapter.
    """

    weights: bytes
    config: bytes = b""
    card: bytes | None = None
    companions: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class ConfigFacts:
    """Facts from the configuration alone; None if the format records them elsewhere or not at all."""

    base_model: str | None
    """The base model's label: opaque text, never opened or fetched."""
    revision: str | None = None
    task_type: str | None = None


@dataclass(frozen=True)
class AdapterSummary:
    """Facts about an adapter, without its values."""

    base_model: str | None
    """The base model's label in the adapter: opaque text."""
    revision: str | None
    task_type: str | None
    dtype: str
    """Safetensors type of the factors; several are joined with "+"."""
    rank_max: int
    parameters: int
    target_modules: tuple[str, ...]
    """Derived from the tensors, or from the configuration if the adapter can have no code."""
    layout: tuple[ModuleShape, ...]
    """Modules in natural order, named as in the base model (without a format's own prefix). A convolution's kernel
    counts as part of its input, and an embedding's rows are its input. Empty if the adapter can have no code."""
    extras: tuple[TensorInfo, ...] = ()
    """The tensors that a code cannot represent and that are kept exactly, such as a head or a bias."""
    original_only: str | None = None
    """Why the adapter can have no code ("peft_type is LOHA, not LORA") and is kept as it is; None if it can."""
    does_nothing: bool = False
    """It does not change the base model, or its values are not finite."""
    base_is_guess: bool = False
    """The base model is guessed from widths, which other models may share, because no file names it."""
    template: str = ""
    """JSON that `encode` needs, in addition to configuration and layout, to write a decoded adapter in this form:
    unusual names, shapes, types. Empty for the usual form."""
    wrapper: str | None = None
    """Text that a wrapper such as torch.compile added to tensor names; PEFT does not find such names."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter's tensors: the part that a code can represent, and the rest unchanged."""

    adapter: Adapter
    """Float32, the scale folded into B; not yet canonical."""
    extras: Extras = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RunnableAdapter:
    """Everything in an adapter of any format that affects the output of its base model.

    Names are as in the base model. Entries of `values` and `rows` replace tensors and rows of the base model.
    """

    adapter: Adapter
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Whole parameters and buffers, such as a head or a bias, by their names in the base model."""
    rows: Mapping[str, tuple[Sequence[int], torch.Tensor]] = field(default_factory=dict)
    """Single rows of embeddings with their indices, by module."""
    magnitudes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """DoRA's lengths of the rows of W + dW, by module; for all modules or none."""
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Biases added to the output of B, by module; float32 with the scale multiplied in."""

    def beyond_lora(self) -> str | None:
        """Return a description of one part that is not a LoRA factor; None if there are only factors."""
        if self.values:
            return f"the whole tensor {next(iter(self.values))}"
        if self.rows:
            return f"single rows of {next(iter(self.rows))}"
        if self.magnitudes:
            return "DoRA magnitudes"
        return "biases of LoRA's B" if self.biases else None


@dataclass(frozen=True)
class Template:
    """The form of an adapter without its values, for writing a decoded adapter in the form of its original."""

    config: bytes
    layout: tuple[ModuleShape, ...]
    """Its modules with the ranks to write. Different ranks in the configuration are replaced with these."""
    dtype: str
    details: str = ""
    """`AdapterSummary.template`."""


class AdapterFormat(ABC):
    """One kind of adapter files: finding, reading and writing them.

    This class has the behaviour that most formats share. A format implements the abstract methods and overrides others
    if it differs. Only `_load`, `_run`, `_fresh` and `_alike` may load torch. They raise errors without a path; the
    public methods add it.
    """

    name: str
    """The name of the format in the store."""
    about: str
    """A short description for `icm convert --list-formats`."""
    is_for_images: bool = False
    """Whether its adapters are for models that make images: these have no task vectors and are not evaluated."""
    suffix: str | None = None
    """Suffix of an adapter in a single file; None for a folder, whose weights are safetensors."""
    watched: frozenset[str] = frozenset()
    """File names that only this format uses: a link or special file of such a name is reported, not skipped."""
    companions: frozenset[str] = frozenset()
    """Names of other files that may belong to an adapter; for a single file, the part after the adapter's name."""

    @abstractmethod
    def find(self, folder: Folder) -> list[FoundAdapter]:
        """Return the adapters of this format in one folder, detected by file names and a few bytes."""

    def refuse(self, folder: Folder) -> list[AdapterRefused]:
        """Return refusals for a folder that resembles an adapter of this format, if no format accepts it."""
        return []

    def read_config(self, config: bytes) -> ConfigFacts:
        """Read only a configuration, to separate its errors from errors of the weights.

        Raises:
            AdapterRefused: It is damaged, or requires something that icm cannot reproduce exactly.
        """
        if config:
            raise AdapterRefused(f"a {self.name} adapter has no configuration", kind="config")
        return ConfigFacts(None)

    def inspect(
        self, config: bytes, weights: Buffer, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> AdapterSummary:
        """Check an adapter completely and summarise it.

        An adapter that can have no code is not refused: `original_only` states the reason. Formats other than PEFT
        also refuse a file whose factors or scale are ambiguous, such as half a pair or an unknown alpha.

        Args:
            config: Its configuration; empty for a format without one.
            weights: Its tensors.
            path: Path of the tensors, for messages.
            initial: The initial weights that training subtracted from the base model, if known. The adapter is then
                converted to fit the unmodified base model. `read` and `runnable` have the same argument.

        Raises:
            AdapterRefused: It is damaged, or `initial` does not fit; `kind` states the reason.
            UnsafeInput: A pickle, hostile names, or exceeded limits.
        """
        with located(path):
            if initial is None:
                return self._summary(config, weights)
            return self._summary(*self._without_initial(config, bytes(weights), initial))

    def read(
        self, config: bytes, weights: bytes, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> LoadedAdapter:
        """Read an adapter's tensors; raises as `inspect` does, and `AdapterRefused` if it can have no code."""
        with located(path):
            return self._load(*self._without_initial(config, weights, initial))

    def runnable(
        self, config: bytes, weights: bytes, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> RunnableAdapter:
        """Read an adapter for `icmlora.base_models.running.attach.adapted`; raises as `read` does.

        Raises:
            AdapterRefused: icm cannot run this kind of adapter.
        """
        with located(path):
            return self._run(*self._without_initial(config, weights, initial))

    def encode(
        self,
        adapter: Adapter,
        *,
        card: str,
        metadata: Texts,
        like: Template | None = None,
        dtype: str | None = None,
        pad_rank: int | None = None,
        extras: Extras | None = None,
    ) -> AdapterBytes:
        """Serialise an adapter deterministically.

        Args:
            adapter: The adapter.
            card: Text of the model card; ignored for an adapter in a single file.
            metadata: Short facts for the header of the weights; ignored with `like`, which keeps its own header.
            like: The form to write: configuration, names, ranks, shapes and types. None for a new configuration.
            dtype: "bfloat16", "float16" or "float32" for the factors, rounded to nearest even. Default: the type of
                `like`, or bfloat16.
            pad_rank: With `like`, write the form that every engine reads instead: all modules zero-padded to this
                rank, the scale folded into B.
            extras: With `like`, the extras that `read` returned; written exactly.

        Raises:
            AdapterRefused: A value overflows the type, or a rank exceeds `pad_rank`.
        """
        if like is None:
            made = self._fresh(adapter, metadata, dtype or "bfloat16")
        else:
            made = self._alike(adapter, like, dtype, pad_rank, extras=extras or {}, metadata=metadata)
        return made if self.suffix is not None else replace(made, card=card.encode())

    def lay_out(self, files: AdapterBytes, name: str) -> dict[str, bytes]:
        """Return file name -> content of a folder with the adapter; the file that makes it valid comes last.

        Args:
            files: The content.
            name: File name without the suffix, for an adapter in a single file; folder formats ignore it.
        """
        companions = {f"{name}.{key}": data for key, data in files.companions.items()}
        return {**companions, f"{name}{self.suffix}": files.weights}

    def _without_initial(self, config: bytes, weights: bytes, initial: bytes | None) -> tuple[bytes, bytes]:
        """Return configuration and weights, minus the initial weights if given."""
        if initial is not None:
            raise AdapterRefused("initial weights can be subtracted only from PEFT adapters", kind="initial")
        return config, weights

    @abstractmethod
    def _summary(self, config: bytes, weights: Buffer) -> AdapterSummary:
        """Implement `inspect`."""

    @abstractmethod
    def _load(self, config: bytes, weights: bytes) -> LoadedAdapter:
        """Implement `read`."""

    @abstractmethod
    def _run(self, config: bytes, weights: bytes) -> RunnableAdapter:
        """Implement `runnable`."""

    @abstractmethod
    def _fresh(self, adapter: Adapter, metadata: Texts, dtype: str) -> AdapterBytes:
        """Implement `encode` without `like`, except for the card."""

    @abstractmethod
    def _alike(
        self, adapter: Adapter, like: Template, dtype: str | None, rank: int | None, extras: Extras, metadata: Texts
    ) -> AdapterBytes:
        """Implement `encode` with `like`, except for the card; `rank` is its `pad_rank`."""


class FolderFormat(AdapterFormat):
    """A format whose adapters are folders with weights, a configuration and a model card."""

    weights_name: str
    config_name = "adapter_config.json"
    card_name = "README.md"

    def find(self, folder: Folder) -> list[FoundAdapter]:
        """Return the adapter of a folder, at most one."""
        files = folder.files
        if self.config_name not in files or self.weights_name not in files:
            return []
        companions = {name: path for name, path in files.items() if name in self.companions}
        paths = files[self.weights_name], files[self.config_name], files.get(self.card_name)
        return [FoundAdapter(self, folder.path, *paths, companions)]

    def lay_out(self, files: AdapterBytes, name: str) -> dict[str, bytes]:
        """Name the files; the configuration comes last because it makes the folder an adapter."""
        card = {} if files.card is None else {self.card_name: files.card}
        return {self.weights_name: files.weights, **card, **files.companions, self.config_name: files.config}


def without_suffix(name: str, suffix: str) -> str:
    """Return a file name without a suffix, in any case; "" if the suffix does not match."""
    return name[: -len(suffix)] if name.lower().endswith(suffix) else ""


def write_adapter_files(
    output: Path, adapter_format: AdapterFormat, files: AdapterBytes, name: str, *, force: bool = False
) -> None:
    """Write an adapter's files unchanged, atomically and durably.

    Args:
        output: A folder, absent or empty unless `force`; or the file for an adapter in a single file, whose other files
            are written next to it.
        adapter_format: The format of the files.
        files: Their content.
        name: File name without the suffix, for an adapter in a single file that is written to a folder.
        force: Replace existing files.

    Raises:
        DataError: The output is a file, and the format has another suffix or none.
        OutputExists: The folder is not empty, or the file exists, and `force` is not set.
    """
    if not is_file(output):
        staging.write_folder(output, adapter_format.lay_out(files, name), force=force)
        return
    _check_suffix(output, adapter_format)
    staging.write_files(output.parent, _next_to(output, adapter_format, files), force=force)


def replaces(
    output: Path, adapter_format: AdapterFormat, files: AdapterBytes, name: str, known: Iterable[Path]
) -> Path | None:
    """Return the first of `known` that `write_adapter_files` would replace, under any path; None if there is none."""
    if is_file(output):
        places = [output.parent / file for file in _next_to(output, adapter_format, files)]
    else:
        places = [output / file for file in adapter_format.lay_out(files, name)]
    pairs = ((path, place) for path in known for place in places if place.exists())
    return next((path for path, place in pairs if path.samefile(place)), None)


def _next_to(output: Path, adapter_format: AdapterFormat, files: AdapterBytes) -> dict[str, bytes]:
    """Return file name -> content of an adapter in a single file; the weights come last."""
    laid_out = adapter_format.lay_out(files, output.stem)
    _, weights = laid_out.popitem()  # a format may use another name
    return {**laid_out, output.name: weights}


def check_target(
    output: Path, adapter_format: AdapterFormat | None = None, *, as_file: bool = False, force: bool = False
) -> None:
    """Check that an adapter can be written, before it is computed; raises as `write_adapter_files` does.

    Args:
        output: The folder or the file.
        adapter_format: The format to write, if known already.
        as_file: Write a single-file format as a file, not into a folder.
        force: Replace existing files.
    """
    suffix = None if adapter_format is None else adapter_format.suffix
    if adapter_format is not None and as_file and suffix is not None and (output.suffix != suffix or output.is_dir()):
        fact = f"a {adapter_format.name} adapter is one file"
        raise DataError(fact, path=output, hint=f"name it: `-o NAME{suffix}`")
    if not is_file(output):
        staging.check_free(output, force=force)
        return
    if adapter_format is not None:
        _check_suffix(output, adapter_format)
    staging.check_absent(output, force=force)


def is_file(output: Path) -> bool:
    """Return whether an output path means a single file, by its suffix."""
    return output.suffix in (".safetensors", ".gguf") and not output.is_dir()


def _check_suffix(output: Path, adapter_format: AdapterFormat) -> None:
    if adapter_format.suffix != output.suffix:
        ending = "a folder" if adapter_format.suffix is None else f"a file NAME{adapter_format.suffix}"
        fact = f"a {adapter_format.name} adapter is {ending}"
        raise DataError(fact, path=output, hint="use that name, or another --format")


def check_companions(known: AdapterFormat, names: Iterable[str]) -> None:
    """Refuse files that are not companions in a format: they could overwrite the weights, or be code.

    Raises:
        UnsafeInput: A name is not among the companions of the format.
    """
    for name in names:
        if name.lower() not in known.companions:
            hint = "use a file from a trusted source, or the newer icm version that wrote it"
            fact = f"{name!r} is not a file of an adapter in the format {known.name}"
            raise UnsafeInput(fact, kind="name", hint=hint)
