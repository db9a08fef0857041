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

from tests.icmlora.formats.tiny_configs import CLIP, FLUX_TRANSFORMER, SD15_UNET, SDXL_UNET, T5, WAN_TRANSFORMER

PROMPT = "a red pear on a table"


def tiny_sd15() -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5 with two of its four levels."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**SD15_UNET),
        vae=_vae(levels=2),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)).eval(),
        tokenizer=clip_tokenizer(),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """Return SDXL with one block in each of its transformers."""
    torch.manual_seed(1)
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**SDXL_UNET),
        vae=_vae(levels=2),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=_ddim(),
    )


def tiny_flux() -> FluxPipeline:
    """Return Flux with one double block and two single ones."""
    torch.manual_seed(2)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**FLUX_TRANSFORMER),
        vae=_vae(levels=1),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)).eval(),
        text_encoder_2=T5EncoderModel(T5Config(**T5)).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def tiny_wan_transformer() -> WanTransformer3DModel:
    """Return the transformer of Wan 2.1 with two blocks."""
    torch.manual_seed(3)
    return WanTransformer3DModel(**WAN_TRANSFORMER)


@torch.no_grad()
def image(pipeline: Any) -> NDArray[np.float32]:
    """Return the image of a fixed prompt and seed, shape (side, side, 3), values in 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    flux = isinstance(pipeline, FluxPipeline)
    side = 16 if flux else 32
    done = pipeline(
        PROMPT,
        num_inference_steps=2,
        height=side,
        width=side,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **({"max_sequence_length": 32} if flux else {}),
    )
    found: NDArray[np.float32] = done.images[0]
    return found


def clip_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer with single bytes for a vocabulary."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    return T5Tokenizer(vocab=[(word, 0.0 if number < 3 else -2.0) for number, word in enumerate(words)], extra_ids=0)


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def _vae(*, levels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16)[:levels],
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.0,
        layers_per_block=1,
        sample_size=32,
    ).eval()
