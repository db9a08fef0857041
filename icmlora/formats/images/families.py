"""Identify the base model of an image adapter: families of image and video models with their labels and sizes.

    header    "wan22_14b", "Wan-2.1/lora" ...      ──_SPELLINGS──▶ family ──sizes──▶ label
    names     blocks.0.cross_attn.k                ──own─────────▶ family ──sizes──▶ label
    widths    single_blocks.0.linear1 reads 3072   ──_GUESSES────▶ label, marked as a guess

Adapters of one architecture fit all of its checkpoints, so a label names the architecture, in modelspec's spelling if
it has one: Wan 2.2's two 14B transformers have the layers of Wan 2.1, and Flux Kontext has the layers of Flux. The
checkpoint that an adapter was trained on stays in its metadata. Never imports torch.

Sources: huggingface/diffusers, models/transformers; Comfy-Org/ComfyUI, comfy/model_detection.py and comfy/lora.py;
kohya-ss/sd-scripts and kohya-ss/musubi-tuner, sai_model_spec.py; ostris/ai-toolkit, get_base_model_version;
Stability-AI/ModelSpec.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, eq=False)
class Family:
    """Models with the same blocks.

    Attributes:
        label: The label if no size is more specific.
        own: Prefixes of names that are unique to this family.
        sizes: Width of the blocks -> label of the model of that size.
        model: diffusers' class, or None if diffusers loads no adapters of the family.
        options: Options of that class that create every module of any model in the family.
        text_encoders: Number of text encoders into which diffusers loads adapters; these are CLIP.
        refusal: Why its adapters are not converted, if `model` is None.
    """

    label: str
    own: re.Pattern[str] | None = None
    sizes: Mapping[int, str] = field(default_factory=dict)
    model: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    text_encoders: int = 0
    refusal: str = ""

    @property
    def component(self) -> str:
        """Name of the model in a diffusers pipeline."""
        return "unet" if self.model == UNET else "transformer"

    @property
    def labels(self) -> frozenset[str]:
        """Return every label of the family."""
        return frozenset({self.label, *self.sizes.values()})


def _names(text: str) -> re.Pattern[str]:
    """Compile name prefixes: "#" is a number, "%" anything, "!" a dot, "." a dot or its flattened form "_"."""
    text = "|".join(text.split()).replace(".", "[._]")
    return re.compile(text.replace("!", r"\.").replace("#", r"\d+").replace("%", ".*"))


UNET = "UNet2DConditionModel"
_SDXL: Mapping[str, object] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_HIDREAM: Mapping[str, object] = {
    "patch_size": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "caption_channels": (16, 16),
    "text_emb_dim": 16,
    "axes_dims_rope": (8, 4, 4),
    "llama_layers": (0, 1),
}
_SD3: Mapping[str, object] = {"num_layers": 2, "dual_attention_layers": (0,)}

FAMILIES = (
    Family(
        "stable-video-diffusion",
        _names("(down_blocks|mid_block|up_blocks)%temporal_ %time_(stack.#|mixer)"),
        refusal="its diffusers pipeline loads no adapters, and ComfyUI's name map lacks its time layers",
    ),
    Family("kolors", _names("encoder_hid_proj"), model=UNET, options={**_SDXL, "encoder_hid_dim": 4096}),
    Family(
        "stable-diffusion-xl-v1-base",
        _names("add_embedding label_emb"),
        model=UNET,
        options=_SDXL,
        text_encoders=2,
    ),
    Family("stable-diffusion-v1", model=UNET, text_encoders=1),
    Family("stable-diffusion-v2", model=UNET, text_encoders=1),
    Family(
        "flux-2",
        _names(
            "single_transformer_blocks.#.attn.to_qkv_mlp_proj (double|single)_stream_modulation"
            " transformer_blocks.#.(ff|ff_context).linear_(in|out) time_guidance_embed"
            " single_(transformer_)?blocks.4#."
        ),
        sizes={6144: "flux-2-dev", 4096: "flux-2-klein-9b", 3072: "flux-2-klein-4b"},
        model="Flux2Transformer2DModel",
    ),
    Family(
        "flux-3",
        _names(
            "(content_|txt_)?mode_blocks single_blocks.#.([qkv]_proj|attn_out|mlp_) (early|single)_stream_modulations"
        ),
        model="Flux3Transformer2DModel",
    ),
    Family("framepack", _names("clean_x_embedder"), model="HunyuanVideoFramepackTransformer3DModel"),
    Family(
        "hunyuan-video",
        # Tencent's own names have "_" where Flux names have a dot, and there is one more block of each kind.
        _names(
            "double_blocks!#!(img|txt)_attn_(qkv|proj) double_blocks.#.(img|txt)_(mlp.fc[12]|mod.linear)"
            " single_blocks.#.modulation.linear txt_in.individual_token_refiner context_embedder.token_refiner"
            " double_blocks.19. single_(transformer_)?blocks.3[89]."
        ),
        model="HunyuanVideoTransformer3DModel",
        options={"guidance_embeds": True},
    ),
    Family("chroma", _names("distilled_guidance_layer"), model="ChromaTransformer2DModel"),
    Family(
        "flux-1-dev",
        _names(
            "double_blocks.#.((img|txt)_mod.lin|processor) single_blocks.#.(modulation.lin|processor)"
            " single_transformer_blocks.#.norm.linear vector_in guidance_in"
        ),
        model="FluxTransformer2DModel",
        options={"guidance_embeds": True},
        text_encoders=1,
    ),
    Family(
        "auraflow",
        _names("joint_transformer_blocks.# double_layers.#.attn.w[12][qkvo] single_layers.#"),
        model="AuraFlowTransformer2DModel",
    ),
    Family(
        "mochi-1", _names("transformer_blocks.#.attn1.(add_|to_add_out) %qkv_[xy]$"), model="MochiTransformer3DModel"
    ),
    Family("qwen-image", _names("transformer_blocks.#.(img|txt)_(mlp.net|mod.1)"), model="QwenImageTransformer2DModel"),
    Family("sana", _names("transformer_blocks.#.ff.conv_(inverted|depth|point)"), model="SanaTransformer2DModel"),
    Family(
        "ltx-2",
        _names("transformer_blocks.#.(audio_|video_to_audio) av_ca_ audio_"),
        model="LTX2VideoTransformer3DModel",
    ),
    Family("ltx-video", _names("patchify_proj"), model="LTXVideoTransformer3DModel"),
    Family(
        "hidream-i1",
        _names("(double|single)_stream_blocks.#"),
        model="HiDreamImageTransformer2DModel",
        options=_HIDREAM,
    ),
    Family(
        "kandinsky-5",
        _names("(visual|text)_transformer_blocks.#"),
        sizes={1792: "kandinsky-5-lite", 4096: "kandinsky-5-pro"},
        model="Kandinsky5Transformer3DModel",
    ),
    Family(
        "lumina-2",
        _names("(layers|noise_refiner|context_refiner).#.(attn.to_|feed_forward.linear_|adaLN_modulation.1)"),
        model="Lumina2Transformer2DModel",
    ),
    Family(
        "ideogram-4",
        _names("layers.#.(adaln_modulation|attention.o)$"),
        model="Ideogram4Transformer2DModel",
    ),
    Family("bria-fibo-2", _names("perceiver.layers layers.#.cross_attention"), model="BriaFibo2Transformer2DModel"),
    Family("z-image", model="ZImageTransformer2DModel"),
    Family(
        "ernie-image",
        _names("layers.#.(self_attention.to_|mlp.linear_fc2)"),
        model="ErnieImageTransformer2DModel",
    ),
    Family(
        "krea-2",
        _names(
            "transformer_blocks.#.(attn.to_gate|ff.(gate|up|down)$) text_fusion txtfusion blocks.#.attn.(w[qkvo]|gate)$"
        ),
        model="Krea2Transformer2DModel",
    ),
    Family(
        "cosmos-predict-2",
        _names(
            "blocks.#.((self|cross)_attn.(q|k|v|output)_proj|adaln_modulation)"
            " transformer_blocks.#.norm[123].linear_[12]$"
        ),
        model="CosmosTransformer3DModel",
    ),
    Family(
        "wan-2.1-vace",
        _names("vace_(blocks|patch_embedding)"),
        sizes={1536: "wan-2.1-vace-1.3b", 5120: "wan-2.1-vace-14b"},
        model="WanVACETransformer3DModel",
        options={"image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    Family(
        "wan-2.1",
        _names("blocks.#.((self|cross)_attn.([qkvo]|[kv]_img)$ ffn.([02]$|net)) condition_embedder"),
        sizes={1536: "wan-2.1-1.3b", 3072: "wan-2.2-5b", 5120: "wan-2.1-14b"},
        model="WanTransformer3DModel",
        options={"image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    Family(
        "stable-diffusion-3-5-medium",
        _names("joint_blocks.#.x_block.attn2"),
        model="SD3Transformer2DModel",
        options=_SD3,
        text_encoders=2,
    ),
    Family(
        "stable-diffusion-3",
        _names("joint_blocks.#"),
        sizes={2432: "stable-diffusion-3-5-large"},
        model="SD3Transformer2DModel",
        options=_SD3,
        text_encoders=2,
    ),
    Family(
        "cogvideox",
        sizes={1920: "cogvideox-2b", 3072: "cogvideox-5b"},
        model="CogVideoXTransformer3DModel",
        options={"ofs_embed_dim": 512},
    ),
    Family("cogview-4", model="CogView4Transformer2DModel"),
    Family(
        "pixart",
        _names("adaln_single.emb.(resolution|aspect) blocks.#.cross_attn.(q|kv)_linear"),
        model="PixArtTransformer2DModel",
        options={"num_layers": 1, "caption_channels": 16, "use_additional_conditions": True},
    ),
    Family(
        "minimax-h3",
        _names(
            "blocks.#.attn.(qkv|out)_proj (transformer_)?blocks.#.adaln_proj token_refiner.(refiner_)?blocks"
            " (video|audio)_patch_proj audio_proj_(in|out)"
        ),
        model="MiniMaxH3Transformer3DModel",
        options={"num_layers": 1},
    ),
    Family(
        "ace-step-1.5",
        _names("layers.#.cross_attn.([qkvo]_proj|to_)"),
        model="AceStepTransformer1DModel",
        options={"num_hidden_layers": 1},
    ),
    Family("ace-step-1", refusal="diffusers has no such model, and ComfyUI uses the original names"),
)

# Spellings in headers, without case and punctuation -> family.
_SPELLINGS = {
    re.compile(spelling): label
    for spelling, label in {
        r"(sd|stablediffusion)(v?1|15)(x|5|50)?": "stable-diffusion-v1",
        r"(sd|stablediffusion)v?2(1|512|768v?|v)?": "stable-diffusion-v2",
        r"(sd|stablediffusion)xl.*|pony(xl|v6.*|diffusion.*)?|illustrious.*|noobai.*": "stable-diffusion-xl-v1-base",
        r"(sd|stablediffusion)3(m|medium)?": "stable-diffusion-3",
        r"(sd|stablediffusion)35(m|medium)?": "stable-diffusion-3-5-medium",
        r"(sd|stablediffusion)35l(arge)?(turbo)?": "stable-diffusion-3-5-large",
        r"(svd|stablevideodiffusion).*": "stable-video-diffusion",
        r"kolors.*": "kolors",
        r"(flux1?)?chroma.*": "chroma",
        r"flux(1.*|dev|schnell|kontext.*)?": "flux-1-dev",
        r"flux2(dev)?": "flux-2-dev",
        r"flux2klein(base)?4b": "flux-2-klein-4b",
        r"flux2klein(base)?9b": "flux-2-klein-9b",
        r"hunyuanvideo|hv": "hunyuan-video",
        r"framepack.*": "framepack",
        r"auraflow.*": "auraflow",
        r"mochi.*": "mochi-1",
        r"qwenimage(edit.*|layered)?": "qwen-image",
        r"sana.*": "sana",
        r"pixart.*": "pixart",
        r"ltx(2.*|av)": "ltx-2",
        r"ltx(v.*|1.*)?": "ltx-video",
        r"hidream(i1.*|full|dev|fast)?": "hidream-i1",
        r"kandinsky5.*": "kandinsky-5",
        r"lumina(image)?2.*": "lumina-2",
        r"flux3.*": "flux-3",
        r"(bria)?fibo2.*": "bria-fibo-2",
        r"zimage.*": "z-image",
        r"ideogram4.*": "ideogram-4",
        r"ernie(image)?": "ernie-image",
        r"krea2.*": "krea-2",
        r"anima|cosmos(predict)?2.*": "cosmos-predict-2",
        r"wan(2?1)?vace.*": "wan-2.1-vace",
        r"minimaxh3.*": "minimax-h3",
        r"acestepv?15.*": "ace-step-1.5",
        r"acestep(v?1(35b)?)?": "ace-step-1",
        r"wan2?1?.*1p?3b": "wan-2.1-1.3b",
        r"wan22.*5b": "wan-2.2-5b",
        r"wan2[12].*14b.*": "wan-2.1-14b",
        r"wan(2[12])?(t2v|i2v|flf2v)?": "wan-2.1",
        r"cogvideox?": "cogvideox",
        r"cogvideox?(15)?5b.*": "cogvideox-5b",
        r"cogvideox?2b": "cogvideox-2b",
        r"cogview4.*": "cogview-4",
    }.items()
}

# Names shared by several families -> likely label by the input width of a module. These are guesses: Kolors has the
# width of SDXL, Chroma the blocks of Flux.
_GUESSES = (
    (
        _names("(down|mid|up|input|middle|output)_blocks?.%attn2.to_[kv]"),
        {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2", 2048: "stable-diffusion-xl-v1-base"},
    ),
    (
        _names("(double|single)_blocks.# single_transformer_blocks.#.(attn|proj_mlp)"),
        {3072: "flux-1-dev", 4096: "flux-2-klein-9b", 6144: "flux-2-dev"},
    ),
    (_names("transformer_blocks.#.attn2."), {1536: "stable-diffusion-3-5-medium"}),
    (
        _names("transformer_blocks.#.(attn|ff|ff_context)."),
        {1536: "stable-diffusion-3", 2432: "stable-diffusion-3-5-large"},
    ),
    (_names("transformer_blocks.#.attn.(to_|add_)"), {3072: "qwen-image", 6144: "krea-2", 5376: "minimax-h3"}),
    (_names("transformer_blocks.#.attn.(to_|add_)"), {3072: "flux-1-dev"}),
    (
        _names("transformer_blocks.#.attn2."),
        {2048: "ltx-video", 1152: "pixart", 2240: "sana", 4096: "ltx-2"},
    ),
    (
        _names("transformer_blocks.#.attn1."),
        {1920: "cogvideox-2b", 2560: "cogview-4", 3072: "cogvideox-5b"},
    ),
    (
        _names("(layers|noise_refiner|context_refiner).#.(attention|feed_forward)."),
        {3840: "z-image", 2304: "lumina-2", 4608: "ideogram-4", 3584: "bria-fibo-2"},
    ),
    (_names("blocks.#.attn[12].to_"), {1536: "wan-2.1-1.3b", 3072: "wan-2.2-5b", 5120: "wan-2.1-14b"}),
)

_UNET_BLOCK = _names("(down|mid|up|input|middle|output)_block")
# Prefixes that programs add to a module's name in its model; programs with a prefix in _FLAT flatten the name.
_FLAT = re.compile(r"lora_(unet|transformer)_|lycoris_")
_DOTTED = re.compile(r"transformer(_\d)?\.|(model\.)?diffusion_model\.|base_model\.model\.|unet\.|pipe\.dit\.")
_READS_WIDTH = re.compile(r".*(to_q|to_query|qkv|qkv_mlp_proj|[._]q|q_proj|linear1|w[12]q)")
# modelspec has the label, then the kind of adapter: `.../lora`.
_STATED = ("modelspec.architecture", "ss_base_model_version")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,80}")
_UNSET = frozenset({"None", "none", "null", "unknown"})
# Only SDXL has two CLIP text encoders with a UNet.
_SECOND_TEXT, _ANY_UNET = re.compile(r"lora_te2_|text_encoder_2\."), re.compile(r"lora_unet_|unet\.")
_CLIP = re.compile(r"lora_te\d?_text_model|text_encoder(_\d)?\.(text_model|encoder)|(text_encoders\.)?clip_")
_NUMBER = re.compile(r"\d+")
_TWO_CLIPS = "stable-diffusion-xl-v1-base"


class ImageBase(NamedTuple):
    """The base model of an image adapter.

    Attributes:
        label: The label; None if unknown.
        is_guess: The label follows only from widths, which other models may share.
    """

    label: str | None
    is_guess: bool = False


UNKNOWN = ImageBase(None)


def base_of(metadata: Mapping[str, str], widths: Mapping[str, int]) -> ImageBase:
    """Return the base model of an adapter, from its header, the names of its blocks, or their widths.

    Args:
        metadata: Metadata of its header.
        widths: Names of its modules in the file, in natural order -> input width, or 0 if unknown.
    """
    # The last module of each kind is enough: models have thousands, and differ in the number of blocks.
    named = ((inner_name(name), width) for name, width in widths.items())
    inner = dict({_NUMBER.sub("#", name): (name, width) for name, width in named}.values())
    for key in _STATED:
        text = metadata.get(key, "").partition("/")[0]
        if _LABEL.fullmatch(text) and text not in _UNSET:
            return ImageBase(_stated(text, inner) or text)
    if (family := next(_named(inner.keys()), None)) is not None:
        return ImageBase(_sized(family, inner))
    guessed = _guessed(inner, with_clip=any(map(_CLIP.match, widths)))
    if guessed in (None, _TWO_CLIPS) and all(any(map(one.match, widths)) for one in (_ANY_UNET, _SECOND_TEXT)):
        return ImageBase(_TWO_CLIPS)
    return ImageBase(guessed, is_guess=guessed is not None)


def families_of(names: Collection[str], base: ImageBase) -> list[Family]:
    """Return the possible families of an adapter, likeliest first; only one if its base model is certain.

    Args:
        names: Its modules, without their prefixes.
        base: Its base model, possibly a guess.
    """
    known = _with_label(base.label)
    if known and not base.is_guess:
        return known
    guessed = [next(iter(sizes.values())) for blocks, sizes in _GUESSES if any(map(blocks.match, names))]
    if any(map(_UNET_BLOCK.match, names)):
        guessed += ["stable-diffusion-v1", _TWO_CLIPS]
    like = (family for label in guessed for family in _with_label(label))
    return list(dict.fromkeys([*known, *_named(names), *like]))


def inner_name(module: str) -> str:
    """Return a module's name in its model; flattened names have "_" for every dot."""
    if (flat := _FLAT.match(module)) is not None:
        return module[flat.end() :].replace(".", "_")
    dotted = _DOTTED.match(module)
    return module if dotted is None else module[dotted.end() :]


