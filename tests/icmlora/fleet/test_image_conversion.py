"""Image adapters in another program's format: the libraries that read them compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmlora import AdapterRefused, Bundle, Fleet, convert
from icmlora.fleet.convert.convert import AdapterConverted
from tests.icmlora.formats.image_deltas import dw_by_diffusers, dw_of
from tests.icmlora.formats.image_files import (
    comfyui_file,
    diffusers_file,
    kohya_file,
    lycoris_file,
    wan_file,
    xlabs_file,
)
from tests.icmlora.formats.single_files import kohya, write
from tests.icmlora.formats.test_image_agreement import assert_equal
from tests.icmlora.formats.tiny_pipelines import image, tiny_flux, tiny_sd15, tiny_sdxl, tiny_wan_transformer

Maker = Callable[[Path], Path]
Pipeline = Callable[[], Any]

TO_DIFFUSERS: dict[str, tuple[Maker, Pipeline]] = {
    "kohya-sd15": (lambda folder: kohya_file("sd15"), tiny_sd15),
    "kohya-sd15-locon": (lambda folder: kohya_file("sd15-locon"), tiny_sd15),
    "kohya-sdxl": (lambda folder: kohya_file("sdxl"), tiny_sdxl),
    "lycoris-kohya": (
        lambda folder: lycoris_file(folder / "x.safetensors", tiny_sd15().unet, prefix="lora_unet"),
        tiny_sd15,
    ),
    "comfyui-flux": (lambda folder: comfyui_file(folder / "x.safetensors"), tiny_flux),
    "xlabs-flux": (lambda folder: xlabs_file(folder / "x.safetensors"), tiny_flux),
    "comfyui-wan": (lambda folder: wan_file(folder / "x.safetensors"), tiny_wan_transformer),
    "comfyui-wan-alpha": (lambda folder: wan_file(folder / "x.safetensors", alpha=2), tiny_wan_transformer),
}
TO_KOHYA: dict[str, tuple[Maker, Pipeline]] = {
    f"{kind}-{names}": (lambda folder, make=make, names=names: diffusers_file(folder, make(), names=names), make)
    for kind, make in (("sd15", tiny_sd15), ("sdxl", tiny_sdxl))
    for names in ("peft", "lora", "processor")
}
BOTH = {f"{name} for diffusers": (*pair, "diffusers") for name, pair in TO_DIFFUSERS.items()}
BOTH |= {f"{name} for kohya": (*pair, "kohya") for name, pair in TO_KOHYA.items()}


def converted(source: Path, folder: Path, **options: Any) -> tuple[Path, AdapterConverted]:
    out = folder / "converted.safetensors"
    (done,) = convert(source, out, **options).done
    return out, done


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.one_case
@pytest.mark.parametrize(("make", "pipeline", "target"), BOTH.values(), ids=BOTH)
def test_a_converted_adapter_changes_each_weight_by_the_same(
    make: Maker, pipeline: Pipeline, target: str, tmp_path: Path
) -> None:
    source = make(tmp_path)
    out, done = converted(source, tmp_path, adapter_format=target, dtype="float32")
    assert (done.format, done.relative_error) == (target, 0.0)
    assert_equal(dw_by_diffusers(source, pipeline()), dw_by_diffusers(out, pipeline()))


def test_both_spellings_of_comfyui_load_as_the_same_adapter(tmp_path: Path) -> None:
    deltas = []
    for alpha in (None, 4):  # lora_A, which diffusers itself does not read, and lora_down with alpha = r
        folder = tmp_path / str(alpha)
        source = comfyui_file(folder / "x.safetensors", alpha=alpha)
        out, _ = converted(source, folder, adapter_format="diffusers", dtype="float32")
        deltas.append(dw_by_diffusers(out, tiny_flux()))
    assert {name.partition(".")[0] for name in deltas[0]} == {"transformer", "text_encoder"}
    assert_equal(*deltas)


@pytest.mark.one_case
@pytest.mark.parametrize("options", [{}, {"use_tucker": True}], ids=["plain", "tucker"])
@pytest.mark.parametrize("target", ["kohya", "diffusers"])
def test_locon_of_lycoris_changes_each_weight_by_the_same(
    target: str, options: dict[str, bool], tmp_path: Path
) -> None:
    source = lycoris_file(tmp_path / "x.safetensors", tiny_sd15().unet, **options)
    out, _ = converted(source, tmp_path, adapter_format=target, dtype="float32")
    wanted = {name.removeprefix("lycoris_"): delta for name, delta in dw_of(source).items()}
    loaded = dw_by_diffusers(out, tiny_sd15())
    found = {name.removeprefix("unet.").replace(".", "_"): delta for name, delta in loaded.items()}
    assert_equal(wanted, {name: delta.reshape(wanted[name].shape) for name, delta in found.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kohya-sd15-locon", "xlabs-flux", "comfyui-flux"])
def test_a_converted_adapter_makes_the_same_image(name: str, tmp_path: Path) -> None:
    make, pipeline = TO_DIFFUSERS[name]
    source, base, one, other = make(tmp_path), pipeline(), pipeline(), pipeline()
    out, _ = converted(source, tmp_path, adapter_format="diffusers", dtype="float32")
    dw_by_diffusers(source, one)
    dw_by_diffusers(out, other)
    assert np.abs(image(one) - image(other)).max() <= 1 / 255
    assert np.abs(image(one) - image(base)).max() > 2 / 255


def test_there_and_back_is_the_same_adapter(tmp_path: Path) -> None:
    source = kohya_file("sd15-locon")
    there, _ = converted(source, tmp_path, adapter_format="diffusers", dtype="float32")
    (tmp_path / "back").mkdir()
    back, _ = converted(there, tmp_path / "back", adapter_format="kohya", dtype="float32")
    assert set(load_file(source)) == set(load_file(back))
    assert_equal(dw_of(source), dw_of(back))


def test_without_a_number_format_it_keeps_its_own_and_says_what_rounding_costs(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", kohya("lora_unet_mid_block_attentions_0_proj_in", dtype=torch.float16))
    out, done = converted(source, tmp_path, adapter_format="diffusers")  # alpha / r = 1/2: nothing is rounded
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}
    assert done.relative_error < 1e-7
    odd = write(
        tmp_path / "b.safetensors", kohya("lora_unet_mid_block_attentions_0_proj_in", alpha=3.0, dtype=torch.float16)
    )
    (tmp_path / "odd").mkdir()
    _, done = converted(odd, tmp_path / "odd", adapter_format="diffusers")
    assert 0 < done.relative_error < 1e-3


@pytest.mark.slow
def test_ranks_are_cut_and_names_changed_in_one_go(tmp_path: Path) -> None:
    source = diffusers_file(tmp_path, tiny_sd15())
    out, done = converted(source, tmp_path, adapter_format="kohya", rank=2, dtype="float32")
    before, after = dw_by_diffusers(source, tiny_sd15()), dw_by_diffusers(out, tiny_sd15())
    error = sum(float((after[key] - before[key]).square().sum()) for key in before)
    norm = sum(float(delta.square().sum()) for delta in before.values())
    assert done.relative_error == pytest.approx((error / norm) ** 0.5, abs=1e-5)
    assert (header(out)["ss_network_dim"], done.rank) == ("2", 2)


# the header, and what goes along


def test_what_the_trainer_noted_goes_along_and_what_is_about_ranks_is_made_true(tmp_path: Path) -> None:
    notes = {
        "ss_trigger_words": "pears",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_module": "networks.lora",
        "sshs_model_hash": "ab",
    }
    source = write(tmp_path / "a.safetensors", kohya("lora_unet_mid_block_attentions_0_proj_in"), notes)
    (tmp_path / "a.preview.png").write_bytes(b"picture")
    out, done = converted(source, tmp_path, adapter_format="diffusers")
    assert header(out) == {
        "format": "pt",
        "ss_trigger_words": "pears",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_network_module": "networks.lora",
    }
    assert (tmp_path / "converted.preview.png").read_bytes() == b"picture"
    assert done.left_out == ()


def test_the_configuration_of_diffusers_does_not_stay_behind_with_another_scale(tmp_path: Path) -> None:
    source = diffusers_file(tmp_path, tiny_sd15(), alpha=8)
    assert "lora_adapter_metadata" in header(source)
    out, _ = converted(source, tmp_path, adapter_format="kohya")
    found = header(out)
    assert "lora_adapter_metadata" not in found
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "4",
    )
    assert {float(one) for name, one in load_file(out).items() if name.endswith(".alpha")} == {4.0}


# what is refused


def test_dora_is_refused_by_name_and_not_dropped(tmp_path: Path) -> None:
    tensors = kohya("lora_unet_mid_block_attentions_0_proj_in")
    tensors["lora_unet_mid_block_attentions_0_proj_in.dora_scale"] = torch.ones(5, 1)
    source = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterRefused, match="dora_scale") as refused:
        converted(source, tmp_path, adapter_format="diffusers")
    assert refused.value.kind == "extras"
    assert not (tmp_path / "converted.safetensors").exists()


def test_dora_of_diffusers_is_refused_by_name(tmp_path: Path) -> None:
    source = diffusers_file(tmp_path, tiny_sd15(), use_dora=True, text_encoders=False)
    with pytest.raises(AdapterRefused, match="lora_magnitude_vector"):
        converted(source, tmp_path, adapter_format="kohya")


def test_a_module_that_diffusers_would_drop_is_refused_by_name(tmp_path: Path) -> None:
    source = comfyui_file(tmp_path / "a.safetensors")
    lost = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    more = {f"{lost}.lora_down.weight": torch.ones(4, 8), f"{lost}.lora_up.weight": torch.ones(8, 4)}
    save_file(load_file(source) | more | {f"{lost}.alpha": torch.tensor(4.0)}, source)
    with pytest.raises(AdapterRefused, match=r"t5xxl.*would be lost"):
        converted(source, tmp_path, adapter_format="diffusers")


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", kohya("lora_prior_blocks_0_attn"))
    with pytest.raises(AdapterRefused, match="no converter for names such as lora_prior_blocks_0_attn"):
        converted(source, tmp_path, adapter_format="diffusers")


# from a store


@pytest.mark.slow
def test_a_task_is_written_in_another_format_from_its_original_its_code_and_a_bundle(tmp_path: Path) -> None:
    for name in ("ants", "bees"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.safetensors").write_bytes(kohya_file("sd15").read_bytes())
    tensors = load_file(tmp_path / "in" / "bees.safetensors")
    save_file(
        {name: one if name.endswith("alpha") else -one for name, one in tensors.items()},
        tmp_path / "in" / "bees.safetensors",
        metadata=header(kohya_file("sd15")),
    )
    fleet = Fleet(tmp_path / "store")
    fleet.ingest([tmp_path / "in"])
    fleet.train(device="cpu", steps=2, refine=0, evaluate=False)
    out = tmp_path / "original.safetensors"
    report = fleet.materialize("ants", out, adapter_format="diffusers")
    assert (report.converted, report.adapter_format, report.squared_error) == (True, "diffusers", 0.0)
    assert header(out)["icm_task"] == "ants"
    assert_equal(dw_by_diffusers(kohya_file("sd15"), tiny_sd15()), dw_by_diffusers(out, tiny_sd15()))
    coded = tmp_path / "coded.safetensors"
    fleet.materialize("ants", coded, source="code", adapter_format="diffusers")
    assert load_file(coded).keys() == load_file(out).keys()
    bundle = Bundle(fleet.export_bundle(tmp_path / "fleet.icm").file)
    bundle.materialize("ants", tmp_path / "bundled.safetensors", adapter_format="diffusers")
    assert (tmp_path / "bundled.safetensors").read_bytes() == coded.read_bytes()
    assert header(coded)["icm_rung"] == "code"


def test_a_task_of_another_method_says_how_to_make_lora_of_it(tmp_path: Path) -> None:
    lycoris_file(tmp_path / "in" / "loha.safetensors", tiny_sd15().unet, algo="loha")
    fleet = Fleet(tmp_path / "store")
    fleet.ingest([tmp_path / "in"])
    with pytest.raises(AdapterRefused, match="LoHa") as refused:
        fleet.materialize("loha", tmp_path / "out.safetensors", adapter_format="kohya")
    assert "icm convert --rank" in (refused.value.hint or "")
