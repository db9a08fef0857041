"""The modules of SDXL that kohya's sd-scripts trains, under its names: from diffusers' UNet, which holds no weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn

CONFIG: dict[str, object] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""Of stabilityai/stable-diffusion-xl-base-1.0."""
_TEXT_ENCODERS = {"lora_te1": (12, 768, 3072), "lora_te2": (32, 1280, 5120)}
"""CLIP ViT-L and OpenCLIP ViT-bigG: layers, width, width of the MLP."""
_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True)
class Module:
    """One module: its name in a file, and its weight's shape."""

    name: str
    outputs: int
    inputs: int
    kernel: int | None = None
    """Side of a convolution's kernel; None for a linear layer."""

    @property
    def width(self) -> int:
        """Return the length of a row of A."""
        return self.inputs * (self.kernel or 1) ** 2


def attention_modules() -> list[Module]:
    """Return the 722 linear layers of the UNet's transformers, which every LoRA for SDXL trains."""
    return [_module(_kohya(name), layer) for name, layer in _layers() if ".attentions." in name]


def convolution_modules() -> list[Module]:
    """Return the layers that `conv_dim` adds: those of the residual blocks and of the changes of resolution."""
    return [_module(_kohya(name), layer) for name, layer in _layers() if re.search(r"\.(resnets|\w+samplers)\.", name)]


def text_modules() -> list[Module]:
    """Return the 72 and 192 linear layers of the two text encoders."""
    found = []
    for prefix, (layers, width, inner) in _TEXT_ENCODERS.items():
        for layer in range(layers):
            start = f"{prefix}_text_model_encoder_layers_{layer}"
            found += [Module(f"{start}_self_attn_{part}", width, width) for part in _ATTENTION]
            found += [Module(f"{start}_mlp_fc1", inner, width), Module(f"{start}_mlp_fc2", width, inner)]
    return found


_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")


def _layers() -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIG)
    return [(name, module) for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _module(name: str, layer: nn.Linear | nn.Conv2d) -> Module:
    if isinstance(layer, nn.Conv2d):
        return Module(name, layer.out_channels, layer.in_channels, layer.kernel_size[0])
    return Module(name, layer.out_features, layer.in_features)


def _kohya(name: str) -> str:
    """Translate "down_blocks.1.attentions.0.proj_in" into "lora_unet_input_blocks_4_1_proj_in"."""
    block = re.match(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(\w+?)\.(\d)\.(.*)", name)
    assert block is not None
    side, level, kind, number, rest = block.groups()
    place = 3 * int(level or 0) + int(number)
    attention = int(kind == "attentions")
    if kind == "resnets":
        rest = _RESNET[rest]
    if kind == "downsamplers":
        start, rest = f"input_blocks_{3 * int(level) + 3}_0", "op"
    elif kind == "upsamplers":
        start = f"output_blocks_{3 * int(level) + 2}_{2 if int(level) < 2 else 1}"
    elif side == "down":
        start = f"input_blocks_{place + 1}_{attention}"
    elif side == "up":
        start = f"output_blocks_{place}_{attention}"
    else:
        start = f"middle_block_{1 if attention else 2 * int(number)}"
    return f"lora_unet_{start}_{rest}".replace(".", "_")
