"""The files have the names, shapes and statistics that they are said to have; the cuts are those of an SVD."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks.image_fleet.build import write_file, write_fleet
from tests.benchmarks.image_fleet.resize import cuts_of, error_of, fixed, real_error, resized
from tests.benchmarks.image_fleet.sdxl import Module, attention_modules, convolution_modules, text_modules
from tests.benchmarks.image_fleet.spectrum import FLAT, STEEP, Factors, measure
from tests.benchmarks.image_fleet.study import best_of, extrapolate, measure_codes, measure_store
from tests.cli.tiny_fleet import write_mixed_fleet

RANK = 8
SMALL = [(Module(f"lora_unet_middle_block_1_part_{part}", 192, 160), RANK) for part in range(60)]


def factors_of(path: Path) -> Factors:
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    names = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    return {
        name: (
            tensors[f"{name}.lora_down.weight"].flatten(1),
            tensors[f"{name}.lora_up.weight"].flatten(1) * float(tensors[f"{name}.alpha"]) / RANK,
        )
        for name in names
    }


def test_sdxl_has_the_modules_that_sd_scripts_trains() -> None:
    attention, text = attention_modules(), text_modules()
    assert (len(attention), len(text), len(convolution_modules())) == (722, 264, 66)
    assert len({module.name for module in [*attention, *text, *convolution_modules()]}) == 722 + 264 + 66
    shapes = {module.name: (module.outputs, module.inputs) for module in [*attention, *text]}
    assert shapes["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"] == (640, 640)
    assert shapes["lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k"] == (1280, 2048)
    assert shapes["lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_0_proj"] == (10240, 1280)
    assert shapes["lora_te2_text_model_encoder_layers_31_mlp_fc1"] == (5120, 1280)
    convolutions = {module.name: module for module in convolution_modules()}
    assert convolutions["lora_unet_input_blocks_3_0_op"] == Module("lora_unet_input_blocks_3_0_op", 320, 320, 3)
    assert convolutions["lora_unet_output_blocks_2_2_conv"].kernel == 3
    assert convolutions["lora_unet_middle_block_2_emb_layers_1"].kernel is None


@pytest.mark.parametrize("wanted", [STEEP, FLAT], ids=["steep", "flat"])
def test_a_fleet_has_the_statistics_that_were_measured(wanted: object, tmp_path: Path) -> None:
    assert wanted in (STEEP, FLAT)
    spectrum = STEEP if wanted is STEEP else FLAT
    paths = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for number, path in enumerate(paths):
        write_file(path, SMALL, number, spectrum=spectrum)
    found = measure([factors_of(path) for path in paths], list(combinations(range(6), 2)))
    # The fit of 8 singular values is that of the fleet; sorting moves it a little.
    assert found.decay == pytest.approx(spectrum.decay, abs=0.15)
    assert found.decay_spread == pytest.approx(spectrum.decay_spread, abs=0.1)
    assert found.scatter == pytest.approx(spectrum.scatter, abs=0.1)
    assert found.norm_spread == pytest.approx(spectrum.norm_spread, abs=0.06)
    assert found.cosine == pytest.approx(spectrum.cosine, abs=0.02)


def test_the_same_number_gives_the_same_adapter(tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "three"))
    for path, number in ((one, 3), (two, 3), (three, 4)):
        write_file(path, SMALL[:1], number)
    name = f"{SMALL[0][0].name}.lora_up.weight"
    assert torch.equal(load_file(one)[name], load_file(two)[name])
    assert not torch.equal(load_file(one)[name], load_file(three)[name])


@pytest.mark.slow
def test_every_fifth_file_of_a_fleet_has_convolutions(tmp_path: Path) -> None:
    paths = write_fleet(tmp_path, range(3, 5), rank=2)
    assert [path.name for path in paths] == ["style-0003.safetensors", "style-0004.safetensors"]
    plain, both = (load_file(path) for path in paths)
    assert (len(plain), len(both)) == (3 * 722, 3 * (722 + 66))
    assert both["lora_unet_input_blocks_3_0_op.lora_down.weight"].shape == (1, 320, 3, 3)
    assert both["lora_unet_input_blocks_3_0_op.lora_up.weight"].shape == (320, 1, 1, 1)


def test_cutting_to_a_rank_loses_what_its_singular_values_say(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_file(path, [(Module("lora_unet_a", 40, 30), 8), (Module("lora_unet_b", 20, 10, 3), 4)], 0)
    cuts = cuts_of(path)
    tensors = load_file(path)
    delta = tensors["lora_unet_a.lora_up.weight"].float() @ tensors["lora_unet_a.lora_down.weight"].float()
    values = torch.linalg.svdvals(delta)
    assert torch.allclose(cuts["lora_unet_a"].values, values, atol=1e-5)
    ranks = fixed(cuts, 2)
    kept = resized(cuts, ranks)
    assert kept["lora_unet_b.lora_down.weight"].shape == (2, 10, 3, 3)
    assert real_error(cuts, kept) == pytest.approx(error_of(cuts, ranks), rel=1e-3)
    assert real_error(cuts, resized(cuts, fixed(cuts, 8))) < 1e-3


def test_the_best_method_is_that_of_the_smallest_files() -> None:
    def figures(size: int) -> dict[str, float]:
        return {"bytes": size, "error": 0.25, "mean_rank": 2.0}

    found = {name: {"errors": {"0.3": {"fixed": figures(9), "sv_fro": figures(7)}}} for name in "ab"}
    assert best_of(found, "0.3")["best"] == "sv_fro"


def test_a_time_is_extrapolated_along_a_line_that_never_falls() -> None:
    assert extrapolate([25, 50], [1.0, 1.5]) == pytest.approx(1.5 + 0.02 * 950)
    assert extrapolate([25, 50], [1.5, 1.0]) == 1.0
    assert math.isfinite(extrapolate([1, 2], [0.0, 0.0]))


@pytest.mark.slow
def test_the_part_of_icm_runs_on_any_folder_of_adapters(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_mixed_fleet(first)
    (second / "silent").parent.mkdir()
    (first / "silent").rename(second / "silent")
    times = measure_store((first, second), tmp_path / "store")
    assert (times["tasks"], set(times["seconds"])) == (3, {"ingest", "ls", "stats"})
    codes = measure_codes(tmp_path / "store", 0.3, ["silent"], [0.5])
    assert 0 < codes["bytes_a_task"] < times["original_bytes_a_task"]
    assert codes["relative_error_worst"] <= 0.3
    assert codes["few"]["0.5"]["relative_error_worst"] <= 0.5
