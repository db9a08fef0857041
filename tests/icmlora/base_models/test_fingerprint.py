"""The fingerprint of a base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from icmlora.base_models.finding.fingerprint import fingerprint_base, is_same_model
from icmlora.base_models.finding.lookup import FoundBase, inspect_base

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


def is_same(left: Path, right: Path, read: list[str]) -> bool:
    """Compare two folders; the names of those whose weights had to be read go into a list."""

    def listen(found: FoundBase) -> str:
        read.append(found.path.name)
        return fingerprint_base(found)

    return is_same_model(inspect_base("any", left), inspect_base("any", right), listen)


@pytest.mark.parametrize(
    ("weights", "changes", "same", "read"),
    [
        (b"weights", {"dtype": "bfloat16"}, True, ["a", "b"]),
        (b"Weights", {}, False, ["a", "b"]),
        (b"more weights", {}, False, []),
        (b"weights", {"hidden_size": 64}, False, []),
    ],
)
def test_weights_are_read_only_where_sizes_and_architecture_do_not_tell(
    tmp_path: Path, weights: bytes, changes: dict[str, object], same: bool, read: list[str]
) -> None:
    fingerprint(tmp_path / "a")
    fingerprint(tmp_path / "b", weights, **changes)
    seen: list[str] = []
    assert is_same(tmp_path / "a", tmp_path / "b", seen) is same
    assert seen == read


def test_a_link_to_a_model_is_that_model(tmp_path: Path) -> None:
    fingerprint(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    seen: list[str] = []
    assert is_same(tmp_path / "a", tmp_path / "b", seen)
    assert seen == []
