"""Identify unsupported adapters by file name or a few bytes, each with a remedy.

Trainer state (optimizer, scheduler, random state, arguments) and whole models are not adapters: they are skipped
unopened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.io.files import open_regular, read_exactly
from icmlora.io.safetensors import read_tensor_header
from registry.names import escape

APPLE_DOUBLE = "._"
"""Prefix of macOS metadata files on foreign file systems."""

PICKLES = ("adapter_model.bin", "adapter_model.pt")
"""PEFT's names for pickled weights; `icm ingest --read-bin` reads them."""

_SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors|adapter_model\.safetensors\.index\.json")
# Pickles are not read here, so only the name distinguishes an adapter from trainer state or a table of results.
_PICKLE = re.compile(
    r"adapter_(model|weights)\.(bin|pt|pth|pkl)|.*\.(nemo|pth\.lora)"
    r"|(.*[-_.])?(lora|lokr|loha|locon|adapters?)([-_.].*)?\.(bin|pt|pth|pkl|pickle|ckpt)",
    re.IGNORECASE,
)
# Files of trainers, loggers and hubs next to an adapter, and copies of the adapter in other forms.
_PASSED_OVER = re.compile(
    r"\..*|\d{7}_adapters\.safetensors|(training_args|optimizer|scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|pytorch_model)[-_.0-9].*"
    r"|(consolidated|mp_rank|zero_|bf16_zero_|custom_checkpoint_|events\.out\.tfevents|adapter_model[-.]).*"
    r"|model[-.0-9a-z]*\.(bin|pt|pth|ckpt|safetensors|index\.json)|(all|train|eval|test|predict)_results\.(json|txt)"
    r"|(trainer_state|config|trainer_log|running_log|args|model_args|data_args|finetuning_args|README)\.(json|jsonl|txt|md)"
    r"|(training_(args|loss|eval_.*|rewards_.*)|llamaboard_config|axolotl_config|config)\.(ya?ml|png)"
    r"|latest|completed|LICEN[CS]E.*|.*\.(log|png|svg|md)",
    re.IGNORECASE,
)

_LITGPT = "merge it with 'litgpt merge_lora' and extract a LoRA, or train with PEFT"
_RESAVE = "load the adapter where it was trained and save it as safetensors"
_READ_BIN = "use `icm ingest --read-bin` to read it in a sandbox, or save it as safetensors where it was trained"
_BARE = "copy its adapter_config.json into the same folder"
_EXTRACT = "extract a LoRA from it where it was trained, with a script from kohya or LyCORIS"
_TO_PEFT = "convert it to a PEFT folder first"
_OF_MLX = "rename it to adapters.safetensors, in a folder with its adapter_config.json"

# Exact file names: kind, description, hint.
_NAMES: Mapping[str, tuple[str, str, str]] = {
    "pytorch_lora_weights.safetensors": ("diffusers", "a diffusers LoRA", _TO_PEFT),
    "adapter_model.safetensors": ("bare", "adapter weights without adapter_config.json: alpha is unknown", _BARE),
    "latest_checkpointed_iteration.txt": ("megatron", "a Megatron run", "use AutoBridge.export_adapter_ckpt"),
}

# Marks in the headers of other safetensors files.
_MARKS: tuple[tuple[bytes, tuple[str, str, str]], ...] = (
    (rb'\.lora_(down|up)\.weight"', ("kohya", "a LoRA with unknown module names", _TO_PEFT)),
    (rb'_lora\d?\.(down|up)\.weight"', ("diffusers", "an XLabs or old diffusers LoRA", _TO_PEFT)),
    (rb'\.lora_[ab]"', ("mlx", "weights of MLX-LM without their configuration", _OF_MLX)),
    (rb'\.lora_[AB]\.weight"', ("bare", "LoRA weights without adapter_config.json: alpha is unknown", _BARE)),
    (rb'\.diff(_b)?"', ("diff", "full weight differences (.diff), not a LoRA", _EXTRACT)),
)
# Files that are not adapters; skipped next to adapters.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (rb'"(emb_params|string_to_param|clip_[lg]|t5xxl|<[^"]{1,80}>)"', "a textual inversion embedding"),
    (rb'"(ip_adapter|image_proj)\.', "an IP-Adapter"),
    (rb'"(control_model|controlnet_[a-z_]+|input_hint_block)\.', "a ControlNet"),
    (rb'"([a-z_.]*\.)?((first|cond)_stage_model|diffusion_model|\w+_blocks|layers?|h)\.', "a whole model"),
)
_PEEK_BYTES = 1024 * 1024
_ZIP = b"PK\x03\x04"
_PICKLED = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth"})


