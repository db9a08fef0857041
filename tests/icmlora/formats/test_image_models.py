"""The base model of an image adapter: from its header, from the names of its blocks, or guessed from widths."""

from __future__ import annotations

import pytest

from icmlora.formats.images.families import ImageBase, base_of
from icmlora.formats.images.kohya import KOHYA
from tests.icmlora.formats.single_files import file_bytes, kohya, linear

ATTENTION = "lora_unet_mid_block_attentions.0.transformer_blocks.0.attn2_to_k"


@pytest.mark.parametrize(
    ("width", "label"),
    [(768, "stable-diffusion-v1"), (1024, "stable-diffusion-v2"), (2048, "stable-diffusion-xl-v1-base")],
)
def test_the_width_of_a_unets_cross_attention_is_a_guess(width: int, label: str) -> None:
    assert base_of({}, {ATTENTION: width}) == ImageBase(label, is_guess=True)


def test_a_second_text_encoder_beside_a_unet_is_of_sdxl_for_certain() -> None:
    widths = {ATTENTION: 2048, "lora_te2_text_model_encoder_layers.0.mlp_fc1": 1280}
    assert base_of({}, widths) == ImageBase("stable-diffusion-xl-v1-base")


@pytest.mark.parametrize(("stated", "label"), [("kolors", "kolors"), ("ltxv", "ltx-video"), ("my-model", "my-model")])
def test_the_header_counts_for_more_than_widths(stated: str, label: str) -> None:
    assert base_of({"ss_base_model_version": stated}, {ATTENTION: 2048}) == ImageBase(label)


@pytest.mark.parametrize(
    ("label", "spellings"),
    [
        ("stable-diffusion-v1", "sd_v1 sd_1.5 stable-diffusion-v1/lora"),
        ("stable-diffusion-v2", "sd_v2_v stable-diffusion-v2-768-v/lora"),
        ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0 sdxl_1.0 stable-diffusion-xl-v1-base/lora pony"),
        ("stable-diffusion-3-5-large", "sd3.5_large stable-diffusion-3-5-large/lora"),
        ("flux-1-dev", "flux1 flux.1 flux-1-dev/lora Flux.1-dev/lora flux.1_kontext flux-1-schnell/lora"),
        ("flux-2-klein-9b", "flux2_klein_9b flux-2-klein-base-9b"),
        ("chroma", "chroma Chroma1-HD flux.1-chroma"),
        ("hunyuan-video", "hunyuan-video/lora hunyuan_video"),
        ("qwen-image", "qwen_image Qwen-Image Qwen-Image-Edit/lora qwen_image_edit_plus"),
        ("z-image", "zimage Z-Image z_image_turbo"),
        ("wan-2.1-14b", "wan22_14b wan_2.2_14b wan2.1-14b wan2.1-i2v-14b-480p"),
        ("wan-2.2-5b", "wan22_5b wan2.2-ti2v-5b"),
        ("wan-2.1-1.3b", "wan2.1-t2v-1.3b wan21_1p3b"),
        ("wan-2.1", "wan2.1 wan_2.1 Wan-2.1/lora"),
        ("ltx-2", "ltx2 ltx-2/lora"),
        ("lumina-2", "lumina-2/lora lumina2"),
    ],
)
def test_the_spellings_of_headers_mean_one_model(label: str, spellings: str) -> None:
    assert {base_of({"modelspec.architecture": text}, {}).label for text in spellings.split()} == {label}


@pytest.mark.parametrize("text", ["None", "\x1b[31m/lora", "wan21:14b", ""])
def test_a_header_that_says_nothing_usable_is_passed_over(text: str) -> None:
    assert base_of({"modelspec.architecture": text}, {}) == ImageBase(None)


@pytest.mark.parametrize(("width", "label"), [(1536, "wan-2.1-1.3b"), (5120, "wan-2.1-14b"), (64, "wan-2.1")])
@pytest.mark.parametrize("header", [{}, {"ss_base_model_version": "wan2.1"}], ids=["no-header", "header"])
def test_a_family_of_several_sizes_is_told_by_its_width(header: dict[str, str], width: int, label: str) -> None:
    assert base_of(header, {"diffusion_model.blocks.0.self_attn.q": width}) == ImageBase(label)


