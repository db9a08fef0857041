"""Files with dotted module names other than diffusers': ComfyUI, ai-toolkit, OneTrainer, fal, DiffSynth.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight      text_encoders.clip_l.transformer....lora_down.weight
    transformer.transformer_blocks.0.attn.to_q.lora_down.weight, with alpha          OneTrainer
    base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight                      fal's Kontext; the scale is 1
    double_blocks.0.img_attn.qkv.lora_A.weight                                       Black Forest Labs' control
    transformer_blocks.0.attn.to_q.lora_A.default.weight                             DiffSynth

Without an image model's prefix, only blocks that no language model has are accepted.

Source: Comfy-Org/ComfyUI, comfy/lora.py; ostris/ai-toolkit; Nerogar/OneTrainer; huggingface/diffusers,
loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re

from icmlora.formats.images.single_file import SingleFileFormat
from icmlora.formats.images.single_file_names import Naming, Style

_BLOCKS = (
    r"double_blocks|single_blocks|transformer_blocks|single_transformer_blocks|joint_transformer_blocks|joint_blocks"
    r"|double_stream_blocks|single_stream_blocks|visual_transformer_blocks|text_transformer_blocks|noise_refiner"
    r"|context_refiner|blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]|blocks\.\d+\.ffn\.\d"
    r"|blocks\.\d+\.(attn\.(qkv|out)_proj|adaln_proj)|token_refiner|layers\.\d+\.cross_attn\.[qkvo]_proj"
)
# Names that other models have too: accepted together with the names above, but not as a mark of such a file.
_BESIDE = r"(base_model\.model\.)?(blocks\.\d+\.mlp\.fc[12]|layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj)"
_EMBEDDERS = r"img_in|txt_in|time_in|vector_in|guidance_in|final_layer"
_OWN = (
    r"(model\.)?(diffusion_model|text_encoders|clip_[a-z]|t5xxl|conditioner|pipe\.dit)\..+"
    rf"|(base_model\.model\.)?({_BLOCKS}|{_EMBEDDERS})(\..+)?"
)
_OF_DIFFUSERS = r"(unet|transformer|transformer_\d|text_encoder|text_encoder_\d)\..+"
# diffusers' module names with factor names that diffusers does not use are not a diffusers file.
_MARK = re.compile(
    rf"({_OWN})\.(lora_[AB](\.default)?|lora[._](down|up))\.weight"
    rf"|{_OF_DIFFUSERS}\.(lora_[AB]\.default|lora_(down|up))\.weight"
)
_NAMING = Naming(
    re.compile(f"{_OWN}|{_BESIDE}|{_OF_DIFFUSERS}"),
    (
        Style("{}.lora_A.weight", "{}.lora_B.weight"),
        Style("{}.lora_down.weight", "{}.lora_up.weight"),
        Style("{}.lora.down.weight", "{}.lora.up.weight"),
        Style("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    ),
    is_mark=lambda key: _MARK.fullmatch(key) is not None,
)
COMFYUI = SingleFileFormat(
    "comfyui", "one file with dotted names, as saved by ComfyUI, ai-toolkit and OneTrainer", _NAMING
)
