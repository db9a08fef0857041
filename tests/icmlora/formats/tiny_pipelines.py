"""Pipelines of diffusers with tiny random weights: Stable Diffusion 1.5, SDXL, Flux and Wan in miniature.

Every one has the blocks of the real model under their real names, so that adapters for it carry the names of real
ones. An image of two steps takes a fraction of a second on one core. Nothing is read from disk or network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT = 32
"""Width of the text encoders."""
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPT = "a red pear on a table"


def tiny_sd15() -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5 with two of its four levels: attention in `down_blocks.0`, none in the lowest."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(_clip_config(1)).eval()
    return StableDiffusionPipeline(
        unet=unet,
        vae=_vae(latent_channels=4, levels=2),
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """Return SDXL with all three of its levels; a transformer has one block where the real ones have 2 and 10."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * TEXT,
        attention_head_dim=(1, 1, 2),
        transformer_layers_per_block=1,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(latent_channels=4, levels=2),
        text_encoder=CLIPTextModel(_clip_config(1)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(1)).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    )


def tiny_flux() -> FluxPipeline:
    """Return Flux with one double block and two single ones."""
    torch.manual_seed(2)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    t5 = T5Config(
        d_model=TEXT, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=200, feed_forward_proj="gated-gelu"
    )
    return FluxPipeline(
        transformer=transformer,
        vae=_vae(latent_channels=4, levels=1),
        text_encoder=CLIPTextModel(_clip_config(1)).eval(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def tiny_wan_transformer() -> WanTransformer3DModel:
    """Return the transformer of Wan 2.1 with two blocks."""
    torch.manual_seed(3)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


@torch.no_grad()
def image(pipeline: Any) -> NDArray[np.float32]:
    """Return the image of a fixed prompt and seed, shape (side, side, 3), values in 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    side = 32 if isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline) else 16
    options = {"max_sequence_length": 32} if isinstance(pipeline, FluxPipeline) else {}
    done = pipeline(
        PROMPT,
        num_inference_steps=2,
        height=side,
        width=side,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    found: NDArray[np.float32] = done.images[0]
    return found


def clip_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer with single bytes for a vocabulary."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _clip_config(layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=TEXT,
        vocab_size=514,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _t5_tokenizer() -> T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    return T5Tokenizer(vocab=[(word, 0.0 if number < 3 else -2.0) for number, word in enumerate(words)], extra_ids=0)


def _vae(*, latent_channels: int, levels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16)[:levels],
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent_channels,
        norm_num_groups=4,
        shift_factor=0.0,
        layers_per_block=1,
        sample_size=32,
    ).eval()
