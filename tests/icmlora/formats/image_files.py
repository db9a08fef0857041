"""Small image adapters in single files, written by the libraries whose formats they are.

    diffusers_file      peft and the pipeline's own save_lora_weights, in three generations of names
    lycoris_file        lycoris-lora's own network: LoCon, LoHa, LoKr, full, DoRA
    kohya_file          written by sd-scripts; `image_fixtures/make_fixtures.py` says how
    xlabs_file, ai_toolkit_file, wan_file, comfyui_file
                        names and shapes of those trainers, which diffusers' own loaders read

All of them change what the model computes. The same arguments give the same tensors.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.icmlora.formats.tiny_configs import FLUX_TRANSFORMER, WAN_TRANSFORMER

FIXTURES = Path(__file__).with_name("image_fixtures")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
Names = Literal["peft", "lora", "processor"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
_FLUX = FLUX_TRANSFORMER["num_attention_heads"] * FLUX_TRANSFORMER["attention_head_dim"]
_WAN = WAN_TRANSFORMER["num_attention_heads"] * WAN_TRANSFORMER["attention_head_dim"]


@contextmanager
def installed_peft() -> Iterator[None]:
    """Let transformers use the PEFT there is: transformers 5.24 asks for 0.22, before its release."""
    with patch("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0"):
        yield


def diffusers_file(
    folder: Path,
    pipeline: Any,
    *,
    names: Names = "peft",
    metadata: bool = True,
    text_encoders: bool = True,
    targets: list[str] = ATTENTION,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a LoRA for a pipeline as diffusers' training scripts do, and return the file.

    Args:
        folder: Where `pytorch_lora_weights.safetensors` goes.
        pipeline: A tiny one; it has the adapter afterwards.
        names: "peft" as of today; "lora", as the scripts for Stable Diffusion and SDXL write (`lora.down.weight`);
            "processor", as in 2023 (`processor.to_q_lora.down.weight`), for attention alone.
        metadata: Note rank and alpha in the header. Without it alpha is lost, and readers take it for the rank.
        text_encoders: With an adapter for each text encoder too.
        targets: Suffixes of the modules of the UNet or transformer.
        rank: Of all modules.
        alpha: Of all modules.
        seed: Of the values.
        config: More fields of LoraConfig, such as `use_dora=True`.
    """
    backbone = "unet" if hasattr(pipeline, "unet") else "transformer"
    parts = {backbone: targets}
    if text_encoders:
        clip = [name for name in ("text_encoder", "text_encoder_2") if _is_clip(getattr(pipeline, name, None))]
        parts |= dict.fromkeys(clip, _TEXT_ATTENTION)
    with installed_peft():
        for name, modules in parts.items():
            fields = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, **config)
            getattr(pipeline, name).add_adapter(fields)
    random = torch.Generator().manual_seed(seed)
    layers, models = {}, {name: getattr(pipeline, name) for name in parts}
    for name, model in models.items():
        tensors = get_peft_model_state_dict(model)
        with torch.no_grad():
            for key, tensor in tensors.items():
                if "magnitude" in key:
                    tensor.mul_(1 + 0.1 * torch.randn(tensor.shape, generator=random))
                else:
                    tensor.copy_(0.2 * torch.randn(tensor.shape, generator=random))
        layers[f"{name}_lora_layers"] = _renamed(dict(tensors), names, text=name != backbone)
    type(pipeline).save_lora_weights(folder, **layers, **(_collate_lora_metadata(models) if metadata else {}))
    return folder / WEIGHTS_NAME


