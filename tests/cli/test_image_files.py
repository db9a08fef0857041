"""A folder of image adapters in single files goes through the whole program."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import STEPS, icm_quietly
from tests.icmlora.formats.image_files import kohya_file
from tests.icmlora.formats.single_files import convolution, kohya, linear, write
from tests.rewriting import moved

Icm = Callable[..., Ran]
TRAIN = ("train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS)
KEY = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_k"
NOTES = {"ss_sd_model_name": "pony.safetensors", "ss_tag_frequency": '{"1": {"sks dog": 7, "grass": 2}}'}
NAMES = ("dog", "My Cat (v2)", "house")
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def adapter_file(folder: Path, name: str, seed: int, notes: dict[str, str] | None = None) -> Path:
    tensors = convolution(CONV) | kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", seed=seed)
    for block in range(2):
        stem = KEY.format(block)
        tensors |= linear(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", inputs=768, seed=seed + block)
        tensors |= {f"{stem}.alpha": torch.tensor(2.0)}
    return write(folder / f"{name}.safetensors", tensors, notes)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in loras/, and a store of them: three tasks with codes."""
    root = tmp_path_factory.mktemp("images")
    folder = root / "loras"
    for seed, name in enumerate(NAMES):
        adapter_file(folder, name, 100 * seed, NOTES)
        (folder / f"{name}.preview.png").write_bytes(name.encode())
    (folder / "dog.civitai.info").write_text("{}")
    icm_quietly(root / "store", "ingest", folder)
    icm_quietly(root / "store", *TRAIN)
    return root


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template / "loras", tmp_path / "loras"))


@pytest.fixture
def store(icm: Icm, template: Path, folder: Path, tmp_path: Path) -> Icm:
    """Three tasks with codes."""
    moved(Path(shutil.copytree(template / "store", tmp_path / "store")), template / "loras", folder)
    return icm


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_each_file_is_a_task_of_the_base_model_that_its_tensors_tell(icm: Icm, folder: Path) -> None:
    assert icm("ingest", folder).code == 0
    tasks = {task["name"]: task["base_model"] for task in icm("ls", "--json").document}
    assert tasks == dict.fromkeys(("dog", "house", "My-Cat-v2"), "stable-diffusion-v1")


def test_a_base_model_that_only_sizes_tell_is_said_to_be_a_guess(icm: Icm, folder: Path) -> None:
    ran = icm("ingest", folder)
    assert "guessed the base model from the tensor shapes: stable-diffusion-v1 for My-Cat-v2, dog, house" in ran.err
    assert "if that is wrong, run `icm ingest PATH --base-model NAME" in ran.err
    assert "guess" not in icm("ingest", folder).err  # the tasks have it already


def test_the_base_model_that_the_user_names_wins_over_the_adapters(icm: Icm, tmp_path: Path) -> None:
    stated = adapter_file(tmp_path / "loras", "dog", 0, {"ss_base_model_version": "sd_v1"})
    ran = icm("ingest", stated, "--base-model", "kolors")
    assert (ran.code, "guess" in ran.err) == (0, False)
    assert [task["base_model"] for task in icm("ls", "--json").document] == ["kolors"]
    assert icm("ingest", stated).code == 0
    assert [task["base_model"] for task in icm("ls", "--json").document] == ["kolors"]


def test_ingest_does_not_advise_vectors_for_image_models(icm: Icm, folder: Path) -> None:
    assert "vectors" not in icm("ingest", folder).err


def test_show_tells_what_the_trainer_noted(store: Icm) -> None:
    shown = store("show", "dog")
    assert "pony.safetensors" in shown.out
    assert "sks dog 7, grass 2" in shown.out
    assert store("show", "dog", "--json").document["header"] == NOTES


def test_hostile_text_in_a_header_is_escaped(icm: Icm, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "loras", "dog", 0, {"ss_sd_model_name": "\x1b[31mred", "\x1b": "\x1b"})
    assert icm("ingest", file).code == 0
    assert "\x1b" not in icm("show", "dog", "-v").out


