"""LoHa, LoKr and whole differences as LoRA: against what LyCORIS' own network computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn
from torch.nn import functional as F

from icmlora import AdapterRefused, convert
from icmlora.fleet.convert.convert import AdapterConverted
from icmlora.formats.images.lycoris_lora import low_rank
from tests.icmlora.formats.image_deltas import dw_by_diffusers
from tests.icmlora.formats.image_files import lycoris_file
from tests.icmlora.formats.tiny_pipelines import image, tiny_sd15

METHODS: dict[str, dict[str, Any]] = {
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr"},
    "lokr-factor": {"algo": "lokr", "factor": 4},
    "lokr-both": {"algo": "lokr", "factor": 8, "decompose_both": True, "rank": 1},
    "lokr-tucker": {"algo": "lokr", "use_tucker": True, "factor": 4},
    "lokr-full": {"algo": "lokr", "full_matrix": True},
    "full": {"algo": "full"},
}
WHOLE = 4096
"""A rank above that of every module: nothing is cut."""


def trained(path: Path, **options: Any) -> tuple[Path, nn.Module, nn.Module]:
    """Return a file for the attention and convolutions of a UNet, the UNet, and the one with LyCORIS' network in it."""
    plain, changed = tiny_sd15().unet, tiny_sd15().unet
    prefix = "lycoris" if options["algo"] == "full" else "lora_unet"
    lycoris_file(path, changed, dtype=torch.float32, prefix=prefix, **options)
    header = {"ss_base_model_version": "sd_v1", "ss_network_dim": "4", "ss_network_alpha": "2"}
    tensors = {name: one for name, one in load_file(path).items() if not name.endswith("diff_b")}
    save_file(tensors, path, metadata=header)
    return path, plain, changed


def converted(file: Path, target: str, rank: int) -> tuple[Path, AdapterConverted]:
    out = file.with_name(f"{target}.safetensors")
    (done,) = convert(file, out, adapter_format=target, rank=rank, dtype="float32").done
    return out, done


@pytest.mark.one_case
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_dw_is_what_the_network_adds_to_each_layer(options: dict[str, Any], tmp_path: Path) -> None:
    file, plain, changed = trained(tmp_path / "x.safetensors", **options)
    is_full = options["algo"] == "full"  # whose biases are not in the file
    out, done = converted(file, "diffusers", WHOLE)
    assert done.relative_error < 1e-5
    deltas = {name.removeprefix("unet."): delta for name, delta in dw_by_diffusers(out, tiny_sd15()).items()}
    assert len(deltas) == len({name.partition(".")[0] for name in load_file(file)})
    for name, delta in deltas.items():
        layer, other = plain.get_submodule(name), changed.get_submodule(name)
        x = torch.randn(2, delta.shape[1], *(4,) * (delta.dim() - 2))
        added = other(x) - layer(x)
        if is_full:
            zero = torch.zeros_like(x)
            added -= other(zero) - layer(zero)
        if isinstance(layer, nn.Conv2d):
            wanted = F.conv2d(x, delta, stride=layer.stride, padding=layer.padding)
        else:
            wanted = F.linear(x, delta)
        assert float((added - wanted).norm()) <= 1e-4 * float(wanted.norm()), name


@pytest.mark.one_case
@pytest.mark.parametrize("target", ["kohya", "diffusers", "lycoris"])
@pytest.mark.parametrize("name", ["loha", "lokr-factor"])
def test_a_rank_costs_what_it_says(name: str, target: str, tmp_path: Path) -> None:
    file, *_ = trained(tmp_path / "x.safetensors", **METHODS[name])
    whole, small = low_rank(file.read_bytes(), WHOLE), low_rank(file.read_bytes(), 4)
    _, done = converted(file, target, 4)
    before, after = load(whole.weights), load(small.weights)
    error = sum(float((after[key] - before[key]).square().sum()) for key in before)
    norm = sum(float(delta.square().sum()) for delta in before.values())
    assert done.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-4)
    assert done.rank == 4
    assert done.kinds is not None
    assert set(done.kinds) == {"attention", "convolution", "feed_forward"}
    assert min(done.kinds.values()) <= done.relative_error <= max(done.kinds.values())


