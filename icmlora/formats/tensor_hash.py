"""Detect files with the same adapter, even if other parts of headers and configurations differ.

    tensors_key     a short hash of names, types, shapes and 32 bytes of each tensor; equal tensors have equal keys
    tensors_digest  SHA-256 of names, types, shapes and all bytes; equal digests mean equal tensors
    plain_config    a configuration without fields that have no effect

An ingest computes the key of every file while it is in memory: hashing all bytes a second time would make the ingest a
third slower. If two keys are equal, the digests decide. A file that is not safetensors counts as one tensor. Imports
neither numpy nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Protocol

from icmlora.errors import AdapterRefused
from icmlora.formats.format import Buffer
from icmlora.io.safetensors import header_text, parse_header, remembered
from icmlora.io.strict_json import parse_object

_KEY_BYTES = 8
_SAMPLE = 32  # bytes, from the middle of each tensor
# Fields of `adapter_config.json` that do not change the meaning of the tensors. The tensors themselves show the target
# modules.
_UNIMPORTANT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "ephemeral_gpu_offload", "exclude_modules", "inference_mode"),
        *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core", "peft_version"),
        *("revision", "runtime_config", "target_modules", "task_type"),
    }
)


class Tensors(Protocol):
    """A stored file of weights."""

    @property
    def weights(self) -> str:
        """Digest of the file."""
        ...

    @property
    def tensors_key(self) -> str | None:
        """Result of `tensors_key`; None if not computed."""
        ...


def same_tensors(one: Tensors, other: Tensors, digest: Callable[[str], str | None]) -> bool:
    """Return whether two files hold the same tensors; `digest` is called only if their keys match.

    Args:
        one: A file.
        other: Another file.
        digest: Return the `tensors_digest` of the file with a digest, or None if it cannot be read.
    """
    if one.weights == other.weights:
        return True
    if one.tensors_key is None or one.tensors_key != other.tensors_key:
        return False
    found = digest(one.weights)
    return found is not None and found == digest(other.weights)


def tensors_key(weights: Buffer) -> str:
    """Return 16 hexadecimal digits that are equal for equal tensors, and almost never otherwise."""
    data = memoryview(weights)
    prefix, places = _layout(data)
    samples = [data[(begin + end) // 2 : min((begin + end) // 2 + _SAMPLE, end)] for begin, end in places]
    return hashlib.sha256(b"".join([prefix, *samples])).hexdigest()[: 2 * _KEY_BYTES]


def tensors_digest(weights: Buffer) -> str:
    """Return the SHA-256 of all tensors in the order of their names."""
    data = memoryview(weights)
    prefix, places = _layout(data)
    found = hashlib.sha256(prefix)
    for begin, end in places:
        found.update(data[begin:end])
    return found.hexdigest()


def plain_config(config: bytes) -> str:
    """Return the fields of a configuration that may change the meaning of the tensors, as canonical JSON.

    Null, false and empty fields are omitted: newer libraries write more of them. A configuration that is not a JSON
    object is returned as text.
    """
    try:
        fields = parse_object(config, what="the configuration", max_bytes=len(config))
    except AdapterRefused:
        return config.decode("utf-8", "backslashreplace")
    kept = {
        name: value
        for name, value in fields.items()
        if name not in _UNIMPORTANT and not (value is None or value is False or value in ([], {}))  # 0 is not empty
    }
    return json.dumps(kept, sort_keys=True)


_Layout = tuple[bytes, tuple[tuple[int, int], ...]]


def _layout(data: memoryview) -> _Layout:
    try:
        return _parsed(header_text(data), len(data))
    except AdapterRefused:
        return b"", ((0, len(data)),)


@remembered  # parsing takes longer than everything else
def _parsed(text: bytes, size: int) -> _Layout:
    """Return names, types and shapes of a header's tensors, and their offsets; both in order of names."""
    tensors = sorted(parse_header(text, size).tensors, key=lambda tensor: tensor.name)
    prefix = json.dumps([[tensor.name, tensor.dtype, tensor.shape] for tensor in tensors]).encode()
    return prefix, tuple((tensor.begin, tensor.end) for tensor in tensors)