@pytest.mark.one_case
@pytest.mark.parametrize("output", ["out", "other.safetensors"])
def test_an_original_comes_back_byte_for_byte_with_its_pictures(
    store: Icm, folder: Path, tmp_path: Path, output: str
) -> None:
    assert store("materialize", "My-Cat-v2", "-o", tmp_path / output).code == 0
    weights = tmp_path / output if output.endswith("s") else tmp_path / output / "My-Cat-v2.safetensors"
    assert weights.read_bytes() == (folder / "My Cat (v2).safetensors").read_bytes()
    assert weights.with_suffix(".preview.png").read_bytes() == b"My Cat (v2)"


def test_a_code_is_written_with_the_names_shapes_and_header_of_its_original(
    store: Icm, folder: Path, tmp_path: Path
) -> None:
    assert store("materialize", "dog", "-o", tmp_path / "x.safetensors", "--source", "code").code == 0
    written, original = load_file(tmp_path / "x.safetensors"), load_file(folder / "dog.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in original.items()
    }
    assert metadata_of(tmp_path / "x.safetensors") == NOTES


@pytest.mark.slow
def test_a_file_that_is_there_is_not_overwritten(store: Icm, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"mine")
    assert store("materialize", "dog", "-o", tmp_path / "x.safetensors").code != 0
    assert (tmp_path / "x.safetensors").read_bytes() == b"mine"


def test_a_placeholder_takes_the_place_of_a_file_and_its_pictures_and_restore_brings_them_back(
    store: Icm, folder: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert store("evict", "My-Cat-v2", "--placeholder", "--keep-originals").code == 0
    assert sorted(path.name for path in folder.glob("My Cat*")) == ["My Cat (v2).icm-placeholder.json"]
    assert store("restore", folder).code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_an_evicted_task_still_tells_its_header(store: Icm) -> None:
    assert store("evict", "dog", "--max-error", "10").code == 0
    assert store("show", "dog", "--json").document["header"] == NOTES


def test_a_bundle_carries_codes_headers_and_pictures(store: Icm, tmp_path: Path) -> None:
    assert store("export", tmp_path / "fleet.icm").code == 0
    out = tmp_path / "x.safetensors"
    assert store("materialize", "dog", "--from", tmp_path / "fleet.icm", "-o", out).code == 0
    assert metadata_of(out) == NOTES
    assert out.with_suffix(".preview.png").read_bytes() == b"dog"


def test_bad_files_are_refused_one_by_one_and_the_others_are_taken(icm: Icm, folder: Path) -> None:
    half = kohya(KEY.format(0))
    del half[f"{KEY.format(0)}.lora_up.weight"]
    write(folder / "half.safetensors", half)
    turned = {name: tensor.T.contiguous() for name, tensor in kohya(KEY.format(0), alpha=None).items()}
    write(folder / "turned.safetensors", turned)
    write(folder / "mixed.safetensors", kohya(KEY.format(0)) | linear("unet.q.lora_A.weight", "unet.q.lora_B.weight"))
    write(folder / "lost.safetensors", kohya(alpha=None), {"ss_network_dim": "4", "ss_network_alpha": "1"})
    (folder / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>")
    ran = icm("ingest", folder, "--json")
    assert ran.code == ExitCode.PARTLY
    refused = {Path(event["path"]).name: event["kind"] for event in ran.events if event["type"] == "problem"}
    assert refused == {
        "half.safetensors": "missing-half",
        "turned.safetensors": "shape",
        "mixed.safetensors": "two-namings",
        "lost.safetensors": "alpha",
        "page.safetensors": "damaged",
    }
    assert len(icm("ls", "--json").document) == len(NAMES)


def test_the_files_of_real_trainers_are_taken_and_come_back(icm: Icm, tmp_path: Path) -> None:
    names = ("sd15", "sd15-locon", "sdxl", "flux")
    assert icm("ingest", *map(kohya_file, names)).code == 0
    for name in names:
        out = tmp_path / f"{name}.safetensors"
        assert icm("materialize", name, "-o", out).code == 0
        assert out.read_bytes() == kohya_file(name).read_bytes()


@pytest.mark.slow
def test_training_says_that_image_models_are_looked_at_and_not_measured(icm: Icm, folder: Path) -> None:
    assert icm("ingest", folder).code == 0
    ran = icm("train", "--device", "cpu", "--steps", STEPS)
    assert ran.code == 0
    assert "stable-diffusion-v1 generates images; run `icm report --outputs TASK`" in ran.err
    assert "icm eval" not in ran.err
