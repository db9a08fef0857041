"""Adapters that do nothing, files that cannot be read safely, and other dialects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.compat.building import CONFIG, WEIGHTS, converted_by_peft, from_plain, rewrite, set_fields, write_lora
from tests.compat.case import Case, Outcome

_DEAD = "Adapters that do nothing"
_DAMAGED = "Damaged files and pickles"
_DIALECTS = "Other dialects"


def _changed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def _with_zeros(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}


def _with_nan(tensors: dict[str, Any]) -> dict[str, Any]:
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def _with_infinity(tensors: dict[str, Any]) -> dict[str, Any]:
    next(iter(tensors.values()))[0, 0] = float("inf")
    return tensors


def _without_partner(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    return tensors


def _elsewhere(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("model.layers", "model.elsewhere"): tensor for name, tensor in tensors.items()}


def _cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def _lfs_pointer(folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n"
    (folder / WEIGHTS).write_text(pointer)


def _broken_config(folder: Path) -> None:
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": ')


def _without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _as_pickle(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _pickle_beside(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")


def _sharded(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00001.safetensors")


def _wrong_rank(folder: Path) -> None:
    set_fields(folder, r=8)


def _dialect(name: str, tensors: dict[str, tuple[int, ...]], file: str, remark: str) -> Case:
    def build(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        noise = torch.Generator().manual_seed(4)
        save_file({key: torch.randn(shape, generator=noise) for key, shape in tensors.items()}, folder / file)

    return Case(name, _DIALECTS, build, "refused", remark)


def _peft_names(name: str, rename: Callable[[str], str], outcome: Outcome, remark: str) -> Case:
    return from_plain(
        name,
        _changed(lambda tensors: {rename(key): value for key, value in tensors.items()}),
        outcome,
        _DIALECTS,
        remark,
    )


def _wrapped(name: str, wrapper: str, remark: str) -> Case:
    """Describe an adapter that was saved from inside a wrapper; its code comes back as one that was not."""

    def change(folder: Path) -> None:
        shutil.copytree(folder, converted_by_peft(folder))
        inner = f"base_model.model.{wrapper}."
        rewrite(folder, lambda tensors: {key.replace("base_model.model.", inner): one for key, one in tensors.items()})

    return from_plain(name, change, "exact", _DIALECTS, f"`{wrapper}.`: {remark}")


def _old_configuration(folder: Path) -> None:
    """Write `adapter_config.json` as PEFT 0.2 did in 2023."""
    fields = {
        "base_model_name_or_path": "acme/llama",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(fields))


def _with_unknown_fields(folder: Path) -> None:
    set_fields(folder, peft_version="9.9.9", some_new_field="a value", another={"nested": [1, 2]})


def _per_expert(folder: Path) -> None:
    """Write the names that transformers 4 gave to single experts."""
    import torch
    from safetensors.torch import save_file

    write_lora(folder, "llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"})
    noise = torch.Generator().manual_seed(5)
    tensors = {}
    for expert in range(4):
        for layer, (inside, outside) in {"w1": (32, 64), "w2": (64, 32), "w3": (32, 64)}.items():
            module = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{layer}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, inside, generator=noise)
            tensors[f"{module}.lora_B.weight"] = torch.randn(outside, 4, generator=noise)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    set_fields(folder, target_modules=["w1", "w2", "w3"], base_model_name_or_path="acme/mixtral-of-2023")


def _only_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "config.json").write_text('{"model_type": "llama"}')


_MLX = {"model.layers.0.self_attn.q_proj.lora_a": (32, 8), "model.layers.0.self_attn.q_proj.lora_b": (8, 32)}
_NO_PICKLES = "coded exactly with `--read-bin`, which reads pickles in a process of its own"

_UNWRAPPED = "a code comes back without, as PEFT finds it; `ingest` says so"

CASES: tuple[Case, ...] = (
    from_plain("no-tensors", _changed(lambda _: {}), "original", _DEAD, "no tensor"),
    from_plain("untrained", _changed(_with_zeros), "original", _DEAD, "every B is zero"),
    from_plain("not-a-number", _changed(_with_nan), "original", _DEAD, "NaN"),
    from_plain("infinity", _changed(_with_infinity), "original", _DEAD, "infinite values"),
    from_plain("no-such-module", _changed(_elsewhere), "exact", _DEAD, "no module of the base model; `ingest` says so"),
    from_plain("cut-short", _cut, "refused", _DAMAGED, "half a file"),
    from_plain("lfs-pointer", _lfs_pointer, "refused", _DAMAGED, "a git-lfs pointer"),
    from_plain("broken-configuration", _broken_config, "refused", _DAMAGED, "no JSON"),
    from_plain("no-weights", _without_weights, "refused", _DAMAGED, "no weights"),
    from_plain("no-partner", _changed(_without_partner), "original", _DAMAGED, "a B is missing"),
    from_plain("wrong-rank", _wrong_rank, "original", _DAMAGED, "PEFT does not load it either"),
    from_plain("pickle", _as_pickle, "refused", _DAMAGED, _NO_PICKLES),
    from_plain("pickle-beside", _pickle_beside, "exact", _DAMAGED, "the pickle is passed over", loads=True),
    from_plain("shards", _sharded, "refused", _DAMAGED, "PEFT does not write or read shards"),
    from_plain("no-adapter", _only_nothing, "refused", _DAMAGED, "a whole model"),
    from_plain("peft-0.2", _old_configuration, "exact", _DIALECTS, "configuration of 2023", loads=True),
    from_plain("unknown-fields", _with_unknown_fields, "exact", _DIALECTS, "configuration of a later PEFT", loads=True),
    Case("experts-of-transformers-4", _DIALECTS, _per_expert, "exact", "one LoRA for each expert"),
    _peft_names("adapter-name-in-keys", lambda key: key.replace(".weight", ".default.weight"), "exact", "`.default.`"),
    _peft_names("no-prefix", lambda key: key.removeprefix("base_model.model."), "exact", "as transformers saves"),
    _peft_names(
        "hyphen-in-adapter-name",
        lambda key: key.replace(".weight", ".my-adapter.weight"),
        "exact",
        "`lora_A.my-adapter.weight`",
    ),
    _peft_names(
        "hyphen-in-module-name", lambda key: key.replace(".layers.", ".layers.en-de."), "exact", "`layers.en-de.0`"
    ),
    _wrapped("compiled", "_orig_mod", _UNWRAPPED),
    _wrapped("fully-sharded", "_fsdp_wrapped_module", _UNWRAPPED),
    _wrapped("checkpointed", "_checkpoint_wrapped_module", _UNWRAPPED),
    _peft_names(
        "data-parallel",
        lambda key: key.replace("base_model.model.", "base_model.model.module."),
        "exact",
        "`module.`: a code keeps it, as it may be the model's own; `ingest` says so",
    ),
    _dialect("mlx-alone", _MLX, "adapters.safetensors", "MLX-LM's weights without their configuration"),
)
