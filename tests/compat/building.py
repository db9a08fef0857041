"""Build adapters with PEFT: every tensor that training would change is changed."""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.compat.bases import base_model, label_of, quiet
from tests.compat.case import Case, Outcome

if TYPE_CHECKING:
    import torch

Options = Mapping[str, Any]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fresh_model(base: str) -> Any:
    """Copy a base model, so that an adapter can be put into it."""
    return copy.deepcopy(base_model(base)[0])


def train_a_little(model: torch.nn.Module, by: float = 0.05) -> None:
    """Move every trainable tensor by noise, so that B is no longer zero."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += (by * torch.randn(parameter.shape)).to(parameter.dtype)


def computed(model: Any, base: str) -> torch.Tensor:
    """Return what a model computes from its base's inputs."""
    import torch

    with torch.no_grad(), quiet():
        output = model(**copy.deepcopy(base_model(base)[1]))
    if isinstance(output, dict):
        named = [output[key] for key in ("logits", "logits_per_image", "last_hidden_state", "sample") if key in output]
        return named[0].float()
    return output[0].float()


def round_to(dtype: str, model: Any) -> None:
    """Round the trainable tensors to the numbers that `dtype` has."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype)).to(parameter.dtype)


def converted_by_peft(folder: Path) -> Path:
    """Return where a case puts the adapter in whose form its code comes back, such as PEFT's conversion to a LoRA."""
    return folder.parent.parent / "converted" / folder.name


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the tensors of an adapter's file."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone().contiguous() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def store_as(folder: Path, *dtypes: str) -> None:
    """Store the floating-point tensors in a number format, or in several by turns."""
    import torch

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: tensor.to(getattr(torch, dtypes[turn % len(dtypes)])) if tensor.is_floating_point() else tensor
            for turn, (name, tensor) in enumerate(sorted(tensors.items()))
        }

    rewrite(folder, change)


def set_fields(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter's configuration."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2))


def save(model: Any, folder: Path, base: str, **options: Any) -> None:
    """Save an adapter under the label of its base model."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = label_of(base)
    with quiet():
        model.save_pretrained(folder, **options)


def trained(config: Any, base: str, seed: str, dtype: str = "float32", **options: Any) -> Any:
    """Return a base model with an adapter of a configuration, a little trained."""
    import peft
    import torch

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(zlib.crc32(seed.encode()))
        model = peft.get_peft_model(fresh_model(base), config, **options)
        train_a_little(model)
    round_to(dtype, model)
    return model.eval()


def write_lora(
    folder: Path, base: str, options: Options, *, dtype: str = "float32", saving: Options | None = None
) -> torch.Tensor:
    """Write a LoRA of PEFT's `LoraConfig`; the tensors are in one number format."""
    import peft

    model = trained(peft.LoraConfig(**({"r": 4, "lora_alpha": 16} | dict(options))), base, folder.name, dtype)
    output = computed(model, base)
    save(model, folder, base, **(saving or {}))
    if dtype != "float32":
        store_as(folder, dtype)
    return output


def lora(
    name: str,
    base: str,
    options: Options,
    outcome: Outcome,
    group: str,
    remark: str = "",
    *,
    dtype: str = "float32",
    saving: Options | None = None,
    after: Callable[[Path], None] | None = None,
    loads: bool = True,
) -> Case:
    """Describe a case that is a `LoraConfig`; `after` changes its folder once PEFT has written it."""

    def build(folder: Path) -> torch.Tensor:
        output = write_lora(folder, base, options, dtype=dtype, saving=saving)
        if after is not None:
            after(folder)
        return output

    return Case(name, group, build, outcome, remark, base if loads else None)


def from_plain(
    name: str, change: Callable[[Path], None], outcome: Outcome, group: str, remark: str = "", *, loads: bool = False
) -> Case:
    """Describe a case that is a plain adapter with something done to its files."""

    def build(folder: Path) -> None:
        write_lora(folder, "llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"})
        change(folder)

    return Case(name, group, build, outcome, remark, "llama" if loads else None)


def copy_adapter(source: Path, target: Path, *, seed: int = 0, **fields: Any) -> Path:
    """Copy an adapter's configuration and weights into another folder, with the weights of another training."""
    import torch

    target.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(source / name, target / name)
    noise = torch.Generator().manual_seed(seed)
    rewrite(
        target,
        lambda tensors: {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=noise) for name, tensor in tensors.items()
        },
    )
    if fields:
        set_fields(target, **fields)
    return target
