"""Diffusers pipelines on disk: found, told apart, refused where they would run code, and drawn with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.finding.lookup import PIPELINE, FoundBase, find_base_model, inspect_base
from icmlora.base_models.running.pipeline import Drawing, Pipeline, Pixels, rmse
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, DataError
from tests.icmlora.formats.image_files import kohya_file, lycoris_file
from tests.icmlora.formats.tiny_pipelines import PROMPT, image, tiny_sd15

LABEL = "stable-diffusion-v1"
HOW = Drawing(steps=2, seeds=2, size=32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline on disk, not to be changed."""
    path = tmp_path_factory.mktemp("pipeline") / "sd15"
    tiny_sd15().save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline(inspect_base(LABEL, folder), CPU)


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> Callable[..., FoundBase]:
    """Return a function that changes the index of a copy of the pipeline."""

    def change(**fields: object) -> FoundBase:
        copy = tmp_path / "copy"
        copy.mkdir()
        for entry in folder.iterdir():
            (copy / entry.name).symlink_to(entry)
        (copy / PIPELINE).unlink()
        (copy / PIPELINE).write_text(json.dumps(json.loads((folder / PIPELINE).read_text()) | fields))
        return inspect_base(LABEL, copy)

    return change


def drawn(pipeline: Pipeline, seed: int = 0) -> Pixels:
    return pipeline.draw(PROMPT, seed, HOW)


def test_a_folder_with_an_index_is_a_pipeline_with_the_weights_of_all_parts(folder: Path) -> None:
    found = inspect_base(LABEL, folder)
    assert (found.is_pipeline, found.has_config) == (True, False)
    assert {file.parent.name for file in found.weights} == {"unet", "vae", "text_encoder"}


def test_a_pipeline_is_found_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--maker--paint" / "snapshots" / ("0" * 40)
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (snapshot / PIPELINE).write_text("{}")
    (tmp_path / "models--maker--paint" / "refs").mkdir()
    (tmp_path / "models--maker--paint" / "refs" / "main").write_text("0" * 40)
    assert find_base_model("maker/paint", cache_dir=tmp_path).is_pipeline


def test_what_runs_a_network_on_examples_says_what_a_pipeline_is(folder: Path) -> None:
    with pytest.raises(BaseModelUnsuited, match="a diffusers pipeline, which icm uses only to generate images"):
        modality_of(inspect_base(LABEL, folder))


def test_a_part_with_pickled_weights_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / PIPELINE).write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BaseModelNotFound, match="its part 'unet' has only pickled weights"):
        inspect_base(LABEL, tmp_path)


@pytest.mark.parametrize("named", [["os", "system"], ["my_unet", "Unet"], [["a"], "b"], ["unet", "Unet"]])
def test_a_part_of_another_library_is_not_loaded(index: Callable[..., FoundBase], named: list[Any]) -> None:
    with pytest.raises(BaseModelUnsuited, match="its part 'unet' comes from"):
        Pipeline(index(unet=named), CPU)


@pytest.mark.parametrize("named", ["Mine", ["mine", "Pipeline"], "UNet2DModel", None])
def test_a_pipeline_that_diffusers_does_not_have_is_not_loaded(index: Callable[..., FoundBase], named: object) -> None:
    with pytest.raises(BaseModelUnsuited, match="diffusers has no pipeline"):
        Pipeline(index(_class_name=named), CPU)


def test_another_kind_of_base_model_draws_nothing(folder: Path) -> None:
    with pytest.raises(BaseModelUnsuited, match="is not a diffusers pipeline"):
        Pipeline(FoundBase(LABEL, folder, ()), CPU)


def test_without_diffusers_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(DataError, match="diffusers, which is not installed") as caught:
        Pipeline(inspect_base(LABEL, folder), CPU)
    assert "icm-lora[diffusion]" in str(caught.value.hint)


def test_it_draws_what_diffusers_draws(pipeline: Pipeline) -> None:
    assert rmse(drawn(pipeline), np.rint(image(tiny_sd15()) * 255).astype(np.uint8)) == 0


@pytest.mark.slow
def test_an_adapter_is_loaded_for_a_while(pipeline: Pipeline) -> None:
    before, direct = drawn(pipeline), tiny_sd15()
    direct.load_lora_weights(kohya_file("sd15"))
    with pipeline.adapted(kohya_file("sd15")):
        assert rmse(drawn(pipeline), np.rint(image(direct) * 255).astype(np.uint8)) == 0
    assert rmse(drawn(pipeline), before) == 0


@pytest.mark.slow
def test_the_norm_of_what_is_loaded_shows_what_is_passed_over(pipeline: Pipeline, tmp_path: Path) -> None:
    tensors = load_file(kohya_file("sd15"))
    half = {name: value for name, value in tensors.items() if "_up_blocks_" not in name}
    save_file(half, tmp_path / "half.safetensors")
    with pipeline.adapted(kohya_file("sd15")) as whole:
        pass
    with pipeline.adapted(tmp_path / "half.safetensors") as part:
        pass
    assert 0 < part < whole


@pytest.mark.one_case
@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_a_method_that_diffusers_does_not_know_is_refused_and_leaves_nothing(
    pipeline: Pipeline, tmp_path: Path, algo: str
) -> None:
    before = drawn(pipeline)
    path = lycoris_file(tmp_path / "file.safetensors", tiny_sd15().unet, algo=algo)
    with pytest.raises(DataError, match="diffusers cannot load it"), pipeline.adapted(path):
        pass
    assert rmse(drawn(pipeline), before) == 0


def test_a_picture_that_the_safety_checker_took_away_is_not_shown(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pipeline._pipe.run_safety_checker
    monkeypatch.setattr(pipeline._pipe, "run_safety_checker", lambda picture, *rest: (run(picture, *rest)[0], [True]))
    with pytest.raises(DataError, match="safety checker"):
        drawn(pipeline)


def test_a_picture_is_as_far_from_its_negative_as_can_be() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert (rmse(black, black), rmse(black, black + 255), rmse(black + 255, black)) == (0, 1, 1)
