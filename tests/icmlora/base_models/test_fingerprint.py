"""The fingerprint of a base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from icmlora.base_models.fingerprint import fingerprint_base
from icmlora.base_models.lookup import inspect_base

CONFIG: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 32,
    "transformers_version": "5.0",
    "dtype": "float32",
}


def fingerprint(folder: Path, weights: bytes = b"weights", **changes: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "model.safetensors").write_bytes(weights)
    return fingerprint_base(inspect_base("any", folder))


def test_copies_of_a_model_have_one_fingerprint(tmp_path: Path) -> None:
    first = fingerprint(tmp_path / "a")
    assert first == fingerprint(tmp_path / "b")
    assert len(first) == 64


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b", b"Weights")


def test_another_architecture_has_another_fingerprint(tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b", rope_theta=10000.0)


@pytest.mark.parametrize(
    "change",
    [{"transformers_version": "6.0"}, {"torch_dtype": "bfloat16"}, {"_name_or_path": "x"}, {"pad_token_id": 3}],
)
def test_what_saving_rewrites_does_not_change_it(tmp_path: Path, change: dict[str, object]) -> None:
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b", **change)


def test_the_names_of_shards_do_not_change_it(tmp_path: Path) -> None:
    prints = []
    for names in (["a", "b"], ["z", "y"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for name, data in zip(names, (b"one", b"two"), strict=True):
            (folder / name).write_bytes(data)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
        prints.append(fingerprint_base(inspect_base("any", folder)))
    assert prints[0] == prints[1]


def test_a_gguf_file_is_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF 1")
    first = fingerprint_base(inspect_base("any", file))
    file.write_bytes(b"GGUF 2")
    assert fingerprint_base(inspect_base("any", file)) != first
