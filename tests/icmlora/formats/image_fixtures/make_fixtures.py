"""Write the files in this folder with sd-scripts itself: its networks on tiny models, and the header of its trainer.

    git clone https://github.com/kohya-ss/sd-scripts SD_SCRIPTS      (48d368f was used)
    python -m venv VENV && VENV/bin/pip install -r SD_SCRIPTS/requirements.txt torch torchvision
    VENV/bin/python -m tests.icmlora.formats.image_fixtures.make_fixtures SD_SCRIPTS

    sd15            networks/lora.py, all attention and both layers of CLIP's MLP
    sd15-locon      the UNet alone, with conv_dim: convolutions, and the linear layers of the residual blocks
    sdxl            names of Stability AI (`input_blocks_4_1_...`), both text encoders, four blocks by `block_dims`
    flux            networks/lora_flux.py: fused qkv, modulations, CLIP

Values are random: no image was trained on. `norms.json` has the Frobenius norm of each module's dW as sd-scripts'
`get_weight` computes it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.icmlora.formats.tiny_configs import CLIP, FLUX_TRANSFORMER, SD15_UNET, SDXL_UNET, TEXT

FOLDER = Path(__file__).parent
TRAINED = 1735689600  # 2025-01-01
_TAGS = {"10_pear": {"pear": 12, "red": 7, "on a table": 3}}
_BLOCKS = {5, 11, 13, 16}
"""Of sd-scripts' 23 blocks of SDXL: input_blocks_4, middle_block_1, output_blocks_0 and output_blocks_3."""
_BASES = {
    "sd15": ("sd_v1", "v1-5-pruned.safetensors"),
    "sdxl": ("sdxl_base_v1-0", "sd_xl_base_1.0.safetensors"),
    "flux": ("flux1", "flux1-dev.safetensors"),
}
"""What the trainer calls the kinds of models, and the files of their weights."""


def sd15_models() -> tuple[Any, Any]:
    """Return CLIP and the UNet; sd-scripts' own UNet of Stable Diffusion 1.5 has the names of diffusers."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**CLIP)), UNet2DConditionModel(**SD15_UNET)


def sdxl_models() -> tuple[Any, Any]:
    """Return both text encoders and sd-scripts' UNet of SDXL, made narrow."""
    from library import sdxl_original_unet as original
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width = SDXL_UNET["block_out_channels"][0]
    original.MODEL_CHANNELS, original.TIME_EMBED_DIM = width, 4 * width
    real = original.Transformer2DModel
    context = SDXL_UNET["cross_attention_dim"]
    original.Transformer2DModel = lambda **options: real(
        **{**options, "num_transformer_layers": 1, "cross_attention_dim": context}
    )
    config = CLIPTextConfig(**CLIP)
    return [CLIPTextModel(config), CLIPTextModelWithProjection(config)], original.SdxlUNet2DConditionModel()


def flux_models() -> tuple[Any, Any]:
    """Return CLIP without a T5, and sd-scripts' Flux, made narrow."""
    from library.flux_models import Flux, FluxParams
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = FLUX_TRANSFORMER
    parameters = FluxParams(
        in_channels=tiny["in_channels"],
        vec_in_dim=TEXT,
        context_in_dim=TEXT,
        hidden_size=tiny["num_attention_heads"] * tiny["attention_head_dim"],
        mlp_ratio=4.0,
        num_heads=tiny["num_attention_heads"],
        depth=tiny["num_layers"],
        depth_single_blocks=tiny["num_single_layers"],
        axes_dim=list(tiny["axes_dims_rope"]),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=True,
    )
    return [CLIPTextModel(CLIPTextConfig(**CLIP)), None], Flux(parameters)


