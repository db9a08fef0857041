"""The failures that are expected today. Whoever makes one pass takes it off this list, and runs `make docs`."""

from __future__ import annotations

from tests.compat.cases import CASES

# Not taken into the store at all.
_REFUSED = """
bert-sequence-classifier roberta-token-classifier llama-sequence-classifier vit-classifier segformer-decoder detr-heads
embeddings-and-lm-head-saved norms-saved tied-embeddings-saved lm-head-target embedding-target embedding-target-alone
tied-embedding-targets mamba-embeddings
dora dora-rslora dora-bfloat16 dora-float32-magnitudes bias-all bias-lora-only bias-all-without-biases lora-bias
token-rows token-rows-tied token-rows-of-two-layers everything-at-once
no-tensors not-a-number infinity wrong-rank no-prefix
adalora adalora-finished loha lokr ia3 vera oft boft hra fourierft randlora vblora miss c3a shira road waveft
layer-norm-tuning trainable-tokens poly adaption-prompt prefix-tuning prompt-tuning p-tuning kasa monteclora velora
resnet resnet-dora unet-convolutions convolution-1d convolution-3d grouped-convolution wav2vec2-convolutions
torch-attention florence2-everything dinov2-patches
mixtral-experts mixtral-experts-and-attention mixtral-one-parameter qwen3-moe-experts qwen3-moe-router gpt-oss-experts
gpt-oss-some-layers llama4-experts experts-rank-pattern experts-rslora mixtral-all-linear qwen3-moe-all-linear
deepseek-v3-all-linear
rank-pattern-regex layer-replication alora qalora init-pissa init-pissa-niter-4 init-olora init-corda init-loftq
float64 float8
"""
# In the store, but without the code that they should have.
_WITHOUT_CODE = "rank-256 rank-1024"
# The files beside them do not come back.
_WITHOUT_FILES = "tokenizer-files value-head"
# Trained like any other, although they do nothing.
_DEAD = "untrained alpha-zero"
# The code names more target modules than the original, so PEFT makes empty LoRAs there.
_WIDENED = """
clip-one-tower owl-vit smolvlm-text-tower llava
regex-targets exclude-regex first-layers full-names
"""
# No code is written into the mould of its original: all that have a code.
_WITHOUT_MOULD = [case.name for case in CASES if case.outcome in ("exact", "extras")]


def _because(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


_MISSING = _because("refused", _REFUSED)
_BARE = _because("has no code", _WITHOUT_CODE)
_ALONE = _because("files beside it are lost", _WITHOUT_FILES)

NOT_YET: dict[str, dict[str, str]] = {
    "test_it_has_its_outcome": _MISSING | _BARE | _ALONE | _because("not seen to do nothing", _DEAD),
    "test_the_original_comes_back_byte_for_byte": _MISSING | _ALONE,
    "test_its_code_comes_back_in_the_mould_of_the_original": dict.fromkeys(_WITHOUT_MOULD, "another configuration"),
    "test_peft_loads_original_and_code_alike": _MISSING | _BARE | _because("more target modules", _WIDENED),
}
"""Name of a test -> name of a case or a tree -> why it fails."""
