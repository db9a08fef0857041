"""The fingerprint of a base model: its weights and its architecture. Never imports torch.

    sha256( sorted digests of the weight files + architecture in config.json )

A base model with a loader has no `config.json`, so its fingerprint covers the digests of all its files. Two folders
with the same weight files and the same architecture are the same base model, regardless of location and shard names. A
GGUF file and the folder converted from it are different files and have different fingerprints. The tokenizer is
excluded, because it does not affect whether an adapter fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from icmlora.base_models.finding.lookup import FoundBase, read_config

# Keys that differ between copies of one model: rewritten by saving tools, or relevant only to generation.
_VOLATILE = {"transformers_version", "dtype", "torch_dtype", "use_cache"}
_VOLATILE |= {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"}


def fingerprint_base(found: FoundBase) -> str:
    """Hash the weights and architecture of a base model on disk; read every weight file once."""
    total, digests = hashlib.sha256(), []
    for path in found.weights:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    for digest in sorted(digests):
        total.update(digest)
    if found.has_config:
        total.update(_architecture(read_config(found.path)))
    return total.hexdigest()


def is_same_model(
    left: FoundBase, right: FoundBase, fingerprint: Callable[[FoundBase], str] = fingerprint_base
) -> bool:
    """Return whether two copies have equal fingerprints; read the weights only if cheaper checks are inconclusive."""
    if left.stamp() == right.stamp():
        return True
    sizes = (sorted(path.stat().st_size for path in found.weights) for found in (left, right))
    if (left.is_gguf, left.loader) != (right.is_gguf, right.loader) or next(sizes) != next(sizes):
        return False
    if left.has_config and _architecture(read_config(left.path)) != _architecture(read_config(right.path)):
        return False
    return fingerprint(left) == fingerprint(right)


def _architecture(config: dict[str, object]) -> bytes:
    stable = {key: value for key, value in config.items() if key not in _VOLATILE and not key.startswith("_")}
    return json.dumps(stable, sort_keys=True, separators=(",", ":")).encode()
