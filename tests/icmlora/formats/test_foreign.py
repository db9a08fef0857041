"""Adapters in other forms, and files that are no adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.discovery.discovery import find_adapters, no_adapter
from icmlora.formats.weights import read_weights
from tests.icmlora.adapter_files import config, write_adapter
from tests.icmlora.formats.single_files import kohya, write

GGUF_ADAPTER = b"GGUF" + b"\0" * 20 + b"general.type" + b"\x08\0\0\0" + b"\x07\0\0\0\0\0\0\0" + b"adapter"


def kinds(folder: Path) -> list[str]:
    discovery = find_adapters([folder])
    assert discovery.tasks == ()
    return [error.kind for error in discovery.refused]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adapter_model.bin", "pickle"),
        ("adapter_model.pt", "pickle"),
        ("pytorch_lora_weights.bin", "pickle"),
        ("lora.ckpt", "pickle"),
        ("model.nemo", "pickle"),
        ("lit_model.pth.lora", "pickle"),
        ("adapters.safetensors", "mlx"),
        ("0000100_adapters.safetensors", "mlx"),
        ("pytorch_lora_weights.safetensors", "diffusers"),
        ("adapter_model-00001-of-00002.safetensors", "shards"),
        ("adapter_model.safetensors.index.json", "shards"),
        ("adapter_model.safetensors", "bare"),
        ("latest_checkpointed_iteration.txt", "megatron"),
    ],
)
def test_another_form_is_recognised_by_name(tmp_path: Path, name: str, kind: str) -> None:
    save_file({"model.layers.0.q.lora_a": torch.ones(1)}, tmp_path / name)
    assert kinds(tmp_path) == [kind]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("blocks.0.x.lora_down.weight", "kohya"),
        ("base_model.model.x.lora_A.weight", "bare"),
        ("model.layers.0.q.lora_a", "mlx"),
        ("diffusion_model.blocks.0.attn.diff", "diff"),
    ],
)
def test_another_form_is_recognised_by_its_keys(tmp_path: Path, key: str, kind: str) -> None:
    save_file({key: torch.ones(1)}, tmp_path / "style.safetensors")
    assert kinds(tmp_path) == [kind]


def test_a_gguf_adapter_is_recognised_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(GGUF_ADAPTER)
    (tmp_path / "b.gguf").write_bytes(GGUF_ADAPTER.replace(b"adapter", b"mmproj."))
    (task,) = find_adapters([tmp_path]).tasks
    assert (task.name, task.final.format.name) == ("a", "gguf")


def test_a_pickle_is_unsafe_and_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(b"\x80\x02")
    path.chmod(0)
    (refused,) = find_adapters([tmp_path]).refused
    assert isinstance(refused, UnsafeInput)


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "scaler.pt",
        "pytorch_model-00001.bin",
        "model.safetensors",
        "tokenizer.json",
        "base.gguf",
    ],
)
def test_a_trainers_state_and_whole_models_are_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x" * 20)
    assert kinds(tmp_path) == []


def test_a_safetensors_file_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"<!DOCTYPE html> not found")
    (task,) = find_adapters([tmp_path]).tasks
    with pytest.raises(AdapterRefused, match="a web page"):
        task.final.format.inspect(b"", task.final.weights.read_bytes())


NO_ADAPTERS = {
    "emb_params": "a textual inversion embedding",
    "clip_l": "a textual inversion embedding",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "model.diffusion_model.input_blocks.0.weight": "a whole model",
    "anything": "tensors of an unknown kind of adapter",
}


@pytest.mark.parametrize("key", NO_ADAPTERS)
def test_a_file_that_is_no_adapter_is_named_where_it_is_given_or_alone(tmp_path: Path, key: str) -> None:
    file = tmp_path / "some.safetensors"
    save_file({key: torch.ones(1)}, file)
    (refused,) = find_adapters([file]).refused
    assert (refused.message, refused.path) == (NO_ADAPTERS[key], str(file))
    assert no_adapter([tmp_path]).message == f"no adapter was found: this is {NO_ADAPTERS[key]}"
    assert kinds(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("loras.zip", b"PK\x03\x04rest", "a ZIP archive"),
        ("lora.pt", b"PK\x03\x04rest", "a pickle can run code"),
        ("weights.pt", b"\x80\x02rest", "a pickle can run code"),
        ("._dog.safetensors", b"\0\5\x16\7", "a macOS metadata file"),
        ("notes.txt", b"text", "not an adapter file"),
        ("zeros.safetensors", bytes(99), "does not start with '{'"),
    ],
)
def test_a_file_that_is_given_by_itself_is_named(tmp_path: Path, name: str, content: bytes, fact: str) -> None:
    (tmp_path / name).write_bytes(content)
    found = find_adapters([tmp_path / name])
    errors = list(found.refused)
    for task in found.tasks:  # a damaged file may be an adapter, and reading it says more
        with pytest.raises(AdapterRefused) as caught:
            read_weights(task.final.weights, task.final.format)
        errors.append(caught.value)
    assert [fact in error.message for error in errors] == [True]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_part_of_a_folder_says_which_folder(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "rust")
    (refused,) = find_adapters([tmp_path / "rust" / name]).refused
    assert refused.hint == f"specify the folder {tmp_path / 'rust'}"


def test_an_ending_may_be_in_capitals(tmp_path: Path) -> None:
    write(tmp_path / "DOG.SAFETENSORS", kohya())
    write(tmp_path / "cat.safetensors", kohya(seed=1))
    write(tmp_path / "cat.SafeTensors", kohya(seed=2))
    assert [task.name for task in find_adapters([tmp_path]).tasks] == ["DOG", "cat", "cat.SafeTensors"]
    assert [task.name for task in find_adapters([tmp_path / "DOG.SAFETENSORS"]).tasks] == ["DOG"]


def test_notes_of_macos_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "dog.safetensors", kohya())
    (tmp_path / "._dog.safetensors").write_bytes(b"\0\5\x16\7" + bytes(80))
    discovery = find_adapters([tmp_path])
    assert ([task.name for task in discovery.tasks], discovery.refused) == (["dog"], ())


def test_a_tracker_of_experiments_keeps_configurations_without_weights(tmp_path: Path) -> None:
    files = tmp_path / "wandb" / "run-1" / "files"
    files.mkdir(parents=True)
    (files / "adapter_config.json").write_bytes(config())
    assert kinds(tmp_path) == []


def test_a_pickle_beside_the_safetensors_does_not_matter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "rust")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    discovery = find_adapters([tmp_path])
    assert (len(discovery.tasks), discovery.refused) == (1, ())


def test_a_configuration_without_weights_is_reported(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(config())
    assert kinds(tmp_path) == ["no-weights"]


def test_a_configuration_with_a_pickle_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(config())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert kinds(tmp_path) == ["pickle"]


def test_every_refusal_says_what_to_do(tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "adapters.safetensors", "lit_model.pth.lora", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert all(error.hint for error in find_adapters([tmp_path]).refused)
