"""Files that the real libraries wrote: icm reads in them what they do, and what icm writes, they read alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.format import AdapterFormat, Template
from tests.icmlora.formats.image_deltas import dw_by_diffusers, dw_of
from tests.icmlora.formats.image_files import (
    ai_toolkit_file,
    comfyui_file,
    diffusers_file,
    kohya_file,
    lycoris_file,
    wan_file,
    xlabs_file,
)
from tests.icmlora.formats.tiny_pipelines import image, tiny_flux, tiny_sd15, tiny_sdxl, tiny_wan_transformer

Deltas = dict[str, torch.Tensor]
Maker = Callable[[Path], Path]

BY_OWN_NAMES: dict[str, Maker] = {
    **{f"kohya-{name}": lambda folder, name=name: kohya_file(name) for name in ("sd15", "sd15-locon", "sdxl", "flux")},
    "lycoris": lambda folder: lycoris_file(folder / "x.safetensors", tiny_sd15().unet),
    "lycoris-tucker": lambda folder: lycoris_file(folder / "x.safetensors", tiny_sd15().unet, use_tucker=True),
    "lycoris-kohya": lambda folder: lycoris_file(folder / "x.safetensors", tiny_sd15().unet, prefix="lora_unet"),
}
BY_DIFFUSERS: dict[str, tuple[Maker, Callable[[], Any]]] = {
    **{
        f"{kind}-{names}": (lambda folder, make=make, names=names: diffusers_file(folder, make(), names=names), make)
        for kind, make in (("sd15", tiny_sd15), ("sdxl", tiny_sdxl))
        for names in ("peft", "lora", "processor")
    },
    "flux-peft": (lambda folder: diffusers_file(folder, tiny_flux()), tiny_flux),
    "flux-xlabs": (lambda folder: xlabs_file(folder / "x.safetensors"), tiny_flux),
    "flux-ai-toolkit": (lambda folder: ai_toolkit_file(folder / "x.safetensors", tiny_flux()), tiny_flux),
    "flux-comfyui": (lambda folder: comfyui_file(folder / "x.safetensors"), tiny_flux),
    "wan": (lambda folder: wan_file(folder / "x.safetensors"), tiny_wan_transformer),
    "wan-alpha": (lambda folder: wan_file(folder / "x.safetensors", alpha=2), tiny_wan_transformer),
}


def found_format(path: Path) -> AdapterFormat:
    (task,) = find_adapters([path]).tasks
    return task.final.format


def written(path: Path, folder: Path, **options: Any) -> Path:
    """Read a file, and write its adapter in its form."""
    form, data = found_format(path), path.read_bytes()
    summary, loaded = form.inspect(b"", data), form.read(b"", data)
    like = Template(b"", summary.layout, summary.dtype, summary.template)
    files = form.encode(loaded.adapter, card="", metadata={}, like=like, extras=loaded.extras, **options)
    out = folder / "written.safetensors"
    out.write_bytes(files.weights)
    return out


def assert_equal(one: Deltas, other: Deltas, *, tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, delta in one.items():
        assert float((other[name] - delta).norm()) <= tolerance * float(delta.norm()), name


@pytest.mark.parametrize("make", BY_OWN_NAMES.values(), ids=BY_OWN_NAMES)
def test_what_is_read_is_what_the_library_computes(make: Maker, tmp_path: Path) -> None:
    path = make(tmp_path)
    modules = found_format(path).read(b"", path.read_bytes()).adapter.modules
    ours = {module.name.replace(".", "_"): module.b @ module.a for module in modules}
    assert_equal({name: delta.flatten(1) for name, delta in dw_of(path).items()}, ours)


@pytest.mark.one_case
@pytest.mark.parametrize("make", BY_OWN_NAMES.values(), ids=BY_OWN_NAMES)
def test_what_is_written_is_read_by_the_library(make: Maker, tmp_path: Path) -> None:
    path = make(tmp_path)
    assert_equal(dw_of(path), dw_of(written(path, tmp_path, dtype="float32")))


@pytest.mark.one_case
@pytest.mark.parametrize(("make", "pipeline"), BY_DIFFUSERS.values(), ids=BY_DIFFUSERS)
def test_what_is_written_is_read_by_diffusers(make: Maker, pipeline: Callable[[], Any], tmp_path: Path) -> None:
    path = make(tmp_path)
    out = written(path, tmp_path, dtype="float32")
    assert_equal(dw_by_diffusers(path, pipeline()), dw_by_diffusers(out, pipeline()))


@pytest.mark.one_case
@pytest.mark.parametrize("name", ["sd15-peft", "sdxl-lora", "flux-xlabs", "flux-comfyui"])
def test_what_is_written_gives_the_same_image(name: str, tmp_path: Path) -> None:
    make, pipeline = BY_DIFFUSERS[name]
    path = make(tmp_path)
    base, one, other = pipeline(), pipeline(), pipeline()
    dw_by_diffusers(path, one)
    dw_by_diffusers(written(path, tmp_path, dtype="float32"), other)
    assert np.abs(image(one) - image(other)).max() <= 1 / 255
    assert np.abs(image(one) - image(base)).max() > 2 / 255


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    path = diffusers_file(tmp_path, tiny_sd15(), use_dora=True, text_encoders=False)
    one, other = tiny_sd15(), tiny_sd15()
    dw_by_diffusers(path, one)
    dw_by_diffusers(written(path, tmp_path, dtype="float32"), other)
    assert np.abs(image(one) - image(other)).max() <= 1 / 255


@pytest.mark.one_case
@pytest.mark.parametrize(("algo", "method"), [("loha", "LoHa"), ("lokr", "LoKr"), ("glora", "GLoRA"), ("boft", "OFT")])
def test_other_methods_of_lycoris_are_kept_as_they_are(algo: str, method: str, tmp_path: Path) -> None:
    path = lycoris_file(tmp_path / "x.safetensors", tiny_sd15().unet, algo=algo)
    summary = found_format(path).inspect(b"", path.read_bytes())
    assert summary.original_only is not None
    assert method in summary.original_only


def test_whole_differences_of_lycoris_have_no_code(tmp_path: Path) -> None:
    path = lycoris_file(tmp_path / "x.safetensors", tiny_sd15().unet, algo="full")
    assert found_format(path).inspect(b"", path.read_bytes()).original_only == "it has no LoRA factors"
