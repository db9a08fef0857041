"""Adapters of image models in single files, written by the programs whose formats they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.compat.case import Case, Outcome

if TYPE_CHECKING:
    import torch

FILE = "lora.safetensors"  # such a name says nothing, so the task is named after the folder
_GROUP = "Image models"
Tensors = dict[str, "torch.Tensor"]


def _case(name: str, make: Callable[[Path], Path], outcome: Outcome, remark: str = "") -> Case:
    def build(folder: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        folder.mkdir(parents=True)
        made = make(folder.with_name(f"{folder.name}-made"))
        with safe_open(made, "pt") as file:
            header = file.metadata() or {}
        # Tiny models have widths of their own, so the header says which model it is.
        save_file(load_file(made), folder / FILE, metadata={"modelspec.architecture": "tiny-image-model", **header})
        if made.is_relative_to(folder.parent):
            shutil.rmtree(folder.with_name(f"{folder.name}-made"))

    return Case(name, _GROUP, build, outcome, remark)


def _kohya(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from tests.icmlora.formats.image_files import kohya_file

        return kohya_file(name)

    return make


def _lycoris(**options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from tests.icmlora.formats.image_files import lycoris_file
        from tests.icmlora.formats.tiny_pipelines import tiny_sd15

        return lycoris_file(folder / FILE, tiny_sd15().unet, **options)

    return make


def _diffusers(kind: str, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from tests.icmlora.formats import tiny_pipelines
        from tests.icmlora.formats.image_files import diffusers_file

        return diffusers_file(folder, getattr(tiny_pipelines, f"tiny_{kind}")(), **options)

    return make


def _made(name: str, *, with_pipeline: bool = False, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from tests.icmlora.formats import image_files
        from tests.icmlora.formats.tiny_pipelines import tiny_flux

        arguments = [tiny_flux()] if with_pipeline else []
        path: Path = getattr(image_files, name)(folder / FILE, *arguments, **options)
        return path

    return make


def _named(
    *modules: str, down: str = "lora_A", up: str = "lora_B", alpha: float | None = None
) -> Callable[[Path], Path]:
    """Make a file with the names of modules that a trainer writes."""

    def make(folder: Path) -> Path:
        import torch

        from tests.icmlora.formats.single_files import linear, write

        tensors: Tensors = {}
        for seed, module in enumerate(modules):
            tensors |= linear(f"{module}.{down}.weight", f"{module}.{up}.weight", inputs=24, outputs=24, seed=seed)
            tensors |= {} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)}
        return write(folder / FILE, tensors)

    return make


def _lokr(folder: Path) -> Path:
    import torch

    from tests.icmlora.formats.single_files import write

    stem = "diffusion_model.layers.0.attention.to_q"
    return write(folder / FILE, {f"{stem}.lokr_w1": torch.ones(2, 2), f"{stem}.lokr_w2": torch.ones(4, 4)})


def _changed(change: Callable[[Tensors], Tensors]) -> Callable[[Path], Path]:
    """Make a file of kohya's with other tensors."""

    def make(folder: Path) -> Path:
        from safetensors.torch import load_file, save_file

        folder.mkdir(parents=True)
        save_file(change(load_file(_kohya("sd15")(folder))), folder / FILE)
        return folder / FILE

    return make


