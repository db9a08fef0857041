"""Which base models are causal language models, how much they read, and where their hidden states are."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.examples.examples import plain
from icmlora.base_models.finding.lookup import FoundBase, inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelUnsuited
from icmlora.task_vectors.extraction import extract_context
from tests.icmlora.tiny_base import LABEL, tiny_tokenizer

LONG = "x" * 400
SMALL = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def found_with(folder: Path, **config: object) -> FoundBase:
    (folder / "config.json").write_text(json.dumps(config))
    return FoundBase(LABEL, folder, ())


def load(model: Any, folder: Path) -> BaseModel:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return CausalLM().load(inspect_base(LABEL, folder))


class TestSuits:
    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            {"model_type": "llama"},
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True},
            {"model_type": "bart", "architectures": ["BartForCausalLM"], "is_decoder": True},
            {"model_type": "a-kind-of-tomorrow", "architectures": ["TomorrowModel"]},
        ],
    )
    def test_a_causal_language_model_suits_and_an_unknown_kind_is_left_to_the_loader(
        self, tmp_path: Path, config: dict[str, object]
    ) -> None:
        assert isinstance(modality_of(found_with(tmp_path, **config)), CausalLM)

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": False},
            {"model_type": "roberta"},
            {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"]},
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True},
            {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            {"model_type": "qwen3", "architectures": ["Qwen3Model"]},
        ],
    )
    def test_a_model_that_sees_the_next_token_or_has_no_such_loss_does_not(
        self, tmp_path: Path, config: dict[str, object]
    ) -> None:
        found = None
        with suppress(BaseModelUnsuited):
            found = modality_of(found_with(tmp_path, **config))
        assert not isinstance(found, CausalLM)


class TestPositions:
    @pytest.mark.parametrize(
        ("model", "positions"),
        [
            (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=4)), 48),
            (lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=40)), 40),
            (
                lambda: RobertaForCausalLM(
                    RobertaConfig(**SMALL, intermediate_size=48, max_position_embeddings=34, is_decoder=True)
                ),
                32,
            ),
        ],
        ids=["gpt2", "opt", "roberta"],
    )
    def test_a_model_with_few_learned_positions_reads_no_more_than_it_can(
        self, tmp_path: Path, model: Any, positions: int
    ) -> None:
        base = load(model(), tmp_path)
        assert base.positions == positions
        texts = plain([LONG] * 3)
        modality = base.modality
        assert modality.states(base, texts, 512).shape == (3, 32)
        assert modality.context_state(base, texts, 512).shape == (32,)
        assert modality.measure(base, texts, 512).count == 3 * (positions - 1)
        assert [item.size for item in modality.prepare(base, texts, 192)] == [positions] * 3

    def test_the_extractor_says_how_much_was_read(self, tmp_path: Path) -> None:
        base = load(
            GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=4)), tmp_path
        )
        vector = extract_context(base, plain([LONG] * 8))[0]
        assert (vector.extractor.settings.sample_tokens, vector.extractor.settings.context_tokens) == (48, 48)

    def test_a_configuration_without_a_limit_gives_none(self, tmp_path: Path) -> None:
        from transformers import MambaConfig, MambaForCausalLM

        mamba = MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, state_size=4))
        assert load(mamba, tmp_path).positions is None


def test_the_hidden_states_of_llama_4_are_what_its_head_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 48, "intermediate_size_mlp": 48, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 128}
    base = load(Llama4ForCausalLM(Llama4TextConfig(**SMALL, **sizes, **experts)), tmp_path)
    seen: list[torch.Tensor] = []
    hook = base.model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        base.model(**base.tokenizer("some text", return_tensors="pt"))
    hook.remove()
    torch.testing.assert_close(base.modality.states(base, plain(["some text"]), 64)[0], seen[0][0, -1].float())


def test_an_encoder_is_not_run_by_its_causal_class(tmp_path: Path) -> None:
    BertConfig(**SMALL).save_pretrained(tmp_path)
    assert not CausalLM().suits(FoundBase(LABEL, tmp_path, ()))