def write(
    name: str,
    networks: ModuleType,
    trainer: ModuleType,
    models: tuple[Any, Any],
    *,
    rank: int = 2,
    alpha: float = 1.0,
    text: bool = True,
    **arguments: Any,
) -> dict[str, float]:
    """Write one file as the trainer does, load it with sd-scripts again, and return the norms of its dW."""
    torch.manual_seed(len(name))
    text_encoders, unet = models
    # A list of the class that `conv_dim` appends to.
    getattr(networks.LoRANetwork, "UNET_TARGET_REPLACE_MODULE", [])[:] = ["Transformer2DModel"]
    network = networks.create_network(1.0, rank, alpha, None, text_encoders, unet, **arguments)
    network.apply_to(text_encoders, unet, text, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    path = FOLDER / f"{name}.safetensors"
    network.save_weights(str(path), torch.float16, header(name, trainer, networks.__name__, rank, alpha, arguments))
    loaded, weights = networks.create_network_from_weights(
        1.0, str(path), None, text_encoders, unet, for_inference=True
    )
    loaded.apply_to(text_encoders, unet, text, True)
    assert str(loaded.load_state_dict(weights, strict=False)) == "<All keys matched successfully>"
    modules = loaded.text_encoder_loras + loaded.unet_loras
    return {module.lora_name: float(f"{module.get_weight().norm().item():.7g}") for module in modules}


def header(
    name: str, trainer: ModuleType, module: str, rank: int, alpha: float, arguments: dict[str, Any]
) -> dict[str, str]:
    """Return what the trainer writes: its own expression, evaluated with its defaults, and its model specification."""
    from library import train_util

    options = ["--network_module", module, "--network_dim", str(rank), "--network_alpha", str(alpha)]
    options += ["--output_name", name, "--resolution", "512,512", "--save_precision", "fp16", "--max_train_steps", "1"]
    args = trainer.setup_parser().parse_args(options)
    args.resolution = (512, 512)
    kinds = {"train_network": "NetworkTrainer", "sdxl_train_network": "SdxlNetworkTrainer"}
    network_trainer = getattr(trainer, kinds.get(trainer.__name__, "FluxNetworkTrainer"))()
    network_trainer.is_schnell, network_trainer.model_type = False, "flux"
    version, base = _BASES[name.partition("-")[0]]
    values = vars(train_util) | {
        "args": args,
        "session_id": 4100,
        "training_started_at": float(TRAINED - 600),
        "text_encoder_lr": args.text_encoder_lr,
        "train_dataset_group": SimpleNamespace(num_train_images=22, num_reg_images=0),
        "val_dataset_group": None,
        "train_dataloader": range(22),
        "num_train_epochs": 1,
        "model_version": version,
        "optimizer_name": "torch.optim.adamw.AdamW",
        "optimizer_args": "",
        "train_util": train_util,
    }
    found = eval(compile(_expression(sys.modules["train_network"]), "train_network.py", "eval"), values)
    network_trainer.update_metadata(found, args)
    found |= {
        "ss_batch_size_per_device": 1,
        "ss_resolution": args.resolution,
        "ss_dataset_dirs": json.dumps({"10_pear": {"n_repeats": 10, "img_count": 22}}),
        "ss_reg_dataset_dirs": json.dumps({}),
        "ss_tag_frequency": json.dumps(_TAGS),
        "ss_bucket_info": "null",
        "ss_sd_model_name": base,
        "ss_training_finished_at": str(float(TRAINED)),
        "ss_steps": "1",
        "ss_epoch": "1",
    }
    if arguments:
        found["ss_network_args"] = json.dumps(arguments)
    return {key: str(value) for key, value in found.items()} | network_trainer.get_sai_model_spec(args)


def _expression(module: ModuleType) -> ast.Expression:
    """Return the dictionary that `train_network.py` assigns to `metadata`."""
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "metadata" and len(ast.unparse(node)) > 999:
            return ast.Expression(node.value)
    raise SystemExit("train_network.py has no metadata")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sd_scripts", type=Path, help="a checkout of sd-scripts")
    sys.path.append(str(parser.parse_args().sd_scripts))
    torch.manual_seed(0)
    random.seed(0)
    import flux_train_network
    import sdxl_train_network
    import train_network
    from library import train_util
    from networks import lora, lora_flux

    train_util.get_git_revision_hash = lambda: "48d368fa557731ad0488c07304dfeba8c07910eb"
    train_util.time.time = lambda: float(TRAINED)
    blocks = ",".join(str(int(number in _BLOCKS)) for number in range(23))
    locon = {"conv_dim": 1, "conv_alpha": 0.25}
    norms = {
        "sd15": write("sd15", lora, train_network, sd15_models()),
        "sd15-locon": write("sd15-locon", lora, train_network, sd15_models(), rank=1, alpha=0.5, text=False, **locon),
        "sdxl": write("sdxl", lora, sdxl_train_network, sdxl_models(), rank=1, alpha=0.5, block_dims=blocks),
        "flux": write("flux", lora_flux, flux_train_network, flux_models()),
    }
    (FOLDER / "norms.json").write_text(json.dumps(norms, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
