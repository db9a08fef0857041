"""More tiny random base models that see or hear: they differ in how processor and network take a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

from tests.icmlora.base_models.tiny_kinds import (
    RATE,
    SPECIAL,
    VOCABULARY,
    Kind,
    captions,
    image_file,
    labelled_images,
    save,
    scenes,
    sound_file,
    tokenizer,
    utterances,
)

_IMAGE = SPECIAL.index("<image>")
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT = _LAYERS | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _TEXT | {"num_key_value_heads": 2}
_PATCHES = _LAYERS | {"image_size": 32, "patch_size": 8}
_DECODER = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
_CLASSES = {0: "red", 1: "green", 2: "blue"}
_SQUARE = {"height": 32, "width": 32}


def _seeded(make: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return make(config)


def write_git(folder: Path) -> Path:
    config = t.GitConfig(**_TEXT, vision_config=_PATCHES, max_position_embeddings=128)
    texts = tokenizer(sep_token="</s>", cls_token="<s>")
    processor = t.GitProcessor(t.CLIPImageProcessor(size=_SQUARE, do_center_crop=False), texts)
    return save(folder, _seeded(t.GitForCausalLM, config), processor)


def write_got(folder: Path) -> Path:
    texts = tokenizer()
    texts.add_special_tokens({"additional_special_tokens": ["<imgpad>"]})
    vision: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "mlp_dim": 8,
        "output_channels": 8,
        "initializer_range": 0.1,
    }
    sizes = {"image_size": 64, "patch_size": 1, "window_size": 8, "global_attn_indexes": []}
    config = t.GotOcr2Config(
        vision_config=vision | sizes,
        text_config=_LLAMA | {"vocab_size": VOCABULARY + 1, "max_position_embeddings": 512},
        image_token_index=VOCABULARY,
    )
    processor = t.GotOcr2Processor(t.GotOcr2ImageProcessor(size={"height": 64, "width": 64}), texts)
    return save(folder, _seeded(t.GotOcr2ForConditionalGeneration, config), processor)


def write_llava(folder: Path) -> Path:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**_PATCHES),
        text_config=t.LlamaConfig(**_LLAMA),
        image_token_index=_IMAGE,
        vision_feature_layer=-1,
    )
    images = t.CLIPImageProcessor(size=_SQUARE, do_center_crop=False)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = t.LlavaProcessor(images, tokenizer(extra_special_tokens={"image_token": "<image>"}), **options)
    return save(folder, _seeded(t.LlavaForConditionalGeneration, config), processor)


def _seeing_llama(kind: Any, make: Any, processor: Any) -> Callable[[Path], Path]:
    """Idefics 3 and SmolVLM: a Llama that reads the pieces of an image where `<image>` stands."""

    def write(folder: Path) -> Path:
        texts = tokenizer()
        texts.add_special_tokens({"additional_special_tokens": ["<image>", "<fake_token_around_image>"]})
        vocabulary = len(texts)
        config = kind(
            vision_config=_PATCHES,
            text_config=t.LlamaConfig(**_LLAMA | {"vocab_size": vocabulary}),
            image_token_id=_IMAGE,
            scale_factor=2,
        )
        return save(folder, _seeded(make, config), processor(texts))

    return write


def _idefics(texts: Any) -> Any:
    images = t.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    return t.Idefics3Processor(images, texts, image_seq_len=4)


def _smolvlm(texts: Any) -> Any:
    images = t.SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    return t.SmolVLMProcessor(images, texts, t.SmolVLMVideoProcessor(), image_seq_len=4)


def _qwen(kind: Any, make: Any, vision: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        texts = tokenizer()
        texts.add_special_tokens({"additional_special_tokens": list(names)})
        image, video, start, end = texts.convert_tokens_to_ids(list(names))
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        config = kind(
            text_config=_LLAMA | {"vocab_size": len(texts), "rope_parameters": rope},
            vision_config={"depth": 1, "num_heads": 2, "patch_size": 8} | vision,
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
        sizes = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
        images = t.Qwen2VLImageProcessor(patch_size=8, size=sizes)
        processor = t.Qwen2VLProcessor if kind is t.Qwen2VLConfig else t.Qwen2_5_VLProcessor
        chat = "<|vision_start|><|image_pad|><|vision_end|>{{ messages[0]['content'][1]['text'] }}"
        made = processor(images, texts, t.Qwen2VLVideoProcessor(patch_size=8), chat_template=chat)
        return save(folder, _seeded(make, config), made)

    return write


def write_paligemma(folder: Path) -> Path:
    texts = tokenizer(extra_special_tokens={"image_token": "<image>"})
    images = t.SiglipImageProcessor(size=_SQUARE)
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, texts)
    config = t.PaliGemmaConfig(
        text_config=_LLAMA | {"vocab_size": len(texts), "head_dim": 16, "model_type": "gemma"},
        vision_config=_PATCHES | {"projection_dim": 32, "model_type": "siglip_vision_model"},
        image_token_index=_IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return save(folder, _seeded(t.PaliGemmaForConditionalGeneration, config), processor)


def _with_decoder(encoder: Any) -> Any:
    decoder = t.TrOCRConfig(**_DECODER, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return _seeded(t.VisionEncoderDecoderModel, config)


def write_trocr(folder: Path) -> Path:
    model = _with_decoder(t.ViTConfig(**_PATCHES))
    return save(folder, model, t.TrOCRProcessor(t.ViTImageProcessor(size=_SQUARE), tokenizer()))


def write_donut(folder: Path) -> Path:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    images = t.DonutImageProcessor(size=_SQUARE, do_align_long_axis=False)
    model = _with_decoder(t.DonutSwinConfig(**sizes, window_size=2))
    return save(folder, model, t.DonutProcessor(images, tokenizer()))


def write_moonshine(folder: Path) -> Path:
    sizes = {f"{half}_num_{what}": n for half in ("encoder", "decoder") for what, n in _OF_HALF.items()}
    config = t.MoonshineConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, **sizes, decoder_start_token_id=1, pad_token_id=0
    )
    processor = t.Wav2Vec2Processor(t.Wav2Vec2FeatureExtractor(sampling_rate=RATE), tokenizer())
    return save(folder, _seeded(t.MoonshineForConditionalGeneration, config), processor)


_OF_HALF = {"hidden_layers": 1, "attention_heads": 2, "key_value_heads": 2}


def write_wav2vec2(folder: Path) -> Path:
    """Save wav2vec 2 with a decoder: alone it writes down letters (CTC), which icm does not run."""
    convolutions = {"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [10, 8], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    encoder = t.Wav2Vec2Config(**_LAYERS, **convolutions, **positions, vocab_size=VOCABULARY)
    decoder = t.TrOCRConfig(**_DECODER, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0)
    config = t.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    processor = t.Wav2Vec2Processor(t.Wav2Vec2FeatureExtractor(sampling_rate=RATE), tokenizer())
    return save(folder, _seeded(t.SpeechEncoderDecoderModel, config), processor)


def write_detr(folder: Path) -> Path:
    backbone = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    halves = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in _OF_DETR.items()}
    config = t.DetrConfig(
        d_model=32, **halves, backbone_config=backbone, use_timm_backbone=False, num_queries=6, id2label=_CLASSES
    )
    processor = t.DetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False)
    return save(folder, _seeded(t.DetrForObjectDetection, config), processor)


_OF_DETR = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def _classifier(make: Any, config: Any) -> Any:
    def write(folder: Path) -> Path:
        model = _seeded(make, config())
        _scale(model)
        _open_norms(model)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.div_(4)  # `save` multiplies
        return save(folder, model, t.ViTImageProcessor(size=_SQUARE))

    return write


def _scale(model: Any) -> None:
    """Draw larger weights: as they begin, a dozen layers leave nothing of the image."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter.data)


