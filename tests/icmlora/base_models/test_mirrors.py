"""Names of one base model on the hub: copies, quantised copies, renamed repositories."""

from __future__ import annotations

import pytest

from icmlora.base_models.finding.mirrors import original_of

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.mark.parametrize(
    ("label", "original", "is_quantised"),
    [
        ("unsloth/llama-3-8b-Instruct", LLAMA, False),
        ("unsloth/llama-3-8b-Instruct-bnb-4bit", LLAMA, True),
        ("unsloth/Meta-Llama-3.1-8B-unsloth-bnb-4bit", "meta-llama/Llama-3.1-8B", True),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", False),
        ("unsloth/Qwen2.5-Coder-7B-Instruct-bnb-4bit", "Qwen/Qwen2.5-Coder-7B-Instruct", True),
        ("unsloth/gemma-2-9b-it", "google/gemma-2-9b-it", False),
        ("unsloth/mistral-7b-v0.3-bnb-4bit", "mistralai/Mistral-7B-v0.3", True),
        ("unsloth/Mistral-Small-24B-Instruct-2501", "mistralai/Mistral-Small-24B-Instruct-2501", False),
        ("openai-community/gpt2", "gpt2", False),
        # A name of Unsloth's own: only its copies are joined.
        ("unsloth/some-new-model-bnb-4bit", "unsloth/some-new-model", True),
    ],
)
def test_a_known_mirror_has_an_original(label: str, original: str, is_quantised: bool) -> None:
    assert original_of(label) == (original, is_quantised)


@pytest.mark.parametrize(
    "label",
    [
        LLAMA,
        "unsloth/Phi-3-mini-4k-instruct",  # other modules than Microsoft's
        "unsloth/Llama-3.1-Storm-8B",
        "somebody/llama-3-8b-Instruct",
        "somebody/model-bnb-4bit",
        "unsloth/llama-3-8b-Instruct@abc123",
        "/models/unsloth/llama-3-8b-Instruct-bnb-4bit",
        "",
    ],
)
def test_no_other_name_is_taken_for_a_mirror(label: str) -> None:
    assert original_of(label) == (label, False)


@pytest.mark.parametrize("label", ["unsloth/llama-3-8b", "facebookai/roberta-base", "unsloth/tinyllama-chat"])
def test_an_original_is_its_own_original(label: str) -> None:
    original = original_of(label).original
    assert original_of(original) == (original, False)