def _without(part: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        first = next(name for name in tensors if name.endswith(part))
        return {name: tensor for name, tensor in tensors.items() if name != first}

    return change


def _turned(tensors: Tensors) -> Tensors:
    return {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}


def _mixed(tensors: Tensors) -> Tensors:
    first = next(name for name in tensors if name.endswith(".lora_down.weight"))
    other = {"unet.x.to_q.lora_A.weight": tensors[first].clone(), "unet.x.to_q.lora_B.weight": tensors[first].T.clone()}
    return tensors | {name: tensor.contiguous() for name, tensor in other.items()}


CASES: tuple[Case, ...] = (
    _case("kohya-sd15", _kohya("sd15"), "extras", "the header's notes are kept"),
    _case("kohya-sd15-locon", _kohya("sd15-locon"), "extras", "with convolutions"),
    _case("kohya-sdxl", _kohya("sdxl"), "extras"),
    _case("kohya-flux", _kohya("flux"), "extras"),
    _case("diffusers-sd15", _diffusers("sd15"), "extras", "alpha in the header"),
    _case("diffusers-sdxl", _diffusers("sdxl"), "extras"),
    _case("diffusers-flux", _diffusers("flux"), "extras"),
    _case("diffusers-lora-names", _diffusers("sdxl", names="lora"), "extras", "`lora.down.weight`"),
    _case("diffusers-processor-names", _diffusers("sd15", names="processor"), "extras", "`processor.to_q_lora`"),
    _case("diffusers-dora", _diffusers("sd15", use_dora=True, text_encoders=False), "extras", "magnitudes are kept"),
    _case("xlabs-flux", _made("xlabs_file"), "extras"),
    _case("ai-toolkit-flux", _made("ai_toolkit_file", with_pipeline=True), "extras"),
    _case("comfyui-flux", _made("comfyui_file"), "extras"),
    _case("comfyui-wan", _made("wan_file"), "extras"),
    _case("comfyui-wan-alpha", _made("wan_file", alpha=2), "extras", "`lora_down` with alpha"),
    _case("ai-toolkit-qwen", _named("diffusion_model.transformer_blocks.0.attn.to_q"), "extras"),
    _case(
        "onetrainer-z-image",
        _named("transformer.layers.0.attention.to_q", down="lora_down", up="lora_up", alpha=1.0),
        "extras",
        "`lora_down` with alpha under diffusers' names",
    ),
    _case(
        "onetrainer-t5",
        _named("lora_transformer_x_embedder", "lora_te3_shared", down="lora_down", up="lora_up", alpha=1.0),
        "extras",
    ),
    _case("fal-kontext", _named("base_model.model.double_blocks.0.img_attn.qkv"), "extras", "`base_model.model.`"),
    _case("bfl-control", _named("img_in", "double_blocks.0.img_attn.proj"), "extras", "no prefix"),
    _case(
        "diffsynth-qwen",
        _named("transformer_blocks.0.attn.to_q", down="lora_A.default", up="lora_B.default"),
        "extras",
        "`lora_A.default`",
    ),
    _case(
        "musubi-hunyuan",
        _named("lora_unet_double_blocks_0_img_attn_qkv", down="lora_down", up="lora_up", alpha=1.0),
        "extras",
    ),
    _case("lycoris-locon", _lycoris(), "extras"),
    _case("lycoris-locon-tucker", _lycoris(use_tucker=True), "extras", "a code comes back without `lora_mid`"),
    _case("lycoris-dora", _lycoris(dora_wd=True), "extras", "`dora_scale` is kept"),
    _case("lycoris-kohya-names", _lycoris(prefix="lora_unet"), "extras"),
    _case("lycoris-loha", _lycoris(algo="loha"), "original"),
    _case("lycoris-lokr", _lycoris(algo="lokr"), "original"),
    _case("ai-toolkit-lokr", _lokr, "original"),
    _case("lycoris-glora", _lycoris(algo="glora"), "original"),
    _case("lycoris-oft", _lycoris(algo="diag-oft"), "original"),
    _case("lycoris-full", _lycoris(algo="full"), "original"),
    _case("image-half", _changed(_without(".lora_up.weight")), "refused", "a `lora_up` is missing"),
    _case("image-alpha", _changed(_without(".alpha")), "refused", "an alpha is missing"),
    _case("image-turned", _changed(_turned), "refused", "factors are transposed"),
    _case("image-two-namings", _changed(_mixed), "refused", "names of kohya and of diffusers"),
)