def _open_norms(model: Any) -> None:
    """Let batch norms pass an image on: EfficientNet draws their weights near nothing, and has three in each block.

    As drawn, a block keeps one part in a hundred thousand, and the last layer differs by 1e-41 from image to image.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)


def _small(config: Any, **sizes: Any) -> Any:
    return lambda: config(**sizes, id2label=_CLASSES)


CLASSIFIERS = {
    "regnet": (
        t.RegNetForImageClassification,
        _small(t.RegNetConfig, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
    ),
    "segformer": (
        t.SegformerForImageClassification,
        _small(
            t.SegformerConfig,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[1, 1],
        ),
    ),
    "pvt-v2": (
        t.PvtV2ForImageClassification,
        _small(
            t.PvtV2Config,
            image_size=32,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            mlp_ratios=[1, 1, 1, 1],
        ),
    ),
    "resnet": (
        t.ResNetForImageClassification,
        _small(t.ResNetConfig, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    ),
    "dinov2": (t.Dinov2ForImageClassification, _small(t.Dinov2Config, **_PATCHES)),
    "swin": (
        t.SwinForImageClassification,
        _small(t.SwinConfig, image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=2),
    ),
    "efficientnet": (
        t.EfficientNetForImageClassification,
        _small(t.EfficientNetConfig, image_size=32, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320),
    ),
    "clip": (
        t.CLIPForImageClassification,
        _small(t.CLIPConfig, vision_config=_PATCHES, text_config=_TEXT),
    ),
    "mobilenet-v2": (t.MobileNetV2ForImageClassification, _small(t.MobileNetV2Config, depth_multiplier=0.25)),
}
MODULES = {
    "regnet": ("regnet.encoder.stages.1.layers.0.layer.1.convolution",),
    "segformer": ("segformer.stages.0.blocks.0.attention.q_proj",),
    "pvt-v2": ("pvt_v2.encoder.layers.0.blocks.0.mlp.dense1",),
}
SEEING = {
    "git": write_git,
    "got": write_got,
    "llava": write_llava,
    "trocr": write_trocr,
    "donut": write_donut,
    "idefics3": _seeing_llama(t.Idefics3Config, t.Idefics3ForConditionalGeneration, _idefics),
    "smolvlm": _seeing_llama(t.SmolVLMConfig, t.SmolVLMForConditionalGeneration, _smolvlm),
    "qwen2-vl": _qwen(
        t.Qwen2VLConfig, t.Qwen2VLForConditionalGeneration, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    ),
    "qwen2.5-vl": _qwen(
        t.Qwen2_5_VLConfig,
        t.Qwen2_5_VLForConditionalGeneration,
        {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32},
    ),
    "paligemma": write_paligemma,
}
WITH_VIDEO = frozenset({"smolvlm", "qwen2-vl", "qwen2.5-vl"})
"""Those whose processor reads videos too, with libraries that the extra `video` brings."""
MEDIA_KINDS = {
    **{name: Kind(name, write, captions, (), image_file) for name, write in SEEING.items()},
    "moonshine": Kind("moonshine", write_moonshine, utterances, (), sound_file),
    "wav2vec2": Kind("wav2vec2", write_wav2vec2, utterances, (), sound_file),
    "detr": Kind("detr", write_detr, scenes, (), image_file),
    **{
        name: Kind(name, _classifier(*made), labelled_images, MODULES.get(name, ()), image_file)
        for name, made in CLASSIFIERS.items()
    },
}
"""By name; those with modules are also tried with an adapter."""
