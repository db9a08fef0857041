"""Tell from a `config.json` whether a model is a causal language model, with the tables of transformers."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

_ENDINGS = ("ForCausalLM", "LMHeadModel")
# It predicts tokens in any order, from both sides, and is in no table of masked models.
_BOTH_SIDES = frozenset({"xlnet"})


def is_causal(config: Mapping[str, object]) -> bool:
    """Return whether the loss of the next token makes sense for a model; True where only loading it can tell."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return True  # transformers does not know it, and says so when it is loaded
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if causal is None or kind in _BOTH_SIDES:
        return False
    named = config.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    known = {causal} if isinstance(causal, str) else set(causal)
    is_named = any(name in known or name.endswith(_ENDINGS) for name in architectures)
    if config.get("is_encoder_decoder") is True and not is_named:
        return False
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        # A class of causal language models loads these too, and lets every token see the next ones.
        return config.get("is_decoder") is True
    return is_named or not architectures
