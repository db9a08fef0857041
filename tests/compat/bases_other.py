"""The base models that see or hear: vision, speech, vision with language, detection, and layers of one's own."""

from __future__ import annotations

from typing import Any

from tests.compat.bases import (
    GROUPED,
    LAYER_STACK,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Base,
    Inputs,
    Maker,
    built,
    made,
    pictures,
    tokens,
    translated,
)

_PATCHES = LAYER_STACK | {"image_size": 32, "patch_size": 8}
_HALF_SPEAKER = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_IMAGE_TOKEN = VOCABULARY - 1


def _whisper() -> Base:
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **_HALF_SPEAKER,
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        max_source_positions=30,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    heard = {"input_features": torch.randn(2, 16, 60), "decoder_input_ids": translated()["decoder_input_ids"]}
    return WhisperForConditionalGeneration(config), heard


def _wav2vec2() -> Base:
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **LAYER_STACK,
        vocab_size=VOCABULARY,
        conv_dim=[16, 16],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    return Wav2Vec2ForCTC(config), {"input_values": torch.randn(1, 800)}


def _clip() -> Base:
    from transformers import CLIPConfig, CLIPModel

    text = LAYER_STACK | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "projection_dim": 16}
    config = CLIPConfig(text_config=text, vision_config=_PATCHES | {"projection_dim": 16}, projection_dim=16)
    return CLIPModel(config), tokens() | pictures()


def _owl() -> Base:
    import torch
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    text = LAYER_STACK | {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
    config = OwlViTConfig(text_config=text, vision_config=_PATCHES, projection_dim=WIDTH)
    asked = {"input_ids": torch.tensor([[5, 6, 7, 2]] * 2), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    return OwlViTForObjectDetection(config), asked | pictures()


def _smolvlm() -> Base:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    text = LlamaConfig(**GROUPED, pad_token_id=0)
    config = SmolVLMConfig(vision_config=_PATCHES, text_config=text, image_token_id=_IMAGE_TOKEN, scale_factor=2)
    return SmolVLMForConditionalGeneration(config), tokens()


def _idefics3() -> Base:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    text = LlamaConfig(**GROUPED, pad_token_id=0)
    config = Idefics3Config(vision_config=_PATCHES, text_config=text, image_token_id=_IMAGE_TOKEN, scale_factor=2)
    return Idefics3ForConditionalGeneration(config), tokens()


def _llava() -> Base:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**GROUPED, pad_token_id=0)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**_PATCHES), text_config=text, image_token_index=_IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config), tokens()


def _qwen2_vl() -> Base:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=GROUPED | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=_IMAGE_TOKEN,
        video_token_id=_IMAGE_TOKEN - 1,
    )
    return Qwen2VLForConditionalGeneration(config), tokens()


def _qwen2_5_vl() -> Base:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    sizes = {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 64}
    config = Qwen2_5_VLConfig(
        text_config=GROUPED | {"rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 4, "patch_size": 8} | sizes,
        image_token_id=_IMAGE_TOKEN,
        video_token_id=_IMAGE_TOKEN - 1,
    )
    return Qwen2_5_VLForConditionalGeneration(config), tokens()


def _gemma3_vision() -> Base:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config=GROUPED | {"head_dim": 8},
        vision_config=_PATCHES,
        mm_tokens_per_image=4,
        image_token_index=_IMAGE_TOKEN,
        boi_token_index=_IMAGE_TOKEN - 1,
        eoi_token_index=_IMAGE_TOKEN - 2,
    )
    return Gemma3ForConditionalGeneration(config), tokens()


def _paligemma() -> Base:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config=GROUPED | {"head_dim": 8, "model_type": "gemma"},
        vision_config=_PATCHES | {"projection_dim": WIDTH, "model_type": "siglip_vision_model"},
        image_token_index=_IMAGE_TOKEN,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return PaliGemmaForConditionalGeneration(config), tokens()


def _florence2() -> Base:
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    vision = {
        "embed_dim": [16, 16, WIDTH, WIDTH],
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "projection_dim": WIDTH,
        "window_size": 4,
    }
    text = _HALF_SPEAKER | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "model_type": "bart"}
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=_IMAGE_TOKEN)
    return Florence2ForConditionalGeneration(config), translated()


def _detr() -> Base:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"])
    config = DetrConfig(
        **_HALF_SPEAKER,
        num_queries=5,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_labels=3,
    )
    return DetrForObjectDetection(config), pictures(64)


def _rt_detr() -> Base:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        d_model=WIDTH,
        encoder_hidden_dim=WIDTH,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        encoder_layers=1,
        decoder_layers=LAYERS,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        decoder_in_channels=[WIDTH] * 3,
        num_queries=6,
        num_denoising=0,
        num_labels=3,
    )
    return RTDetrForObjectDetection(config), pictures(64)


def _small_unet() -> Base:
    """Make convolutions of every kind that LoRA knows, with attention between them, as a UNet has."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
            self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.to_out = nn.ModuleList([nn.Linear(8, 8)])
            self.shortcut = nn.Conv2d(8, 8, 1)
            self.line = nn.Conv1d(8, 8, 3, padding=1)
            self.volume = nn.Conv3d(1, 2, 3, padding=1)
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)

        def forward(self, pixel_values: Any) -> dict[str, Any]:
            seen = self.conv_in(pixel_values)
            rows = seen.flatten(2).transpose(1, 2)
            weights = torch.softmax(self.to_q(rows) @ self.to_k(rows).transpose(1, 2), -1)
            mixed = self.to_out[0](weights @ self.to_v(rows)).transpose(1, 2)
            image = self.grouped(self.shortcut(self.line(mixed).unflatten(2, seen.shape[2:])))
            return {"sample": self.volume(image[:, None])}

    return Block(), pictures(8)


def _attention() -> Base:
    """Make torch's own attention, whose three projections are one matrix."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

        def forward(self, rows: Any) -> dict[str, Any]:
            return {"sample": self.attention(rows, rows, rows, need_weights=False)[0]}

    return Encoder(), {"rows": torch.randn(2, 5, WIDTH)}


_CLASSIFIER = "AutoModelForImageClassification"
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": 4,
}
_SEGFORMER = {
    "hidden_sizes": [16, 16, WIDTH, WIDTH],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 4,
}
_YOLOS = LAYER_STACK | {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5, "num_labels": 3}


def _large_pictures() -> Inputs:
    return pictures(64)


MAKERS: dict[str, Maker] = {
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "vit": made(_CLASSIFIER, "ViTConfig", _PATCHES | {"num_labels": 5}, pictures),
    "dinov2": made("AutoModel", "Dinov2Config", _PATCHES, pictures),
    "swin": made(_CLASSIFIER, "SwinConfig", _SWIN, pictures),
    "segformer": made("AutoModelForSemanticSegmentation", "SegformerConfig", _SEGFORMER, _large_pictures),
    "resnet": made(
        _CLASSIFIER,
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3},
        pictures,
    ),
    "clip": _clip,
    "owl-vit": _owl,
    "yolos": built("YolosForObjectDetection", "YolosConfig", _YOLOS, pictures),
    "detr": _detr,
    "rt-detr": _rt_detr,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "llava": _llava,
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
    "gemma3-vision": _gemma3_vision,
    "paligemma": _paligemma,
    "florence2": _florence2,
    "small-unet": _small_unet,
    "attention": _attention,
}