def foreign_adapters(files: Mapping[str, Path]) -> list[AdapterRefused]:
    """Return a refusal for each adapter in an unsupported format."""
    has_config = "adapter_config.json" in files
    found = [_foreign(name, path, has_config=has_config) for name, path in sorted(files.items())]
    return [refusal for refusal in found if refusal is not None]


def described(path: Path) -> AdapterRefused:
    """Return the refusal that describes a file without an adapter, with a hint."""
    name, folder = path.name, path.parent
    config = folder / "adapter_config.json"
    if name == config.name or (name in ("adapter_model.safetensors", "adapters.safetensors") and config.is_file()):
        hint = f"specify the folder {escape(str(folder), 4096)}"
        return AdapterRefused("only one file of an adapter folder", kind="not-a-folder", path=path, hint=hint)
    if name.startswith(APPLE_DOUBLE):
        hint = "specify the file without the prefix '._'"
        return AdapterRefused("a macOS metadata file", kind="not-a-folder", path=path, hint=hint)
    known = _foreign(name, path, has_config=config.is_file())
    if known is not None:
        return known
    head = _peek(path, _PEEK_BYTES)
    if path.suffix.lower() in _PICKLED and head.startswith((_ZIP, b"\x80")):
        return UnsafeInput("a pickle can run code, so it was not opened", kind="pickle", path=path, hint=_RESAVE)
    if head.startswith(_ZIP):
        hint = "unpack it and specify the folder"
        return AdapterRefused("a ZIP archive", kind="not-a-folder", path=path, hint=hint)
    what = "not an adapter file"
    if name.lower().endswith(".safetensors"):
        try:
            read_tensor_header(path)
        except AdapterRefused as error:
            return error
        what = next((what for mark, what in _OTHERS if re.search(mark, head)), "tensors of an unknown kind of adapter")
    hint = "run `icm convert --list-formats` to list the supported formats"
    return AdapterRefused(what, kind="not-a-folder", path=path, hint=hint)


def is_passed_over(name: str) -> bool:
    """Return whether a file next to an adapter belongs to a trainer or hub and need not be kept."""
    return _PASSED_OVER.fullmatch(name[:256]) is not None


def _foreign(name: str, path: Path, *, has_config: bool) -> AdapterRefused | None:
    if name in _NAMES:
        return _refusal(_NAMES[name], path)
    if _SHARD.fullmatch(name):
        return _refusal(("shards", "an adapter in several files", "load it with PEFT and save it as one file"), path)
    if _PICKLE.fullmatch(name[:256]):
        hint = _READ_BIN if has_config and name in PICKLES else _LITGPT if name.endswith(".pth.lora") else _RESAVE
        return UnsafeInput("a pickle can run code, so it was not opened", kind="pickle", path=path, hint=hint)
    if name.lower().endswith(".safetensors"):
        head = _peek(path, _PEEK_BYTES)
        # Searched as text, not parsed: the file may be unrelated to icm.
        header = head[8 : 8 + int.from_bytes(head[:8], "little")]
        return next((_refusal(facts, path) for mark, facts in _MARKS if re.search(mark, header)), None)
    return None


def _refusal(facts: tuple[str, str, str], path: Path) -> AdapterRefused:
    kind, what, hint = facts
    return AdapterRefused(f"{what}: icm does not read this format", kind=kind, path=path, hint=hint)


def _peek(path: Path, size: int) -> bytes:
    """Return the start of a file, or nothing if it cannot be read: it may be unrelated to icm."""
    try:
        with open_regular(path, max_bytes=2**62) as (descriptor, length):
            return read_exactly(descriptor, min(size, length), 0)
    except AdapterRefused:
        return b""