def _stated(text: str, widths: Mapping[str, int]) -> str | None:
    """Return the label for a header's spelling of a model; None if the spelling is unknown."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    label = next((label for spelling, label in _SPELLINGS.items() if spelling.fullmatch(plain)), None)
    family = next((one for one in FAMILIES if one.label == label), None)
    return label if family is None else _sized(family, widths)


def _named(names: Collection[str]) -> Iterator[Family]:
    """Yield the families for which some of these names are unique."""
    return (family for family in FAMILIES if family.own is not None and any(map(family.own.match, names)))


def _guessed(widths: Mapping[str, int], *, with_clip: bool) -> str | None:
    """Return the label that the widths suggest; an adapter that also changes CLIP needs a model with CLIP."""
    for names, sizes in _GUESSES:
        for name, width in widths.items():
            if width in sizes and names.match(name):
                label = sizes[width]
                if not with_clip or any(family.text_encoders > 0 for family in _with_label(label)):
                    return label
    return None


def _with_label(label: str | None) -> list[Family]:
    """Return the families with a label, at most one."""
    return [family for family in FAMILIES if label in family.labels]


def _sized(family: Family, widths: Mapping[str, int]) -> str:
    """Return the label of a family's model by the input width of its blocks."""
    width = next((width for name, width in widths.items() if _READS_WIDTH.fullmatch(name) and width in family.sizes), 0)
    return family.sizes.get(width, family.label)