def lycoris_file(
    path: Path,
    model: nn.Module,
    *,
    algo: str = "lora",
    prefix: str = "lycoris",
    rank: int = 4,
    alpha: float = 2,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Write an adapter of LyCORIS for the attention and the convolutions of a UNet, and return the file.

    Args:
        path: The file to write.
        model: The UNet; it has the adapter afterwards.
        algo: "lora" (LoCon), "loha", "lokr", "full", "glora", "diag-oft", "boft".
        prefix: "lycoris", or "lora_unet" as sd-scripts with `network_module=lycoris.kohya` writes.
        rank: Of all modules.
        alpha: Of all modules.
        dtype: Of the file.
        seed: Of the values.
        options: Those of `create_lycoris`, such as `use_tucker=True`, `dora_wd=True`, `factor=4`, `full_matrix=True`.
    """
    presets = {
        "enable_conv": True,
        "target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
        "lora_prefix": prefix,
    }
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    saved = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    LycorisNetwork.apply_preset(presets)
    try:
        network = create_lycoris(model, 1.0, rank, alpha, algo=algo, **options)
    finally:
        for name, value in saved.items():
            setattr(LycorisNetwork, name, value)
    network.apply_to()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=random)
            tensor.add_(0.1 * tensor.abs().mean() * noise if "dora_scale" in name else 0.2 * noise)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"ss_network_module": "lycoris.kohya", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    network.save_weights(str(path), dtype, header if prefix == "lora_unet" else None)
    return path


def kohya_file(name: str) -> Path:
    """Return a file that sd-scripts wrote: "sd15", "sd15-locon", "sdxl" or "flux"; see `image_fixtures`."""
    return FIXTURES / f"{name}.safetensors"


def xlabs_file(path: Path, *, rank: int = 4, seed: int = 0) -> Path:
    """Write a LoRA for Flux as XLabs' trainer does: fused q, k, v; no alpha."""
    shapes = {}
    for stream in (1, 2):
        shapes[f"double_blocks.0.processor.qkv_lora{stream}"] = (3 * _FLUX, _FLUX)
        shapes[f"double_blocks.0.processor.proj_lora{stream}"] = (_FLUX, _FLUX)
    for block in range(FLUX_TRANSFORMER["num_single_layers"]):
        shapes[f"single_blocks.{block}.processor.qkv_lora"] = (3 * _FLUX, _FLUX)
        shapes[f"single_blocks.{block}.processor.proj_lora"] = (_FLUX, 5 * _FLUX)
    return _write(path, _factors(shapes, rank, seed, "down", "up"))


def ai_toolkit_file(path: Path, pipeline: Any, *, rank: int = 4, seed: int = 0) -> Path:
    """Write a LoRA for Flux as ai-toolkit does: names of diffusers and PEFT, scale 1, its own header."""
    shapes = {}
    for name, module in pipeline.transformer.named_modules():
        if isinstance(module, nn.Linear) and re.match(r"(single_)?transformer_blocks\.", name) and "norm" not in name:
            shapes[f"transformer.{name}"] = (module.out_features, module.in_features)
    header = {
        "format": "pt",
        "name": "pears",
        "version": "1.0",
        "ss_base_model_version": "flux.1",
        "ss_output_name": "pears",
        "training_info": json.dumps({"step": 2000, "epoch": 25}, indent=4),
        "software": json.dumps(
            {"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit", "version": "0.1.0"}
        ),
    }
    return _write(path, _factors(shapes, rank, seed, "lora_A", "lora_B"), header)


def wan_file(path: Path, *, rank: int = 4, alpha: float | None = None, seed: int = 0) -> Path:
    """Write a LoRA for Wan with the model's own names after `diffusion_model.`, as ai-toolkit and ComfyUI do.

    With `alpha`, the factors are called `lora_down` and `lora_up` and each module has it.
    """
    shapes = {}
    inner = WAN_TRANSFORMER["ffn_dim"]
    for block in range(WAN_TRANSFORMER["num_layers"]):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes[f"diffusion_model.blocks.{block}.{attention}.{part}"] = (_WAN, _WAN)
        shapes[f"diffusion_model.blocks.{block}.ffn.0"] = (inner, _WAN)
        shapes[f"diffusion_model.blocks.{block}.ffn.2"] = (_WAN, inner)
    kinds = ("lora_A", "lora_B") if alpha is None else ("lora_down", "lora_up")
    return _write(path, _factors(shapes, rank, seed, *kinds, alpha=alpha))


def comfyui_file(path: Path, *, rank: int = 4, alpha: float | None = 2, seed: int = 0) -> Path:
    """Write a LoRA for Flux with Black Forest Labs' names after `diffusion_model.`, and one for CLIP, as ComfyUI does.

    Without `alpha`, the factors are called `lora_A` and `lora_B`. The first layer of single blocks is left out:
    diffusers knows it only at its real width.
    """
    double, clip = "diffusion_model.double_blocks.0", "text_encoders.clip_l.transformer.text_model.encoder.layers.0"
    shapes = {f"{clip}.self_attn.{part}": (_FLUX, _FLUX) for part in _TEXT_ATTENTION}
    for stream in ("img", "txt"):
        shapes[f"{double}.{stream}_attn.qkv"] = (3 * _FLUX, _FLUX)
        shapes[f"{double}.{stream}_attn.proj"] = (_FLUX, _FLUX)
        shapes[f"{double}.{stream}_mlp.0"] = (4 * _FLUX, _FLUX)
        shapes[f"{double}.{stream}_mlp.2"] = (_FLUX, 4 * _FLUX)
    for block in range(FLUX_TRANSFORMER["num_single_layers"]):
        shapes[f"diffusion_model.single_blocks.{block}.linear2"] = (_FLUX, 5 * _FLUX)
    kinds = ("lora_A", "lora_B") if alpha is None else ("lora_down", "lora_up")
    return _write(path, _factors(shapes, rank, seed, *kinds, alpha=alpha))


def _is_clip(model: object) -> bool:
    return type(model).__name__.startswith("CLIP")


def _renamed(tensors: dict[str, Tensor], names: Names, *, text: bool) -> dict[str, Tensor]:
    """Rename PEFT's tensors of one component as an older generation of diffusers did."""
    if names == "peft":
        return tensors
    if text:
        # transformers had this prefix in every text encoder until version 5.
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    if names == "lora":
        renamed: dict[str, Tensor] = convert_state_dict_to_diffusers(tensors)
        return renamed
    if text:
        pattern, put = r"\.(q|k|v|out)_proj\.lora_([AB])", r".to_\1_lora.\2"
    else:
        pattern, put = r"\.to_(q|k|v|out)(?:\.0)?\.lora_([AB])", r".processor.to_\1_lora.\2"
    old = {re.sub(pattern, put, name): tensor for name, tensor in tensors.items()}
    return {name.replace("_lora.A", "_lora.down").replace("_lora.B", "_lora.up"): old[name] for name in old}


def _factors(
    shapes: dict[str, tuple[int, int]], rank: int, seed: int, down: str, up: str, alpha: float | None = None
) -> dict[str, Tensor]:
    """Return random factors of modules with weights of shape (out, in)."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (outputs, inputs) in shapes.items():
        tensors[f"{module}.{down}.weight"] = 0.2 * torch.randn(rank, inputs, generator=random)
        tensors[f"{module}.{up}.weight"] = 0.2 * torch.randn(outputs, rank, generator=random)
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, path, metadata=header)
    return path
