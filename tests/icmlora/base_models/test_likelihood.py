"""Negative log-likelihood and retained gain."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional

from icmlora.base_models.examples.examples import Example
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.kinds.likelihood import Scored, next_token_logits, nll, pieces, tokenized
from icmlora.base_models.modality import BaseModel, Score, retained_gain
from icmlora.base_models.running.attach import adapted
from icmlora.errors import DataError
from icmlora.fleet.measure.metric_result import MetricResult
from registry.names import NLL
from tests.icmlora.tiny_base import LABEL, load_tiny_base, write_tiny_adapter, write_tiny_base

TEXTS = [Example("", "the first text"), Example("", "another, which is a little longer"), Example("", "третий")]
LOSSES = st.floats(0.1, 20)


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


def plain(base: BaseModel, text: str, scored_from: int = 1) -> float:
    """Compute the loss in the most direct way; one token is one byte."""
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = base.model(ids).logits[0]
    return float(functional.cross_entropy(logits[scored_from - 1 : -1], ids[0, scored_from:], reduction="sum"))


def total(score: Score) -> float:
    """Return the loss of all scored tokens, in nats."""
    return score.value * score.count


def test_the_loss_is_the_sum_over_all_predicted_tokens(base: BaseModel) -> None:
    result = nll(base.model, base.tokenizer, TEXTS)
    assert total(result) == pytest.approx(sum(plain(base, example.text) for example in TEXTS), rel=1e-5)
    assert result.count == sum(len(example.text.encode()) - 1 for example in TEXTS)


def test_only_the_completion_of_a_prompt_is_scored(base: BaseModel) -> None:
    result = nll(base.model, base.tokenizer, [Example("2 + 2 = ", "four")])
    assert total(result) == pytest.approx(plain(base, "2 + 2 = four", scored_from=8), rel=1e-5)
    assert (result.count, result.utf8_bytes) == (4, 4)


def test_bytes_are_those_of_the_scored_text(base: BaseModel) -> None:
    # The first byte is given, not predicted.
    assert nll(base.model, base.tokenizer, [Example("", "a" + "é" * 5)]).utf8_bytes == 10


def test_text_beyond_the_limit_is_not_scored(base: BaseModel) -> None:
    result = nll(base.model, base.tokenizer, [Example("", "abcdefgh and more")], max_tokens=8)
    assert total(result) == pytest.approx(plain(base, "abcdefgh"), rel=1e-5)
    assert (result.count, result.utf8_bytes) == (7, 7)


def test_a_long_prompt_loses_its_beginning_and_not_its_end(base: BaseModel) -> None:
    result = nll(base.model, base.tokenizer, [Example("this is dropped, kept", "end")], max_tokens=7)
    assert total(result) == pytest.approx(plain(base, "keptend", scored_from=4), rel=1e-5)


def test_a_long_completion_leaves_room_for_one_token_of_the_prompt(base: BaseModel) -> None:
    result = nll(base.model, base.tokenizer, [Example("ab", "cdefgh")], max_tokens=4)
    assert total(result) == pytest.approx(plain(base, "bcde", scored_from=1), rel=1e-5)


@pytest.mark.parametrize(
    ("prompt", "answer", "read"),
    [
        ("short: ", "yes", "short: yes"),
        ("this is dropped, kept", "end", "d, keptend"),
        ("half of it", "as long as an answer", "of itas lo"),
        ("q: ", "a long answer", "q: a long "),
    ],
)
def test_of_a_long_example_that_is_read_as_a_whole_the_text_around_its_answer_is_read(
    base: BaseModel, prompt: str, answer: str, read: str
) -> None:
    (item,) = tokenized(base.tokenizer, [Example(prompt, answer)], 10, whole=True)
    assert base.tokenizer.decode(item.ids) == read
    assert item.count == len(read) - 1
    answered = base.tokenizer.decode([item.ids[place] for place in sorted(item.answers)])
    assert prompt.endswith(read.removesuffix(answered))
    assert answer.startswith(answered)


@given(length=st.integers(2, 60), limit=st.integers(3, 20), has_start=st.booleans())
def test_the_pieces_of_a_text_are_the_text_and_each_begins_as_texts_do(
    length: int, limit: int, has_start: bool
) -> None:
    tokenizer = SimpleNamespace(bos_token_id=0 if has_start else None)
    found = pieces(tokenizer, Scored(list(range(length)), 1), limit)
    assert all(1 < item.size <= limit for item in found)
    assert [item.ids[0] == 0 for item in found[1:]] == [has_start] * (len(found) - 1)
    rest = [token for item in found for token in item.ids[1 if has_start else 0 :]]
    assert rest == list(range(length))[1 if has_start else 0 :]


def test_of_an_example_with_an_answer_the_piece_around_it_is_read(base: BaseModel) -> None:
    (item,) = tokenized(base.tokenizer, [Example("half of it", "as long as an answer")], 20, whole=True)
    (piece,) = pieces(base.tokenizer, item, 10)
    assert base.tokenizer.decode(piece.ids) == "of itas lo"
    assert base.tokenizer.decode([piece.ids[place] for place in sorted(piece.answers)]) == "as lo"


def test_a_window_of_a_long_example_begins_as_texts_do(base: BaseModel) -> None:
    base.tokenizer.add_special_tokens({"bos_token": "t"})
    (item,) = tokenized(base.tokenizer, [Example("this is dropped, kept", "end")], 10, whole=True)
    assert base.tokenizer.decode(item.ids) == "t, keptend"


@pytest.mark.parametrize("batch_size", [2, 3, 10])
def test_batches_and_their_padding_do_not_change_the_loss(base: BaseModel, batch_size: int) -> None:
    one = nll(base.model, base.tokenizer, TEXTS)
    many = nll(base.model, base.tokenizer, TEXTS, batch_size=batch_size)
    assert total(many) == pytest.approx(total(one), rel=1e-6)
    assert (many.count, many.utf8_bytes) == (one.count, one.utf8_bytes)


@pytest.mark.parametrize(("positions", "longest"), [(None, 48), (40, 40)])
def test_texts_of_many_lengths_are_read_at_few_in_bfloat16_and_predictions_stay(
    base: BaseModel, positions: int | None, longest: int
) -> None:
    base = replace(base, model=base.model.to(torch.bfloat16), positions=positions)
    items, lengths = tokenized(base.tokenizer, TEXTS, 40), []
    with torch.no_grad():
        expected = [base.model(torch.tensor([item.ids])).logits[0] for item in items]
        base.model.get_input_embeddings().register_forward_pre_hook(lambda _, read: lengths.append(read[0].shape[1]))
        found = [next_token_logits(base, [item])[0] for item in items]
    assert lengths == [16, longest, 16]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_a_text_of_one_token_has_nothing_to_predict(base: BaseModel) -> None:
    assert nll(base.model, base.tokenizer, [Example("", "a"), TEXTS[0]]) == nll(base.model, base.tokenizer, TEXTS[:1])
    with pytest.raises(DataError, match="long enough"):
        nll(base.model, base.tokenizer, [Example("", "a")])


def test_an_adapter_changes_the_loss_and_taking_it_off_restores_it_exactly(base: BaseModel, tmp_path: Path) -> None:
    before = nll(base.model, base.tokenizer, TEXTS)
    with adapted(base, write_tiny_adapter(tmp_path / "adapter")) as model:
        assert total(nll(model, base.tokenizer, TEXTS)) != pytest.approx(total(before), rel=1e-3)
    assert nll(base.model, base.tokenizer, TEXTS) == before


def test_figures_follow_from_loss_tokens_and_bytes() -> None:
    figures = MetricResult(NLL, 2 * math.log(2), 10, utf8_bytes=40).figures
    assert (figures["perplexity"], figures["bits per byte"]) == (pytest.approx(4), pytest.approx(0.5))


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert MetricResult(NLL, 1e6, 1).figures["perplexity"] == math.inf


@given(LOSSES, LOSSES)
def test_the_original_keeps_all_of_its_gain_and_the_base_none(base_loss: float, original: float) -> None:
    if base_loss - original > 1e-6 * base_loss:
        assert retained_gain(base_loss, original, original) == 1
        assert retained_gain(base_loss, original, base_loss) == 0
    else:
        assert retained_gain(base_loss, original, original) is None


def test_what_rounding_makes_of_a_loss_is_no_gain_to_keep() -> None:
    assert retained_gain(3.0, 3.0 - 1e-6, 2.9) is None


def test_gain_can_be_exceeded_and_lost() -> None:
    assert retained_gain(3.0, 2.0, 1.5) == pytest.approx(1.5)
    assert retained_gain(3.0, 2.0, 4.0) == pytest.approx(-1.0)


@pytest.mark.parametrize(("length", "is_plain"), [(96, True), (129, False)])
def test_attention_of_short_texts_is_plain_where_gradients_of_the_fused_kernel_are_slow(
    tmp_path: Path, length: int, is_plain: bool
) -> None:
    base = CausalLM().load(inspect_base(LABEL, write_tiny_base(tmp_path / "base")), dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        (logits,) = next_token_logits(base, [Scored(list(range(length)), 1)], from_leaf=True)
        logits.sum().backward()
    fused = {event.key for event in seen.key_averages() if "flash_attention" in event.key}
    assert (not fused) == is_plain
