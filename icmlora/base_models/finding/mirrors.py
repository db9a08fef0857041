"""Base models with several names on the hub: copies, quantised copies, renamed repositories.

A known mirror has the weights of its original, possibly quantised, and the same module names. Copies with different
modules are omitted on purpose: Unsloth's Phi-3, Phi-4 and gpt-oss.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Mirror(NamedTuple):
    """The original of a copy, and whether the copy is quantised."""

    original: str
    is_quantised: bool


_UNSLOTH = "unsloth/"
_QUANTISED = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)

# Repositories for which Unsloth keeps the original name: owner -> pattern, case-insensitive.
_SAME_NAME = {
    "Qwen": r"qwen(1\.5|2|2\.5|3)(-coder|-math|-vl)?-[\d.]+b(-a[\d.]+b)?(-base|-instruct|-thinking)?(-2507)?",
    "meta-llama": r"(meta-)?llama-3\.[123]-\d+b(-vision)?(-instruct)?",
    "google": r"(codegemma|gemma(-1\.1|-2|-3)?)-\d+[bm](-it|-pt)?",
    "mistralai": r"mistral-(nemo|small|large)(-[\d.]+)?(-24b)?(-base|-instruct)-\d{4}|mixtral-8x\d+b(-instruct)?-v0\.1",
    "HuggingFaceTB": r"smollm2?-(135m|360m|1\.7b)(-instruct)?",
    "deepseek-ai": r"deepseek-r1-distill-(qwen|llama)-[\d.]+b",
}

# Unsloth's own names, and renamed or copied repositories: lower-case name -> original.
_RENAMED = {
    "unsloth/llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "unsloth/llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "unsloth/llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "unsloth/llama-3-70b-instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    "unsloth/llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "unsloth/llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "unsloth/llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "unsloth/mistral-7b": "mistralai/Mistral-7B-v0.1",
    "unsloth/mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "unsloth/mistral-7b-instruct-v0.1": "mistralai/Mistral-7B-Instruct-v0.1",
    "unsloth/mistral-7b-instruct-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "unsloth/mistral-7b-instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "unsloth/codellama-7b": "codellama/CodeLlama-7b-hf",
    "unsloth/tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "unsloth/tinyllama-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "unsloth/zephyr-sft": "HuggingFaceH4/mistral-7b-sft-beta",
    "meta-llama/meta-llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "meta-llama/meta-llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/meta-llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "meta-llama/meta-llama-3.1-70b-instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "nousresearch/meta-llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "nousresearch/meta-llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "nousresearch/llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
    "openai-community/gpt2": "gpt2",
    "distilbert/distilgpt2": "distilgpt2",
    "google-bert/bert-base-uncased": "bert-base-uncased",
    "google-bert/bert-base-cased": "bert-base-cased",
    "distilbert/distilbert-base-uncased": "distilbert-base-uncased",
    "facebookai/roberta-base": "roberta-base",
    "facebookai/roberta-large": "roberta-large",
    "facebookai/xlm-roberta-base": "xlm-roberta-base",
    "google-t5/t5-small": "t5-small",
    "google-t5/t5-base": "t5-base",
}


def original_of(label: str) -> Mirror:
    """Return the original of a label, or the label itself if it is not a known copy or has a revision."""
    name = _QUANTISED.sub("", label) if label.lower().startswith(_UNSLOTH) else label
    original = name
    if name.lower().startswith(_UNSLOTH):
        for owner, names in _SAME_NAME.items():
            if re.fullmatch(names, name.lower().removeprefix(_UNSLOTH)):
                original = f"{owner}/{name[len(_UNSLOTH) :]}"
    return Mirror(_RENAMED.get(original.lower(), original), name != label)
