"""The image adapters that other tests use load in the libraries whose formats they are, and do there what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lycoris import create_lycoris_from_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.icmlora.formats.image_deltas import dw_by_diffusers, dw_of
from tests.icmlora.formats.image_files import (
    FIXTURES,
    ai_toolkit_file,
    comfyui_file,
    diffusers_file,
    kohya_file,
    lycoris_file,
    wan_file,
    xlabs_file,
)
from tests.icmlora.formats.tiny_pipelines import image, tiny_flux, tiny_sd15, tiny_sdxl, tiny_wan_transformer

PIPELINES = {"sd15": tiny_sd15, "sdxl": tiny_sdxl, "flux": tiny_flux}
NORMS: dict[str, dict[str, float]] = json.loads((FIXTURES / "norms.json").read_text())


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_a_tiny_pipeline_paints_the_same_image_each_time(make: Any) -> None:
    assert np.array_equal(image(make()), image(make()))


@pytest.mark.one_case
@pytest.mark.parametrize("names", ["peft", "lora", "processor"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_reads_every_generation_of_its_names_alike(kind: str, names: Any, tmp_path: Path) -> None:
    make = PIPELINES[kind]
    today = dw_by_diffusers(diffusers_file(tmp_path / "today", make()), make())
    other = dw_by_diffusers(diffusers_file(tmp_path / "other", make(), names=names), make())
    assert other.keys() == today.keys()
    assert all(torch.equal(other[name], today[name]) for name in today)


@pytest.mark.slow
def test_without_the_note_in_the_header_alpha_is_taken_for_the_rank(tmp_path: Path) -> None:
    noted = dw_by_diffusers(diffusers_file(tmp_path / "noted", tiny_sd15(), rank=4, alpha=8), tiny_sd15())
    bare = dw_by_diffusers(diffusers_file(tmp_path / "bare", tiny_sd15(), rank=4, alpha=8, metadata=False), tiny_sd15())
    assert all(torch.allclose(noted[name], 2 * bare[name]) for name in noted)


def test_a_file_of_diffusers_changes_the_image(tmp_path: Path) -> None:
    pipeline = tiny_flux()
    dw_by_diffusers(diffusers_file(tmp_path, tiny_flux()), pipeline)
    assert np.abs(image(pipeline) - image(tiny_flux())).max() > 0.01


def test_dora_of_diffusers_has_its_magnitudes(tmp_path: Path) -> None:
    path = diffusers_file(tmp_path, tiny_sd15(), use_dora=True, text_encoders=False)
    assert sum(name.endswith("lora_magnitude_vector") for name in load_file(path)) == 32


@pytest.mark.parametrize("name", NORMS)
def test_lycoris_finds_in_a_file_of_sd_scripts_what_sd_scripts_does(name: str) -> None:
    deltas = dw_of(kohya_file(name))
    assert deltas.keys() == NORMS[name].keys()
    for module, delta in deltas.items():
        assert float(delta.norm()) == pytest.approx(NORMS[name][module], rel=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("sd15", "sd15"), ("sd15-locon", "sd15"), ("sdxl", "sdxl")])
def test_diffusers_finds_in_a_file_of_sd_scripts_what_sd_scripts_does(name: str, kind: str) -> None:
    norms = sorted(float(delta.norm()) for delta in dw_by_diffusers(kohya_file(name), PIPELINES[kind]()).values())
    assert norms == pytest.approx(sorted(NORMS[name].values()), rel=1e-5)


def test_diffusers_splits_the_fused_layers_of_flux(tmp_path: Path) -> None:
    # diffusers knows the first layer of single blocks only at its real width, 3072.
    tensors = {name: value for name, value in load_file(kohya_file("flux")).items() if "_linear1" not in name}
    save_file(tensors, tmp_path / "flux.safetensors")
    found = dw_by_diffusers(tmp_path / "flux.safetensors", tiny_flux())
    fused = dw_of(kohya_file("flux"))["lora_unet_double_blocks_0_img_attn_qkv"]
    split = torch.cat([found[f"transformer.transformer_blocks.0.attn.to_{part}"] for part in "qkv"])
    assert torch.allclose(split, fused, atol=1e-6)


def test_a_file_of_sd_scripts_says_how_it_was_trained() -> None:
    fields = header(kohya_file("sdxl"))
    assert fields["ss_network_dim"] == "1"
    assert fields["ss_network_alpha"] == "0.5"
    assert fields["ss_base_model_version"] == "sdxl_base_v1-0"
    assert fields["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert json.loads(fields["ss_tag_frequency"]) == {"10_pear": {"pear": 12, "red": 7, "on a table": 3}}


LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {},
    "locon-tucker": {"use_tucker": True},
    "locon-dora": {"dora_wd": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "loha-dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-full-matrix": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full": {"algo": "full"},
}


@pytest.mark.one_case
@pytest.mark.parametrize("options", LYCORIS.values(), ids=LYCORIS)
def test_a_file_of_lycoris_does_in_lycoris_what_is_computed_of_it(options: dict[str, Any], tmp_path: Path) -> None:
    path = lycoris_file(tmp_path / "file.safetensors", tiny_sd15().unet, dtype=torch.float32, **options)
    model, plain = tiny_sd15().unet, dict(tiny_sd15().unet.named_parameters())
    network, _ = create_lycoris_from_weights(1.0, str(path), model)
    network.merge_to(1.0)
    after = {name.replace(".", "_"): (value - plain[name]).detach() for name, value in model.named_parameters()}
    deltas = dw_of(path, tiny_sd15().unet)
    assert len(deltas) == 79
    for name, delta in deltas.items():
        merged = after[f"{name.removeprefix('lycoris_')}_weight"]
        assert float((merged - delta).norm() / delta.norm()) < 1e-5


def test_lycoris_in_sd_scripts_has_sd_scripts_names(tmp_path: Path) -> None:
    path = lycoris_file(tmp_path / "file.safetensors", tiny_sd15().unet, prefix="lora_unet")
    assert all(name.startswith("lora_unet_") for name in load_file(path))
    assert header(path)["ss_network_module"] == "lycoris.kohya"


def test_writing_a_file_of_lycoris_leaves_its_defaults_alone(tmp_path: Path) -> None:
    lycoris_file(tmp_path / "one.safetensors", tiny_sd15().unet, prefix="lora_unet")
    path = lycoris_file(tmp_path / "two.safetensors", tiny_sd15().unet)
    assert all(name.startswith("lycoris_") for name in load_file(path))


def test_diffusers_reads_the_files_of_other_trainers_for_flux(tmp_path: Path) -> None:
    assert len(dw_by_diffusers(xlabs_file(tmp_path / "xlabs.safetensors"), tiny_flux())) == 16
    assert len(dw_by_diffusers(ai_toolkit_file(tmp_path / "ai.safetensors", tiny_flux()), tiny_flux())) == 22
    assert len(dw_by_diffusers(comfyui_file(tmp_path / "comfy.safetensors"), tiny_flux())) == 18


def test_diffusers_reads_wan_with_and_without_alpha(tmp_path: Path) -> None:
    bare = dw_by_diffusers(wan_file(tmp_path / "bare.safetensors", rank=4), tiny_wan_transformer())
    half = dw_by_diffusers(wan_file(tmp_path / "half.safetensors", rank=4, alpha=2), tiny_wan_transformer())
    assert len(bare) == 20
    assert all(torch.allclose(half[name], bare[name] / 2, atol=1e-6) for name in bare)


def test_no_fixture_is_large() -> None:
    assert max(path.stat().st_size for path in FIXTURES.iterdir()) < 80_000
