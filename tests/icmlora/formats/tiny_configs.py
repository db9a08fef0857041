"""The shapes of the tiny pipelines, without imports: the trainer that wrote the fixtures needs them too."""

from __future__ import annotations

from typing import Any

TEXT = 32
"""Width of the text encoders."""
Config = dict[str, Any]
SD15_UNET: Config = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 16,
}
"""Two of the four levels: attention in `down_blocks.0`, none in the lowest, as in the real one."""
SDXL_UNET: Config = {
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 2,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2 * TEXT,
    "attention_head_dim": (1, 1, 2),
    "transformer_layers_per_block": 1,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT + 6 * 8,
}
"""All three levels; a transformer has one block where the real ones have 2 and 10."""
FLUX_TRANSFORMER: Config = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
WAN_TRANSFORMER: Config = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
CLIP: Config = {
    "hidden_size": TEXT,
    "intermediate_size": 2 * TEXT,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "projection_dim": TEXT,
    "vocab_size": 514,
    "max_position_embeddings": 77,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
T5: Config = {
    "d_model": TEXT,
    "d_ff": 2 * TEXT,
    "d_kv": 8,
    "num_layers": 1,
    "num_heads": 4,
    "vocab_size": 200,
    "feed_forward_proj": "gated-gelu",
}
