"""Base models in GGUF files."""

from __future__ import annotations

import stat
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.load import convert_gguf
from icmlora.errors import BaseModelNotFound, OutputExists
from tests.icmlora.base_models.chat_templates import QWEN
from tests.icmlora.tiny_base import HIDDEN, LABEL, tiny_model

# From the names of the network to those of llama.cpp, for one layer.
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a query or key projection as llama.cpp wants them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_tiny_gguf(file: Path, chat_template: str | None = None) -> Path:
    """Write the tiny model with unquantised weights and a byte-level vocabulary."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(257)
    tokens = ["ab", *sorted(pre_tokenizers.ByteLevel.alphabet())]  # a vocabulary of this kind needs one merge
    writer.add_tokenizer_model("gpt2")
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    weights = {name: value.numpy() for name, value in tiny_model().state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(2):
        for ours, theirs in LAYER_NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            weight = interleave(weight, heads) if heads else weight
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    return convert_gguf(file, file.parent / "made" / "base", label=LABEL)


def test_the_folder_holds_the_weights_of_the_file(folder: Path) -> None:
    base = CausalLM().load(inspect_base(LABEL, folder))
    expected = tiny_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in base.model.state_dict().items())


def test_the_folder_holds_the_vocabulary_of_the_file(folder: Path) -> None:
    tokenizer = CausalLM().load(inspect_base(LABEL, folder)).tokenizer
    assert tokenizer.decode(tokenizer("plain text")["input_ids"]) == "plain text"


def test_a_gguf_file_can_be_loaded_without_converting_it(file: Path, folder: Path) -> None:
    direct = CausalLM().load(inspect_base(LABEL, file))
    converted = CausalLM().load(inspect_base(LABEL, folder))
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(direct.model(ids).logits, converted.model(ids).logits)


def test_nothing_but_the_folder_is_left_and_others_may_read_it(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir()] == ["base"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_what_a_killed_conversion_left_is_removed_by_the_next(file: Path, tmp_path: Path) -> None:
    left = tmp_path / "base.icm-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    convert_gguf(file, tmp_path / "base", label=LABEL)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_folder_that_is_not_empty_is_left_alone(file: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists):
        convert_gguf(file, tmp_path, label=LABEL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_file_is_an_error_that_leaves_nothing(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:500])
    with pytest.raises(BaseModelNotFound, match="cannot be loaded"):
        convert_gguf(damaged, tmp_path / "out", label=LABEL)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.gguf"]


def test_the_chat_template_of_a_gguf_file_survives_its_conversion(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", QWEN)
    base = CausalLM().load(inspect_base(LABEL, convert_gguf(file, tmp_path / "folder", label=LABEL)))
    assert base.tokenizer.chat_template == QWEN
