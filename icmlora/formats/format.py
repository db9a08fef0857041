"""What an adapter format is: everything icm needs to know of one kind of adapter files.

    folder --find--> AdapterPaths --read bytes--> config, weights --inspect--> AdapterSummary      (no torch)
                                                        |---------read-------> LoadedAdapter       (tensors)
                                                        `-------runnable-----> RunnableAdapter     (tensors)
    AdapterBytes <--encode-- Adapter
        `--lay_out--> file name -> bytes

To add a format, write one file with a class that inherits from `AdapterFormat` and name it in `catalogue.py`.
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
class AdapterPaths:
    """Where one adapter is on disk; every path is a regular file.

    Attributes:
        place: The folder, or for a single file the file without its suffix: the task is named after it.
        weights: The file with the tensors.
        config: The file that says what they mean; None where the weights' own header does.
        card: The model card, or None.
        companions: Name to path of other files that belong to the adapter, such as a tokenizer. Those next to an
            adapter in a single file are named by what follows its name: `preview.png` stands for `NAME.preview.png`.
        run: The place of the run that it is a checkpoint of, and
        step: its training step, where that is not a matter of folders.
    """

    place: Path
    weights: Path
    config: Path | None = None
    card: Path | None = None
    companions: Mapping[str, Path] = field(default_factory=dict)
    run: Path | None = None
    step: int | None = None


@dataclass(frozen=True)
class AdapterBytes:
    """The same files as bytes, which the store keeps unchanged.

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
    """What a configuration says by itself; None where the format notes it elsewhere or nowhere."""

    base_model: str | None
    """The base model's label: opaque text, never opened or fetched."""
    revision: str | None = None
    task_type: str | None = None


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter is, without its values."""

    base_model: str | None
    """The base model's label as the adapter gives it: opaque text."""
    revision: str | None
    task_type: str | None
    dtype: str
    """Of the factors, as safetensors names it; several are joined with "+"."""
    rank_max: int
    parameters: int
    target_modules: tuple[str, ...]
    """Derived from the tensors, or from the configuration where there can be no code."""
    layout: tuple[ModuleShape, ...]
    """Modules in natural order, named as in the base model (without a format's own prefix). A convolution's kernel
    counts as part of its input, and an embedding's rows are its input. Empty where there can be no code."""
    extras: tuple[TensorInfo, ...] = ()
    """The tensors that a code cannot represent and that are kept exactly, such as a head or a bias."""
    original_only: str | None = None
    """Why there can be no code of it ("peft_type is LOHA, not LORA"); it is kept as it is. None where there can."""
    does_nothing: bool = False
    """It leaves the base model as it is, or its values are not finite."""
    base_is_guess: bool = False
    """Nothing names the base model: widths, which other models may have too, make it likely."""
    template: str = ""
    """JSON of what `encode` needs, besides configuration and layout, to write a decoded adapter in the form of this
    one: unusual names, shapes, types. Empty for the usual form."""
    wrapper: str | None = None
    """What a wrapper such as torch.compile put into the names of tensors, because of which PEFT does not find them."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter's tensors: what a code can represent, and the rest exactly as it was."""

    adapter: Adapter
    """Float32, the scale folded into B; not yet canonical."""
    extras: Extras = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RunnableAdapter:
    """Everything in an adapter that changes what its base model computes, whatever its format.

    Names are those of the base model. Where an adapter has an entry of the first two for a tensor of the base model, it
    replaces that tensor.
    """

    adapter: Adapter
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Whole parameters and buffers, such as a head or a bias, by their names in the base model."""
    rows: Mapping[str, tuple[Sequence[int], torch.Tensor]] = field(default_factory=dict)
    """Single rows of embeddings with their numbers, by module."""
    magnitudes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """DoRA's lengths of the rows of W + dW, by module; all of its modules have one, or none has."""
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What is added to the output of B, by module; float32 with the scale multiplied in."""

    def beyond_lora(self) -> str | None:
        """Name one thing in it that is not a LoRA factor, for a format that holds only those; None if there is none."""
        if self.values:
            return f"the whole tensor {next(iter(self.values))}"
        if self.rows:
            return f"single rows of {next(iter(self.rows))}"
        if self.magnitudes:
            return "DoRA magnitudes"
        return "biases of LoRA's B" if self.biases else None


@dataclass(frozen=True)
class Template:
    """The form of an adapter without its values. A decoded adapter is written in the form of its original."""

    config: bytes
    layout: tuple[ModuleShape, ...]
    """Its modules with the ranks to write. Where the configuration states others, it is changed to state these."""
    dtype: str
    details: str = ""
    """`AdapterSummary.template`."""


class AdapterFormat(ABC):
    """One kind of adapter files: where they are, what they say, and how they are written.

    What is the same in most formats is here; a format has the abstract methods, and overrides what differs. Only
    `_load`, `_run`, `_fresh` and `_alike` may load torch. They raise without a path, which the public methods add.
    """

    name: str
    """The name under which the store notes the format."""
    about: str
    """What it is, in a few words that `icm convert --list-formats` prints."""
    is_for_images: bool = False
    """Whether its adapters are for models that make images: these have no task vectors and are not evaluated."""
    suffix: str | None = None
    """How the name of an adapter ends that is a single file; None for a folder, whose weights are safetensors."""
    watched: frozenset[str] = frozenset()
    """File names that only this format uses: a link or special file of such a name is reported, not passed over."""
    companions: frozenset[str] = frozenset()
    """Names of other files that may belong to an adapter; of a single file, what follows its name in theirs."""

    @abstractmethod
    def find(self, folder: Folder) -> list[AdapterPaths]:
        """Return the adapters of this format in one folder, judged by file names and a few bytes."""

    def refuse(self, folder: Folder) -> list[AdapterRefused]:
        """Say what is wrong in a folder where no format found an adapter, if it looks like one of this format."""
        return []

    def read_config(self, config: bytes) -> ConfigFacts:
        """Read a configuration by itself, so that its faults are not blamed on the weights.

        Raises:
            AdapterRefused: It is damaged, or asks for something that cannot be kept exactly.
        """
        if config:
            raise AdapterRefused(f"a {self.name} adapter has no configuration", kind="config")
        return ConfigFacts(None)

    def inspect(
        self, config: bytes, weights: Buffer, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> AdapterSummary:
        """Check an adapter completely and summarise it.

        What can be read safely is never refused: where there can be no code, `original_only` says why.

        Args:
            config: Its configuration; empty for a format without one.
            weights: Its tensors.
            path: Where they came from, for messages.
            initial: The tensors that its training took out of the base model to begin with, if they are known. It is
                then converted to what it does to the unchanged base model. `read` and `runnable` take the same.

        Raises:
            AdapterRefused: It is damaged, or `initial` does not fit; `kind` says how.
            UnsafeInput: A pickle, hostile names, or limits broken.
        """
        with located(path):
            if initial is None:
                return self._summary(config, weights)
            return self._summary(*self._without_initial(config, bytes(weights), initial))

    def read(
        self, config: bytes, weights: bytes, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> LoadedAdapter:
        """Read an adapter's tensors; raises as `inspect` does, and `AdapterRefused` where there can be no code."""
        with located(path):
            return self._load(*self._without_initial(config, weights, initial))

    def runnable(
        self, config: bytes, weights: bytes, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> RunnableAdapter:
        """Read what `icmlora.base_models.running.attach.adapted` needs to run an adapter; raises as `read` does.

        Raises:
            AdapterRefused: It works in a way that icm cannot run.
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
        """Write an adapter; the same arguments give the same bytes.

        Args:
            adapter: What to write.
            card: Text of the model card, which an adapter in a single file does not have.
            metadata: Short facts for the header of the weights; not written with `like`, whose own header stays.
            like: Write it in this form: configuration, names, ranks, shapes and types. None for a fresh configuration.
            dtype: "bfloat16", "float16" or "float32" for the factors, rounded to nearest even. Default: the type of
                `like`, or bfloat16.
            pad_rank: With `like`, write the form that every engine reads instead: this rank for all modules, filled
                with zeros, the scale folded into B.
            extras: With `like`, the extras that `read` returned; written exactly.

        Raises:
            AdapterRefused: A value that the type cannot hold, or a rank above `pad_rank`.
        """
        if like is None:
            made = self._fresh(adapter, metadata, dtype or "bfloat16")
        else:
            made = self._alike(adapter, like, dtype, pad_rank, extras=extras or {}, metadata=metadata)
        return made if self.suffix is not None else replace(made, card=card.encode())

    def lay_out(self, files: AdapterBytes, name: str) -> dict[str, bytes]:
        """Return file name -> content of a folder that holds the adapter; the file that makes it valid comes last.

        Args:
            files: Its content.
            name: What an adapter in a single file is called, without the suffix; formats of whole folders ignore it.
        """
        companions = {f"{name}.{key}": data for key, data in files.companions.items()}
        return {**companions, f"{name}{self.suffix}": files.weights}

    def _without_initial(self, config: bytes, weights: bytes, initial: bytes | None) -> tuple[bytes, bytes]:
        """Return configuration and weights with the initial weights taken off, where there are any."""
        if initial is not None:
            raise AdapterRefused("initial weights can be subtracted only from PEFT adapters", kind="initial")
        return config, weights

    @abstractmethod
    def _summary(self, config: bytes, weights: Buffer) -> AdapterSummary:
        """Do what `inspect` does."""

    @abstractmethod
    def _load(self, config: bytes, weights: bytes) -> LoadedAdapter:
        """Do what `read` does."""

    @abstractmethod
    def _run(self, config: bytes, weights: bytes) -> RunnableAdapter:
        """Do what `runnable` does."""

    @abstractmethod
    def _fresh(self, adapter: Adapter, metadata: Texts, dtype: str) -> AdapterBytes:
        """Do what `encode` does without `like`, but for the card."""

    @abstractmethod
    def _alike(
        self, adapter: Adapter, like: Template, dtype: str | None, rank: int | None, extras: Extras, metadata: Texts
    ) -> AdapterBytes:
        """Do what `encode` does with `like`, but for the card; `rank` is its `pad_rank`."""


class FolderFormat(AdapterFormat):
    """A format whose adapters are folders with weights, a configuration and a model card."""

    weights_name: str
    config_name = "adapter_config.json"
    card_name = "README.md"

    def find(self, folder: Folder) -> list[AdapterPaths]:
        """Find the adapter of a folder; there is at most one."""
        files = folder.files
        if self.config_name not in files or self.weights_name not in files:
            return []
        companions = {name: path for name, path in files.items() if name in self.companions}
        paths = files[self.weights_name], files[self.config_name], files.get(self.card_name)
        return [AdapterPaths(folder.path, *paths, companions)]

    def lay_out(self, files: AdapterBytes, name: str) -> dict[str, bytes]:
        """Name the files; without its configuration a folder is not an adapter, so that comes last."""
        card = {} if files.card is None else {self.card_name: files.card}
        return {self.weights_name: files.weights, **card, **files.companions, self.config_name: files.config}


def without_suffix(name: str, suffix: str) -> str:
    """Return the name of a file without its ending, which may be in capitals; nothing if it has another one."""
    return name[: -len(suffix)] if name.lower().endswith(suffix) else ""


def write_adapter_files(
    output: Path, adapter_format: AdapterFormat, files: AdapterBytes, name: str, *, force: bool = False
) -> None:
    """Write an adapter's files, unchanged: complete and durable, or not at all.

    Args:
        output: A folder, absent or empty unless `force`; or a file with the suffix of an adapter in a single file,
            next to which the files that belong to it are written.
        adapter_format: The format of the files.
        files: Their content.
        name: What an adapter in a single file is called in a folder, without the suffix.
        force: Replace what is there.

    Raises:
        DataError: The output is a file, and the format has none of that suffix.
        OutputExists: The folder is not empty, or the file exists, and `force` is not given.
    """
    if not is_file(output):
        staging.write_folder(output, adapter_format.lay_out(files, name), force=force)
        return
    _check_suffix(output, adapter_format)
    staging.write_files(output.parent, _next_to(output, adapter_format, files), force=force)


def replaces(
    output: Path, adapter_format: AdapterFormat, files: AdapterBytes, name: str, known: Iterable[Path]
) -> Path | None:
    """Return one of some files that `write_adapter_files` would replace, by whatever path; None if there is none."""
    if is_file(output):
        places = [output.parent / file for file in _next_to(output, adapter_format, files)]
    else:
        places = [output / file for file in adapter_format.lay_out(files, name)]
    pairs = ((path, place) for path in known for place in places if place.exists())
    return next((path for path, place in pairs if path.samefile(place)), None)


def _next_to(output: Path, adapter_format: AdapterFormat, files: AdapterBytes) -> dict[str, bytes]:
    """Return file name -> content of an adapter in a single file, the file of weights, whatever its name, last."""
    laid_out = adapter_format.lay_out(files, output.stem)
    _, weights = laid_out.popitem()  # which a format may call otherwise
    return {**laid_out, output.name: weights}


def check_target(
    output: Path, adapter_format: AdapterFormat | None = None, *, as_file: bool = False, force: bool = False
) -> None:
    """Check that an adapter can be written, before the work of making it; raises as `write_adapter_files` does.

    Args:
        output: The folder, or the file.
        adapter_format: The format to write, where that is known already.
        as_file: A format of single files is wanted as a file, not in a folder.
        force: Replace what is there.
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
    """Say whether a path that is to be written is that of a single file, by its suffix."""
    return output.suffix in (".safetensors", ".gguf") and not output.is_dir()


def _check_suffix(output: Path, adapter_format: AdapterFormat) -> None:
    if adapter_format.suffix != output.suffix:
        ending = "a folder" if adapter_format.suffix is None else f"a file NAME{adapter_format.suffix}"
        fact = f"a {adapter_format.name} adapter is {ending}"
        raise DataError(fact, path=output, hint="use that name, or another --format")


def check_companions(known: AdapterFormat, names: Iterable[str]) -> None:
    """Refuse files that no adapter of a format comes with: others could take the place of its weights, or be code.

    Raises:
        UnsafeInput: One of the names is not among the companions of the format.
    """
    for name in names:
        if name.lower() not in known.companions:
            hint = "use a file from a trusted source, or the newer icm version that wrote it"
            fact = f"{name!r} is not a file of an adapter in the format {known.name}"
            raise UnsafeInput(fact, kind="name", hint=hint)
