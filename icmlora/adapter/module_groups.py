"""Group modules to show which parts of a model an adapter changes.

Modules of image models are grouped by block, modules of other models by kind:

    lora_te1_text_model_encoder_layers.0.mlp_fc1                             text_encoder
    unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k          attention
    lora_unet_input_blocks.4.1.transformer_blocks.0.ff_net.0.proj            feed_forward
    unet.down_blocks.0.resnets.0.conv1                                       convolution

    model.layers.3.self_attn.q_proj                                          q_proj
    model.layers.3.mlp.experts.7.up_proj                                     up_proj

Image model names may come from diffusers, the original models, or kohya's flattened forms of both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# Words between dots or underscores; the first matching block wins.
_WORDS = {
    "text_encoder": r"te\d?|text_encoder(_\d)?|text_encoders|text_model|clip_[a-z]|t5xxl|llm_adapter",
    "convolution": r"resnets?|conv\d?|conv_\w+|in_layers|out_layers|downsamplers?|upsamplers?|skip_connection|op",
    "feed_forward": r"ff|ff_net|ff_context|ffn|mlp|img_mlp|txt_mlp|feed_forward|proj_mlp|linear[12]",
    "attention": r"\w*attn\w*|attentions?|\w*qkv\w*|\w*transformer_blocks|to_[qkv]|proj_in|proj_out",
}
_BLOCKS = {block: re.compile(rf"(^|[._])({words})([._]|$)") for block, words in _WORDS.items()}
OTHER = "other"


def block_of(module: str) -> str:
    """Return the block of a module: "text_encoder", "convolution", "feed_forward", "attention" or "other"."""
    return next((name for name, pattern in _BLOCKS.items() if pattern.search(module)), OTHER)


def blocks_of(modules: Iterable[str]) -> tuple[str, ...]:
    """Return the blocks of some modules, each once."""
    return tuple(sorted({block_of(module) for module in modules}))


def kind_of_module(module: str) -> str:
    """Return the last non-numeric part of a name: experts and list members count together."""
    words = [word for word in module.split(".") if not word.isdigit()]
    return words[-1] if words else module


def grouping(*, is_for_images: bool) -> Callable[[str], str]:
    """Return the function that names the group of a module."""
    return block_of if is_for_images else kind_of_module
