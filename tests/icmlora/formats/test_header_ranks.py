"""Headers stay true when ranks change."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from icmlora.formats.file_header import of_lora, with_ranks

NOTED = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_tag_frequency": "{}", "modelspec.title": "dog"}


@pytest.mark.parametrize(("ranks", "stated"), [([4, 4], "4"), ([4, 2], "Dynamic")])
def test_the_rank_is_that_of_the_modules(ranks: list[int], stated: str) -> None:
    assert with_ranks(NOTED, ranks, alphas_stay=True) == NOTED | {"ss_network_dim": stated}


def test_without_alphas_the_alpha_is_the_rank() -> None:
    found = with_ranks(NOTED, [2], alphas_stay=False)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "2")


def test_what_is_not_stated_is_not_added() -> None:
    assert with_ranks({"name": "dog"}, [2], alphas_stay=False) == {"name": "dog"}


def test_digests_of_other_tensors_go() -> None:
    digests = {"sshs_model_hash": "ab", "sshs_legacy_hash": "cd", "modelspec.hash_sha256": "0xef"}
    assert with_ranks(NOTED | digests, [8], alphas_stay=True) == NOTED


def test_ranks_among_the_arguments_go_and_the_others_stay() -> None:
    arguments = {"conv_dim": "8", "conv_alpha": "1", "dropout": "0.1"}
    found = with_ranks({"ss_network_args": json.dumps(arguments)}, [2], alphas_stay=True)
    assert json.loads(found["ss_network_args"]) == {"conv_alpha": "1", "dropout": "0.1"}


@pytest.mark.parametrize("text", ["None", "[1, 2]", '{"dropout": 0.1}', "{"])
def test_arguments_that_state_no_ranks_stay_word_for_word(text: str) -> None:
    assert with_ranks({"ss_network_args": text}, [2], alphas_stay=False) == {"ss_network_args": text}


def test_another_network_becomes_that_of_lora() -> None:
    loha = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}', "ss_trigger_words": "dog"}
    assert of_lora(loha, [4, 4]) == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_trigger_words": "dog",
    }


_KEYS = st.sampled_from(["ss_network_dim", "ss_network_alpha", "ss_network_args", "sshs_model_hash", "title"])
_TEXTS = st.one_of(st.text(max_size=8), st.just('{"conv_dim": 4, "x": 1}'))


@given(st.dictionaries(_KEYS, _TEXTS), st.lists(st.integers(1, 64), min_size=1), st.booleans())
def test_a_true_header_stays_as_it_is(metadata: dict[str, str], ranks: list[int], alphas_stay: bool) -> None:
    once = with_ranks(metadata, ranks, alphas_stay=alphas_stay)
    assert with_ranks(once, ranks, alphas_stay=alphas_stay) == once
    assert once.keys() <= metadata.keys()
    assert once.get("title") == metadata.get("title")
