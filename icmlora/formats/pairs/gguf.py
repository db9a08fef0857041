"""Adapters of llama.cpp: single files `NAME.gguf` whose `general.type` is `adapter`.

    blk.0.attn_q.weight.lora_a (r, in)   lora_b (out, r)   dW = alpha / r * lora_b @ lora_a;  without alpha: factor 1
    token_embd.weight.lora_a (rows, r)                     an embedding has A transposed
    blk.0.ffn_up_exps.weight.lora_a (E, r, in)             experts are separate modules: blk.0.ffn_up_exps.0 ...

Modules have llama.cpp's names, and rows of B its order: their names in transformers depend on the base model, which is
unknown here. `icmlora.formats.pairs.gguf_lora.with_base_names` translates an adapter when the base model is known.

Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused
from icmlora.formats.format import (
    AdapterBytes,
    AdapterFormat,
    AdapterSummary,
    Buffer,
    ConfigFacts,
    Extras,
    FoundAdapter,
    LoadedAdapter,
    RunnableAdapter,
    Template,
    Texts,
    without_suffix,
)
from icmlora.formats.noted_form import bad_note
from icmlora.formats.pairs.ab_pairs import (
    TASK_TYPE,
    LoraPair,
    PairForm,
    SortedPairs,
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
from icmlora.formats.peft.config import MAX_LABEL
from icmlora.io.files import open_regular, read_exactly
from icmlora.io.safetensors import TensorHeader
from registry.names import escape

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.formats.discovery.tree import Folder

SUFFIX = ".gguf"
ARCHITECTURE = "general.architecture"
_ALPHA = "adapter.lora.alpha"
_KIND = "adapter.type"
_NAME = "general.base_model.0.name"
_ADDRESS = "general.base_model.0.repo_url"
_IS_ADAPTER = b"general.type" + (8).to_bytes(4, "little") + (7).to_bytes(8, "little") + b"adapter"
_PEEK_BYTES = 64 * 1024
# llama.cpp's converter prepends this to a PEFT adapter's base model name, even if it is a path.
_HUB = re.compile(r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+|/.+?)/?", re.ASCII)
_MAX_ALPHA = 1e30
_WEIGHT = ".weight"
_EMBEDDING = "token_embd"
_BASE = "run `icm materialize --format peft` on a machine that has the configuration of its base model"


@dataclass(frozen=True)
class _Parsed:
    header: GgufHeader
    alpha: float  # 0 if missing
    tensors: SortedPairs

    def summary(self, weights: Buffer) -> AdapterSummary:
        facts, tensors = ConfigFacts(_base_of(self.header), None, TASK_TYPE), TensorHeader(self.header.tensors, {})
        kind = self.header.text(_KIND)
        if kind != "lora":
            fact = f"{_KIND} is {escape(repr(kind), 48)}, not lora"
            return original_only(facts, tensors, self.tensors.pairs, fact)
        if not self.tensors.pairs:
            fact = "does nothing: it holds no LoRA factors"
            return original_only(facts, tensors, (), fact, does_nothing=not tensors.tensors)
        form = {"header": base64.b64encode(encode_values(self.header.values)).decode("ascii")}
        return summary_of(facts, tensors, self.tensors, weights, form=form)


class GgufFormat(AdapterFormat):
    """The format of llama.cpp's `convert_lora_to_gguf.py`; there is no configuration and no card."""

    name = "gguf"
    suffix = SUFFIX
    about = "a single file NAME.gguf for llama.cpp"

    def find(self, folder: Folder) -> list[FoundAdapter]:
        """Return every GGUF file that declares itself an adapter; whole models are skipped."""
        stems = ((without_suffix(name, SUFFIX), path) for name, path in sorted(folder.files.items()))
        return [FoundAdapter(self, folder.path / stem, path) for stem, path in stems if stem and _says_adapter(path)]

    def _summary(self, config: bytes, weights: Buffer) -> AdapterSummary:
        self.read_config(config)
        return _parse(weights).summary(weights)

    def _load(self, config: bytes, weights: bytes) -> LoadedAdapter:
        """Read the factors under llama.cpp's names, and the other tensors unchanged."""
        from icmlora.formats.pairs.ab_tensors import read_pairs

        self.read_config(config)
        parsed = _parse(weights)
        return read_pairs(weights, parsed.summary(weights), parsed.tensors, partial(_scale, parsed.alpha))

    def _run(self, config: bytes, weights: bytes) -> RunnableAdapter:
        self._load(config, weights)
        fact = "icm cannot run it: a GGUF adapter uses llama.cpp's names and row order"
        raise AdapterRefused(fact, kind="cannot-run", hint=_BASE)

    def _fresh(self, adapter: Adapter, metadata: Texts, dtype: str) -> AdapterBytes:
        fact = "a GGUF adapter must name the architecture of its base model, which is unknown"
        raise AdapterRefused(fact, kind="config", hint="run `icm materialize --format gguf`, which determines it")

    def _alike(
        self, adapter: Adapter, like: Template, dtype: str | None, rank: int | None, extras: Extras, metadata: Texts
    ) -> AdapterBytes:
        """Write an adapter with the keys of another adapter; with `rank`, alpha = rank, so the scale is 1."""
        from icmlora.formats.pairs.ab_tensors import write_pairs

        form = PairForm.parse(like)
        values = _values_of(form)
        if rank is not None:
            values[_ALPHA] = GgufValue.of(float(rank))
        alpha = _alpha(GgufHeader(values))
        tensors = write_pairs(
            adapter,
            like,
            form,
            turned=_turned,
            suffix=_WEIGHT,
            scale=partial(_scale, alpha),
            dtype=dtype,
            rank=rank,
        )
        return AdapterBytes(encode_gguf_file(values, tensors | dict(extras)))


