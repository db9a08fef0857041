"""Loading a base model and checking that an adapter fits it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmlora.base_models.finding.fingerprint import fingerprint_base
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.running.modules import check_fits
from icmlora.errors import BaseModelMismatch, BaseModelNotFound
from tests.icmlora.tiny_base import LABEL, load_tiny_base, tiny_model, write_tiny_base

Q = "model.layers.0.self_attn.q_proj"


def test_a_loaded_model_has_the_weights_of_its_files(tmp_path: Path) -> None:
    base = load_tiny_base(tmp_path)
    expected = tiny_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in base.model.state_dict().items())


def test_a_loaded_model_tells_its_name_sizes_and_fingerprint(tmp_path: Path) -> None:
    base = load_tiny_base(tmp_path)
    assert (base.label, base.hidden_size, base.layers, base.dtype) == (LABEL, 32, 2, "float32")
    assert base.fingerprint == fingerprint_base(inspect_base(LABEL, tmp_path))


def test_a_known_fingerprint_is_not_computed_again(tmp_path: Path) -> None:
    found = inspect_base(LABEL, write_tiny_base(tmp_path))
    assert CausalLM().load(found, fingerprint="known").fingerprint == "known"


def test_a_loaded_model_is_ready_for_inference_only(tmp_path: Path) -> None:
    base = load_tiny_base(tmp_path)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_precision_can_be_chosen(tmp_path: Path) -> None:
    found = inspect_base(LABEL, write_tiny_base(tmp_path))
    assert CausalLM().load(found, dtype=torch.bfloat16).dtype == "bfloat16"


def test_loading_asks_no_network_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was touched")

    folder = write_tiny_base(tmp_path)
    capfd.readouterr()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    CausalLM().load(inspect_base(LABEL, folder))
    assert capfd.readouterr() == ("", "")


def test_weights_that_the_files_lack_are_not_made_up(tmp_path: Path) -> None:
    file = write_tiny_base(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{Q}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelNotFound, match="q_proj"):
        CausalLM().load(inspect_base(LABEL, tmp_path))


def test_damaged_weights_are_an_error_of_ours(tmp_path: Path) -> None:
    file = write_tiny_base(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BaseModelNotFound, match="cannot be loaded"):
        CausalLM().load(inspect_base(LABEL, tmp_path))


def test_code_in_the_folder_of_a_model_is_not_run(tmp_path: Path) -> None:
    config = write_tiny_base(tmp_path) / "config.json"
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
    content = json.loads(config.read_text()) | {"model_type": "evil"}
    content["auto_map"] = {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    config.write_text(json.dumps(content))
    with pytest.raises(BaseModelNotFound):
        CausalLM().load(inspect_base(LABEL, tmp_path))
    assert not canary.exists()


def test_a_model_without_tokenizer_is_an_error_of_ours(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(BaseModelNotFound, match="cannot be loaded"):
        CausalLM().load(inspect_base(LABEL, tmp_path))


def test_an_adapter_for_this_model_fits(tmp_path: Path) -> None:
    check_fits(load_tiny_base(tmp_path), [(Q, 2, 32, 32), ("model.layers.1.self_attn.v_proj", 4, 32, 16)])


def test_a_module_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMismatch, match=r"layers\.7\.self_attn\.q_proj' of the adapter does not exist"):
        check_fits(load_tiny_base(tmp_path), [(Q, 2, 32, 32), ("model.layers.7.self_attn.q_proj", 2, 32, 32)])


def test_a_module_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMismatch) as caught:
        check_fits(load_tiny_base(tmp_path), [(Q, 2, 64, 48)])
    assert Q in str(caught.value)
    assert "(48, 64)" in str(caught.value)
    assert "(32, 32)" in str(caught.value)


def test_a_module_that_is_no_linear_layer_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(BaseModelMismatch, match="is not a layer of base model "):
        check_fits(load_tiny_base(tmp_path), [("model.norm", 2, 32, 32)])