NAMES = {
    "flux-1-dev": "diffusion_model.double_blocks.0.img_mod.lin double_blocks.0.processor.qkv_lora1",
    "hunyuan-video": "diffusion_model.double_blocks.0.img_attn_qkv lora_unet_double_blocks.0.img_mlp_fc1"
    " transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q lora_unet_single_blocks.38.linear1",
    "framepack": "transformer.clean_x_embedder.proj",
    "chroma": "diffusion_model.distilled_guidance_layer.layers.0.in_layer",
    "auraflow": "transformer.joint_transformer_blocks.0.attn.to_q diffusion_model.double_layers.0.attn.w1q",
    "stable-video-diffusion": "unet.mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_q",
    "kolors": "unet.encoder_hid_proj",
    "stable-diffusion-3": "lora_unet_joint_blocks.0.x_block_attn_qkv",
    "stable-diffusion-3-5-medium": "diffusion_model.joint_blocks.0.x_block.attn2.qkv",
    "flux-2": "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "qwen-image": "transformer.transformer_blocks.0.img_mlp.net.2 lora_unet_transformer_blocks.0.txt_mod.1"
    " lycoris_transformer_blocks.0.img_mod.1",
    "ideogram-4": "diffusion_model.layers.0.attention.o transformer.layers.0.adaln_modulation",
    "flux-3": "diffusion_model.content_mode_blocks.image.0.q_proj transformer.txt_mode_blocks.0.attn.to_q",
    "bria-fibo-2": "transformer.layers.0.cross_attention.to_q",
    "ernie-image": "transformer.layers.0.self_attention.to_q",
    "krea-2": "diffusion_model.blocks.0.attn.wq transformer.transformer_blocks.0.ff.gate",
    "cosmos-predict-2": "diffusion_model.blocks.0.self_attn.q_proj",
    "lumina-2": "transformer.layers.0.attn.to_q transformer.noise_refiner.0.feed_forward.linear_1",
    "kandinsky-5": "transformer.visual_transformer_blocks.0.self_attention.to_query",
    "mochi-1": "transformer.transformer_blocks.0.attn1.add_q_proj",
    "sana": "transformer.transformer_blocks.0.ff.conv_inverted",
    "hidream-i1": "diffusion_model.double_stream_blocks.0.block.attn1.to_q",
    "ltx-2": "diffusion_model.transformer_blocks.0.audio_attn1.to_q",
    "ltx-video": "diffusion_model.patchify_proj",
    "wan-2.1": "diffusion_model.blocks.0.cross_attn.k_img lora_unet_blocks.0.ffn.0 transformer_2.blocks.0.ffn.net.2",
}


@pytest.mark.parametrize(("label", "names"), NAMES.items(), ids=NAMES)
def test_the_names_of_blocks_tell_the_family(label: str, names: str) -> None:
    assert {base_of({}, {name: 0}) for name in names.split()} == {ImageBase(label)}


@pytest.mark.parametrize(
    ("name", "width", "label"),
    [
        ("diffusion_model.single_blocks.0.linear2", 3072, "flux-1-dev"),
        ("transformer.transformer_blocks.0.attn.to_q", 2432, "stable-diffusion-3-5-large"),
        ("transformer.transformer_blocks.0.attn.to_q", 3072, "qwen-image"),
        ("transformer.transformer_blocks.0.attn2.to_q", 1536, "stable-diffusion-3-5-medium"),
        ("transformer.transformer_blocks.0.attn2.to_k", 2048, "ltx-video"),
        ("transformer.transformer_blocks.0.attn1.to_k", 3072, "cogvideox-5b"),
        ("transformer.transformer_blocks.0.attn2.to_q", 1152, "pixart"),
        ("diffusion_model.layers.0.attention.qkv", 2304, "lumina-2"),
        ("lora_unet_layers.0.attention_to_q", 3840, "z-image"),
        ("transformer_2.blocks.0.attn1.to_q", 5120, "wan-2.1-14b"),
    ],
)
def test_names_that_several_families_have_are_guessed_by_width(name: str, width: int, label: str) -> None:
    assert base_of({}, {name: width}) == ImageBase(label, is_guess=True)


def test_a_model_without_clip_is_not_guessed_of_an_adapter_that_has_a_part_for_it() -> None:
    widths = {"lora_transformer_transformer_blocks.0.attn_to_q": 3072}
    assert base_of({}, widths).label == "qwen-image"
    assert base_of({}, widths | {"lora_te1_text_model_encoder_layers.0.mlp_fc1": 768}).label == "flux-1-dev"


def test_nothing_is_guessed_from_a_width_that_no_model_has() -> None:
    assert base_of({}, {ATTENTION: 99, "transformer.transformer_blocks.0.attn.to_q": 99}) == ImageBase(None)


def test_a_file_tells_its_base_model_and_whether_it_is_a_guess() -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    weights = linear(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", inputs=768)
    guessed, stated = (
        KOHYA.inspect(b"", file_bytes(weights)),
        KOHYA.inspect(b"", file_bytes(kohya(), {"ss_base_model_version": "sd_v1"})),
    )
    assert (guessed.base_model, guessed.base_is_guess) == ("stable-diffusion-v1", True)
    assert (stated.base_model, stated.base_is_guess) == ("stable-diffusion-v1", False)
