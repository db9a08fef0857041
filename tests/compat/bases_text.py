"""The base models that read text: causal language models, encoders, and encoders with decoders."""

from __future__ import annotations

from typing import Any

from tests.compat.bases import GROUPED, LAYERS, TEXT, VOCABULARY, WIDTH, Maker, built, made, translated

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", GROUPED | {"attention_bias": True}),
    "llama-deep": ("LlamaConfig", GROUPED | {"num_hidden_layers": 4}),
    "llama-wide": ("LlamaConfig", GROUPED | {"hidden_size": 64, "num_hidden_layers": 1}),
    "mistral": ("MistralConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8}),
    "gemma3n": (
        "Gemma3nTextConfig",
        GROUPED
        | {
            "head_dim": 8,
            "intermediate_size": [64, 64],
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
            "laurel_rank": 8,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        GROUPED
        | {
            "num_hidden_layers": 6,
            "head_dim": 8,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "phi": ("PhiConfig", TEXT | {"pad_token_id": 0}),
    "phi3": ("Phi3Config", GROUPED | {"pad_token_id": 0}),
    "gpt-neox": ("GPTNeoXConfig", TEXT),
    "gpt2": (
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128},
    ),
    "gpt-j": (
        "GPTJConfig",
        {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": 4,
            "rotary_dim": 8,
            "vocab_size": VOCABULARY,
            "n_positions": 128,
        },
    ),
    "falcon": (
        "FalconConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": VOCABULARY},
    ),
    "bloom": ("BloomConfig", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "vocab_size": VOCABULARY,
            "word_embed_proj_dim": WIDTH,
            "max_position_embeddings": 128,
        },
    ),
    "mamba": (
        "MambaConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "state_size": 4},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "vocab_size": VOCABULARY,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "granite": ("GraniteConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED | {"pad_token_id": 0}),
    "glm": ("GlmConfig", GROUPED | {"head_dim": 8, "pad_token_id": 0}),
    "lfm2": ("Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "qwen3-next": (
        "Qwen3NextConfig",
        GROUPED
        | {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        GROUPED | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt-oss": ("GptOssConfig", GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": (
        "DeepseekV3Config",
        TEXT
        | {
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        GROUPED
        | {
            "head_dim": 8,
            "intermediate_size": 16,
            "intermediate_size_mlp": 32,
            "num_local_experts": 4,
            "pad_token_id": 0,
        },
    ),
}

_TRANSLATOR = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_T5 = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": LAYERS,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}

MAKERS: dict[str, Maker] = {
    name: made("AutoModelForCausalLM", config, fields) for name, (config, fields) in CAUSAL.items()
} | {
    "t5": made("AutoModelForSeq2SeqLM", "T5Config", _T5, translated),
    "bart": made("AutoModelForSeq2SeqLM", "BartConfig", _TRANSLATOR, translated),
    "nllb": made("AutoModelForSeq2SeqLM", "M2M100Config", _TRANSLATOR, translated),
    "bert": made("AutoModel", "BertConfig", TEXT),
    "bert-masked": made("AutoModelForMaskedLM", "BertConfig", TEXT),
    "bert-classifier": built("BertForSequenceClassification", "BertConfig", TEXT | {"num_labels": 3}),
    "roberta-tagger": built("RobertaForTokenClassification", "RobertaConfig", TEXT | {"num_labels": 5}),
    "llama-classifier": built(
        "LlamaForSequenceClassification", "LlamaConfig", GROUPED | {"num_labels": 3, "pad_token_id": 0}
    ),
    "esm": made(
        "AutoModel",
        "EsmConfig",
        TEXT | {"pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary"},
    ),
}
