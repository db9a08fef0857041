"""Name the adapters that no reader here understands, by file name or by a few bytes, and say what to do with each.

A trainer's own state (optimizer, scheduler, random numbers, arguments) and whole models are not adapters: they are
passed over unopened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.io.files import open_regular, read_exactly

_SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors|adapter_model\.safetensors\.index\.json")
_PICKLE = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|nemo|pth\.lora)")
_NOT_ADAPTERS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|pytorch_model|consolidated|mp_rank|zero_|bf16_zero_).*"
    r"|model[-.0-9a-z]*\.(bin|pt|pth|ckpt)"
)

_LITGPT = "merge it with 'litgpt merge_lora' and extract a LoRA, or train with PEFT"
_RESAVE = "load the adapter where it was trained and save it as safetensors"
_BARE = "copy the adapter_config.json of its training into the same folder"
_TO_PEFT = "convert it to a PEFT folder first"

# Exact names that tell a dialect: kind, what it is, what to do.
_NAMES: Mapping[str, tuple[str, str, str]] = {
    "adapters.safetensors": ("mlx", "an MLX-LM adapter", _TO_PEFT),
    "pytorch_lora_weights.safetensors": ("diffusers", "a diffusers LoRA", _TO_PEFT),
    "adapter_model.safetensors": ("bare", "adapter weights without adapter_config.json: alpha is unknown", _BARE),
    "latest_checkpointed_iteration.txt": ("megatron", "a Megatron run", "use AutoBridge.export_adapter_ckpt"),
}

# Marks in the header of a safetensors file of any other name.
_MARKS: tuple[tuple[bytes, tuple[str, str, str]], ...] = (
    (rb'\.(hada_w1_a|lokr_w1(_a)?|oft_blocks)"', ("lycoris", "a LyCORIS adapter", _TO_PEFT)),
    (rb'\.lora_(down|up)\.weight"', ("kohya", "a kohya LoRA", "convert it with diffusers, then save with PEFT")),
    (rb'\.lora_[ab]"', ("mlx", "an MLX-LM adapter", _TO_PEFT)),
    (rb'\.lora_[AB]\.weight"', ("bare", "LoRA weights without adapter_config.json: alpha is unknown", _BARE)),
)
_PEEK_BYTES = 1024 * 1024
_GGUF_ADAPTER = b"general.type" + (8).to_bytes(4, "little") + (7).to_bytes(8, "little") + b"adapter"


def foreign_adapters(files: Mapping[str, Path]) -> list[AdapterRefused]:
    """Return a refusal for each adapter among some files that no format here reads."""
    return [refusal for name, path in sorted(files.items()) if (refusal := _foreign(name, path)) is not None]


def _foreign(name: str, path: Path) -> AdapterRefused | None:
    if name in _NAMES:
        return _refusal(_NAMES[name], path)
    if _SHARD.fullmatch(name):
        return _refusal(("shards", "an adapter in several files", "join them: load it with PEFT and save it"), path)
    if _PICKLE.fullmatch(name) and not _NOT_ADAPTERS.fullmatch(name):
        hint = _LITGPT if name.endswith(".pth.lora") else _RESAVE
        return UnsafeInput("a pickle can run code, so it was not opened", kind="pickle", path=path, hint=hint)
    if name.endswith(".gguf"):
        if _GGUF_ADAPTER in _peek(path, 64 * 1024):
            return _refusal(("gguf", "a llama.cpp adapter", "give the PEFT folder it was made from"), path)
    elif name.endswith(".safetensors"):
        head = _peek(path, _PEEK_BYTES)
        # Searched as text and not parsed: this file may have nothing to do with icm.
        header = head[8 : 8 + int.from_bytes(head[:8], "little")]
        return next((_refusal(facts, path) for mark, facts in _MARKS if re.search(mark, header)), None)
    return None


def _refusal(facts: tuple[str, str, str], path: Path) -> AdapterRefused:
    kind, what, hint = facts
    return AdapterRefused(f"{what}: icm does not read this format", kind=kind, path=path, hint=hint)


def _peek(path: Path, size: int) -> bytes:
    """Read the start of a file; return nothing if it cannot be read, because it may have nothing to do with icm."""
    try:
        with open_regular(path, max_bytes=2**62) as (descriptor, length):
            return read_exactly(descriptor, min(size, length), 0)
    except AdapterRefused:
        return b""