def load(weights: bytes) -> dict[str, torch.Tensor]:
    """Return dW of each module of a LoCon file."""
    from safetensors.torch import load

    tensors = load(weights)
    stems = {name.partition(".")[0] for name in tensors}
    return {
        stem: tensors[f"{stem}.lora_up.weight"].flatten(1) @ tensors[f"{stem}.lora_down.weight"].flatten(1)
        for stem in stems
    }


@pytest.mark.slow
def test_a_higher_rank_is_never_worse(tmp_path: Path) -> None:
    file, *_ = trained(tmp_path / "x.safetensors", algo="loha")
    errors = [sum(error for error, _ in low_rank(file.read_bytes(), rank).errors.values()) for rank in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_the_image_of_a_high_rank_is_that_of_the_network(tmp_path: Path) -> None:
    pipeline, other = tiny_sd15(), tiny_sd15()
    file, _, pipeline.unet = trained(tmp_path / "x.safetensors", algo="lokr", factor=4)
    out, _ = converted(file, "diffusers", WHOLE)
    dw_by_diffusers(out, other)
    assert np.abs(image(pipeline) - image(other)).max() <= 1 / 255
    assert np.abs(image(tiny_sd15()) - image(other)).max() > 2 / 255


@pytest.mark.slow
def test_large_modules_are_decomposed_almost_exactly_and_always_alike() -> None:
    random = torch.Generator().manual_seed(0)
    factors = {f"hada_w{n}_a": torch.randn(1200, 4, generator=random) for n in "12"}
    factors |= {f"hada_w{n}_b": torch.randn(4, 1000, generator=random) for n in "12"}
    weights = save({f"lycoris_mid_block_a.{name}": one for name, one in factors.items()})
    torch.manual_seed(1)
    one = low_rank(weights, 8)
    torch.manual_seed(2)
    assert low_rank(weights, 8).weights == one.weights
    delta = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    best = float(torch.linalg.svdvals(delta)[8:].square().sum())
    ((error, _),) = one.errors.values()
    assert error <= 1.001 * best


def test_the_random_numbers_of_others_are_left_alone() -> None:
    weights = save({"lycoris_mid_block_a.diff": torch.randn(700, 600)})
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    low_rank(weights, 2)
    assert torch.equal(torch.rand(3), wanted)


def test_the_header_is_that_of_lora_then(tmp_path: Path) -> None:
    file, *_ = trained(tmp_path / "x.safetensors", algo="loha")
    out, _ = converted(file, "kohya", 4)
    with safe_open(out, framework="pt") as after:
        found = after.metadata()
    assert {name: found[f"ss_network_{name}"] for name in ("module", "dim", "alpha")} == {
        "module": "networks.lora",
        "dim": "4",
        "alpha": "4",
    }
    assert found["ss_base_model_version"] == "sd_v1"


def test_lokr_with_dotted_names_becomes_the_same_lora_as_with_flattened_ones(tmp_path: Path) -> None:
    module, made = "layers.0.attention.to_q", {}
    parts = {"lokr_w1": torch.randn(2, 3), "lokr_w2": torch.randn(4, 5), "alpha": torch.tensor(1.0)}
    stems = {"comfyui": f"diffusion_model.{module}", "lycoris": f"lora_unet_{module.replace('.', '_')}"}
    for form, stem in stems.items():
        source, out = tmp_path / f"{form}.safetensors", tmp_path / f"{form}-lora.safetensors"
        save_file({f"{stem}.{part}": one for part, one in parts.items()}, source)
        (done,) = convert(source, out, rank=8, dtype="float32").done
        assert (done.format, done.relative_error < 1e-6) == (form, True)
        made[form] = {name.removeprefix(stem): one for name, one in load_file(out).items()}
    assert made["comfyui"].keys() == made["lycoris"].keys()
    assert all(torch.equal(one, made["lycoris"][name]) for name, one in made["comfyui"].items())
    out, _ = converted(tmp_path / "comfyui.safetensors", "diffusers", 8)
    assert set(load_file(out)) == {f"transformer.{module}.lora_{half}.weight" for half in "AB"}


def test_what_a_dotted_lokr_cannot_become_names_what_it_can(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"diffusion_model.layers.0.attention.to_q.lokr_w1": torch.ones(2, 3)}, file)
    with pytest.raises(AdapterRefused, match="comfyui to kohya") as refused:
        converted(file, "kohya", 8)
    assert refused.value.hint == "it can be converted to diffusers"


