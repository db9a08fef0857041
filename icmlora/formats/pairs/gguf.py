"""Adapters of llama.cpp: single files `NAME.gguf` whose `general.type` is `adapter`.

    blk.0.attn_q.weight.lora_a (r, in)   lora_b (out, r)   dW = alpha / r * lora_b @ lora_a;  without alpha: factor 1
    token_embd.weight.lora_a (rows, r)                     an embedding has A the other way round
    blk.0.ffn_up_exps.weight.lora_a (E, r, in)             experts are modules of their own: blk.0.ffn_up_exps.0 ...

Modules have llama.cpp's names, and rows of B its order: what transformers calls them depends on the base model, which
is not here. `icmlora.formats.pairs.gguf_lora.with_base_names` translates an adapter once the base model is known.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused, located
from icmlora.formats.format import (
    AdapterBytes,
    AdapterFormat,
    AdapterPaths,
    AdapterSummary,
    Buffer,
    ConfigFacts,
    LoadedAdapter,
    RunnableAdapter,
    Template,
    without_suffix,
)
from icmlora.formats.pairs.ab_pairs import (
    TASK_TYPE,
    LoraPair,
    PairForm,
    SortedPairs,
    bad_template,
    check_orientation,
    original_only,
    sort_pairs,
    summary_of,
)
from icmlora.formats.pairs.gguf_file import (
    GgufHeader,
    GgufValue,
    encode_gguf_file,
    encode_values,
    parse_values,
    read_gguf,
)
from icmlora.io.files import open_regular, read_exactly
from icmlora.io.safetensors import TensorHeader
from registry.names import escape

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.formats.discovery.tree import Folder
    from icmlora.io.safetensors import RawTensor

SUFFIX = ".gguf"
ARCHITECTURE = "general.architecture"
ALPHA = "adapter.lora.alpha"
_KIND = "adapter.type"
_NAME = "general.base_model.0.name"
_ADDRESS = "general.base_model.0.repo_url"
_IS_ADAPTER = b"general.type" + (8).to_bytes(4, "little") + (7).to_bytes(8, "little") + b"adapter"
_PEEK_BYTES = 64 * 1024
# llama.cpp's converter puts this before whatever a PEFT adapter calls its base model, a path too.
_HUB = re.compile(r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+|/.+?)/?", re.ASCII)
_MAX_LABEL = 1024
_MAX_ALPHA = 1e30
_WEIGHT = ".weight"
_EMBEDDING = "token_embd"
_BASE = "`icm materialize --format peft` writes it for PEFT where the configuration of its base model is at hand"


@dataclass(frozen=True)
class _Parsed:
    header: GgufHeader
    alpha: float  # 0 stands for none
    tensors: SortedPairs

    @property
    def all_tensors(self) -> TensorHeader:
        return TensorHeader(self.header.tensors, {})

    def scale(self, rank: int) -> float:
        return _scale(self.alpha, rank)


class GgufFormat:
    """The format of llama.cpp's `convert_lora_to_gguf.py`; there is no configuration and no card."""

    name = "gguf"
    is_for_images = False
    suffix = SUFFIX
    about = "a single file NAME.gguf for llama.cpp"
    companions: frozenset[str] = frozenset()
    watched: frozenset[str] = frozenset()

    def find(self, folder: Folder) -> list[AdapterPaths]:
        """Find every GGUF file that says it is an adapter; whole models are passed over."""
        stems = ((without_suffix(name, SUFFIX), path) for name, path in sorted(folder.files.items()))
        return [AdapterPaths(folder.path / stem, path) for stem, path in stems if stem and _says_adapter(path)]

    def refuse(self, folder: Folder) -> list[AdapterRefused]:
        """Refuse nothing: a file is an adapter of this format or none at all."""
        return []

    def read_config(self, config: bytes) -> ConfigFacts:
        """Take the place of a configuration, which this format does not have."""
        if config:
            raise AdapterRefused("a GGUF adapter has no configuration", kind="config")
        return ConfigFacts(None)

    def inspect(
        self, config: bytes, weights: Buffer, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> AdapterSummary:
        """Check a file and summarise it."""
        with located(path):
            self.read_config(config)
            return self._summary(_parse(weights, initial), weights)

    def read(
        self, config: bytes, weights: bytes, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> LoadedAdapter:
        """Read an adapter's factors under llama.cpp's names, and its other tensors as they are."""
        from icmlora.formats.pairs.ab_tensors import read_pairs

        with located(path):
            self.read_config(config)
            parsed = _parse(weights, initial)
            return read_pairs(weights, self._summary(parsed, weights), parsed.tensors, parsed.scale)

    def runnable(
        self, config: bytes, weights: bytes, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> RunnableAdapter:
        """Refuse: names and rows are llama.cpp's, which transformers does not have."""
        self.read(config, weights, path=path, initial=initial)
        fact = "it cannot be run by icm: names and rows of a GGUF adapter are llama.cpp's"
        raise AdapterRefused(fact, kind="cannot-run", path=path, hint=_BASE)

    def encode(
        self,
        adapter: Adapter,
        *,
        card: str,
        metadata: Mapping[str, str],
        like: Template | None = None,
        dtype: str | None = None,
        pad_rank: int | None = None,
        extras: Mapping[str, RawTensor] | None = None,
    ) -> AdapterBytes:
        """Write an adapter with the keys of another one; there is no fresh form, as no adapter says its architecture.

        With `pad_rank`, `adapter.lora.alpha` is the rank, so that the scale is 1.
        """
        from icmlora.formats.pairs.ab_tensors import write_pairs

        if like is None:
            fact = "a GGUF adapter names the architecture of its base model, which is not known here"
            raise AdapterRefused(fact, kind="config", hint="`icm materialize --format gguf` finds it out")
        form = PairForm.parse(like)
        values = _values_of(form)
        if pad_rank is not None:
            values[ALPHA] = GgufValue.float32(pad_rank)
        alpha = _alpha(GgufHeader(values))
        tensors = write_pairs(
            adapter,
            like,
            form,
            turned=_turned,
            suffix=_WEIGHT,
            scale=lambda rank: _scale(alpha, rank),
            dtype=dtype,
            rank=pad_rank,
        )
        return AdapterBytes(encode_gguf_file(values, tensors | dict(extras or {})))

    def lay_out(self, files: AdapterBytes, name: str) -> dict[str, bytes]:
        """Return the single file."""
        return {name + SUFFIX: files.weights}

    def _summary(self, parsed: _Parsed, weights: Buffer) -> AdapterSummary:
        header = parsed.header
        facts = ConfigFacts(_base_of(header), None, TASK_TYPE)
        kind = header.text(_KIND)
        if kind != "lora":
            fact = f"{_KIND} is {escape(repr(kind), 48)}, not lora"
            return original_only(facts, parsed.all_tensors, parsed.tensors.pairs, fact)
        if not parsed.tensors.pairs:
            fact = "does nothing: it holds no LoRA factors"
            return original_only(facts, parsed.all_tensors, (), fact, does_nothing=not header.tensors)
        form = {"header": base64.b64encode(encode_values(header.values)).decode("ascii")}
        return summary_of(facts, parsed.all_tensors, parsed.tensors, weights, form=form)


def architecture_of(weights: Buffer) -> str:
    """Return what llama.cpp calls the architecture of an adapter's base model."""
    found = read_gguf(weights).text(ARCHITECTURE)
    if found is None:
        raise AdapterRefused(f"the header has no {ARCHITECTURE}", kind="damaged")
    return found


def _says_adapter(path: Path) -> bool:
    """Look at the start of a file; one that cannot be read may have nothing to do with icm."""
    try:
        with open_regular(path, max_bytes=2**62) as (descriptor, size):
            head = read_exactly(descriptor, min(size, _PEEK_BYTES), 0)
    except AdapterRefused:
        return False
    return head.startswith(b"GGUF") and _IS_ADAPTER in head


def _parse(weights: Buffer, initial: bytes | None) -> _Parsed:
    if initial is not None:
        raise AdapterRefused("a GGUF adapter has no initial weights to take off", kind="initial")
    header = read_gguf(weights)
    if header.text("general.type") != "adapter":
        raise AdapterRefused("a GGUF file, but not of an adapter", kind="gguf")
    if header.text(ARCHITECTURE) is None:
        raise AdapterRefused(f"the header has no {ARCHITECTURE}", kind="damaged")
    tensors = sort_pairs(header.tensors, _WEIGHT, lambda name, a, b: LoraPair(name, a, b, *_turned(name)))
    check_orientation(tensors.pairs)
    return _Parsed(header, _alpha(header), tensors)


def _turned(module: str) -> tuple[bool, bool]:
    """Say whether the factors of a module are stored the other way round."""
    return module == _EMBEDDING, False


def _alpha(header: GgufHeader) -> float:
    found = header.values.get(ALPHA)
    alpha = 0.0 if found is None else found.content
    if isinstance(alpha, bool) or not isinstance(alpha, float) or not abs(alpha) <= _MAX_ALPHA:
        raise AdapterRefused(f"{ALPHA} is {escape(repr(alpha), 48)}, not a number up to 1e30", kind="config")
    return alpha


def _scale(alpha: float, rank: int) -> float:
    """Return what llama.cpp multiplies B @ A by: alpha 0 stands for no alpha."""
    return alpha / rank if alpha else 1.0


def _base_of(header: GgufHeader) -> str | None:
    """Return the base model's name on the hub, or else the name that the file gives it."""
    address = _HUB.fullmatch(header.text(_ADDRESS) or "")
    label = address[1] if address else header.text(_NAME)
    return None if label is None or len(label) > _MAX_LABEL else label


def _values_of(form: PairForm) -> dict[str, GgufValue]:
    """Read the keys of the original; a template may come from anywhere."""
    noted = form.own.get("header")
    if not isinstance(noted, str) or form.own.keys() != {"header"}:
        raise bad_template()
    try:
        return parse_values(base64.b64decode(noted, validate=True))
    except (binascii.Error, ValueError):
        raise bad_template() from None


GGUF: AdapterFormat = GgufFormat()