def architecture_of(weights: Buffer) -> str:
    """Return llama.cpp's name for the architecture of an adapter's base model.

    Raises:
        AdapterRefused: The file is damaged, or does not name the architecture.
    """
    found = read_gguf(weights).text(ARCHITECTURE)
    if found is None:
        raise AdapterRefused(f"the header has no {ARCHITECTURE}", kind="damaged")
    return found


def _says_adapter(path: Path) -> bool:
    """Return whether a file starts as a GGUF adapter; False if it cannot be read."""
    try:
        with open_regular(path, max_bytes=2**62) as (descriptor, size):
            head = read_exactly(descriptor, min(size, _PEEK_BYTES), 0)
    except AdapterRefused:
        return False
    return head.startswith(b"GGUF") and _IS_ADAPTER in head


def _parse(weights: Buffer) -> _Parsed:
    header = read_gguf(weights)
    if header.text("general.type") != "adapter":
        raise AdapterRefused("a GGUF file, but not an adapter", kind="gguf")
    if header.text(ARCHITECTURE) is None:
        raise AdapterRefused(f"the header has no {ARCHITECTURE}", kind="damaged")
    tensors = sort_pairs(header.tensors, _WEIGHT, lambda name, a, b: LoraPair(name, a, b, *_turned(name)))
    check_orientation(tensors.pairs)
    return _Parsed(header, _alpha(header), tensors)


def _turned(module: str) -> tuple[bool, bool]:
    """Return whether A and B of a module are stored transposed."""
    return module == _EMBEDDING, False


def _alpha(header: GgufHeader) -> float:
    found = header.values.get(_ALPHA)
    alpha = 0.0 if found is None else found.content
    if isinstance(alpha, bool) or not isinstance(alpha, float) or not abs(alpha) <= _MAX_ALPHA:
        raise AdapterRefused(f"{_ALPHA} is {escape(repr(alpha), 48)}, not a number up to 1e30", kind="config")
    return alpha


def _scale(alpha: float, rank: int) -> float:
    """Return llama.cpp's factor for B @ A; alpha 0 means no alpha."""
    return alpha / rank if alpha else 1.0


def _base_of(header: GgufHeader) -> str | None:
    """Return the base model's name on the hub, or else its name in the file."""
    address = _HUB.fullmatch(header.text(_ADDRESS) or "")
    label = address[1] if address else header.text(_NAME)
    return None if label is None or len(label) > MAX_LABEL else label


def _values_of(form: PairForm) -> dict[str, GgufValue]:
    """Read the keys of the original from an untrusted template."""
    noted = form.own.get("header")
    if not isinstance(noted, str) or form.own.keys() != {"header"}:
        raise bad_note()
    try:
        return parse_values(base64.b64decode(noted, validate=True))
    except (binascii.Error, ValueError):
        raise bad_note() from None


GGUF: AdapterFormat = GgufFormat()