# what is refused


def test_without_a_rank_it_is_asked_for(tmp_path: Path) -> None:
    file, *_ = trained(tmp_path / "x.safetensors", algo="loha")
    with pytest.raises(AdapterRefused, match="LoHa") as refused:
        convert(file, tmp_path / "out.safetensors", adapter_format="kohya")
    assert "--rank 16" in (refused.value.hint or "")


@pytest.mark.parametrize(("algo", "method"), [("glora", "GLoRA"), ("boft", "OFT"), ("diag-oft", "OFT")])
def test_what_needs_the_base_model_is_refused_by_name(algo: str, method: str, tmp_path: Path) -> None:
    file = lycoris_file(tmp_path / "x.safetensors", tiny_sd15().unet, algo=algo)
    with pytest.raises(
        AdapterRefused, match=f"belongs to {method}, and computing its dW needs the base model's weights"
    ):
        convert(file, tmp_path / "out.safetensors", adapter_format="kohya", rank=4)


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    file = lycoris_file(tmp_path / "x.safetensors", tiny_sd15().unet, algo="loha", dora_wd=True)
    with pytest.raises(AdapterRefused, match="dora_scale belongs to DoRA"):
        convert(file, tmp_path / "out.safetensors", adapter_format="kohya", rank=4)


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"a.diff": torch.ones(2, 3), "a.diff_b": torch.ones(2)}, "extras"),
        ({"a.diff": torch.ones(2)}, "shape"),
        ({"a.diff": torch.full((2, 3), float("nan"))}, "non-finite"),
        ({"a.hada_w1_a": torch.ones(2, 3)}, "shape"),
        ({"a.lokr_w1": torch.ones(2, 3)}, "shape"),
        ({"a.lokr_w1": torch.ones(2000, 2000), "a.lokr_w2": torch.ones(100, 100)}, "limits"),
        ({"a.something": torch.ones(2, 3)}, "extras"),
        ({"a.diff": torch.ones(2, 3).int()}, "dtype"),
        ({"a.diff": torch.ones(2, 3), "a.alpha": torch.ones(2)}, "alpha"),
    ],
)
def test_a_damaged_or_unknown_part_is_refused(tensors: dict[str, torch.Tensor], kind: str) -> None:
    with pytest.raises(AdapterRefused) as refused:
        low_rank(save(tensors), 4)
    assert refused.value.kind == kind


def test_an_alpha_may_be_a_whole_number() -> None:
    factors = {f"a.hada_w{n}_{half}": torch.ones(2, 2) for n in "12" for half in "ab"}
    ((_, one),) = low_rank(save(factors), 2).errors.values()
    ((_, half),) = low_rank(save(factors | {"a.alpha": torch.tensor(1)}), 2).errors.values()
    assert half == pytest.approx(one / 4)


def test_a_file_that_needs_no_change_keeps_its_bytes(tmp_path: Path) -> None:
    file, *_ = trained(tmp_path / "x.safetensors", algo="loha")
    convert(file, tmp_path / "out.safetensors", adapter_format="lycoris")
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()


def test_a_bias_that_does_nothing_is_no_reason() -> None:
    assert low_rank(save({"a.diff": torch.ones(2, 3), "a.diff_b": torch.zeros(2)}), 4).errors.keys() == {"a"}
