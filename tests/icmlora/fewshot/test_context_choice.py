"""The choice of a context among samples, and what it and an adapter are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from icmlora.base_models.examples.chats import Chat
from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.examples.examples import Example, plain
from icmlora.base_models.modality import BaseModel, Score
from icmlora.errors import DataError
from icmlora.fewshot.context_choice import ContextScorer, choose_context
from icmlora.fewshot.guard import AblationReport, ContextAblation, left_out
from tests.icmlora.tiny_base import load_tiny_base

TEXTS = plain(f"text {number:02d}, some more words" for number in range(24))


@pytest.fixture
def prompted(tmp_path: Path) -> ContextScorer:
    return ContextScorer(load_tiny_base(tmp_path / "base"))


def told(monkeypatch: pytest.MonkeyPatch, nats: Callable[[str, int], float]) -> list[str]:
    """Have the losses behind a context follow from its text and the number of the example; return what is read."""
    seen: list[str] = []

    def score(self: ContextScorer, context: TaskContext | None, examples: Sequence[object], tokens: int = 0) -> Score:
        seen.append("" if context is None else context.text)
        each = tuple(nats(seen[-1], number) for number in range(len(examples)))
        return Score(sum(each) / len(each), len(each), of_each=each)

    monkeypatch.setattr(ContextScorer, "score", score)
    return seen


def test_no_context_is_longer_than_was_asked(prompted: ContextScorer) -> None:
    for most in (30, 60, 200):
        chosen = choose_context(prompted, TEXTS, most)
        assert 0 < chosen.tokens <= most
        assert all(sample.completion in chosen.context.text for sample in chosen.samples[1:])  # type: ignore[union-attr]


def test_a_long_context_of_texts_has_whole_blocks_of_tokens(prompted: ContextScorer) -> None:
    texts = plain(f"text {number:02d}, " + "some more words " * 4 for number in range(24))
    for most in (600, 700, 800):
        text = choose_context(prompted, texts, most).context.text
        assert len(prompted.base.tokenizer(text)["input_ids"]) % 32 == 0


def test_no_context_fills_what_the_base_model_reads(prompted: ContextScorer) -> None:
    base = prompted.base
    short = ContextScorer(BaseModel(**{**vars(base), "positions": 100}))
    assert choose_context(short, TEXTS, 10_000).tokens <= 75


def test_samples_that_bring_nothing_are_left_out(prompted: ContextScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda text, number: 0.5 if text else 1.0)
    assert len(choose_context(prompted, TEXTS, 500).samples) == 1


def test_all_stay_where_each_brings_something(prompted: ContextScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda text, number: 1 - len(text) / 5_000)
    assert len(choose_context(prompted, TEXTS, 5_000).samples) == len(TEXTS)


def test_what_only_some_texts_find_better_is_not_chosen(
    prompted: ContextScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = told(monkeypatch, lambda text, number: 1.0)
    choose_context(prompted, TEXTS, 300)
    seen = told(monkeypatch, lambda text, number: 0.0 if (text != first[0]) == (number % 2 == 0) else 0.9)
    chosen = choose_context(prompted, TEXTS, 300)
    assert len(set(seen)) > 2
    assert chosen.context.text.endswith(first[0][-60:])


def test_what_all_texts_find_better_is(prompted: ContextScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = plain(f"{number:02d} " + "some more words " * 30 for number in range(12))
    told(monkeypatch, lambda text, number: 1 - max(map(len, text.split("\n\n"))) / 1_000)
    assert choose_context(prompted, texts, 1_500).length == 160


def test_the_texts_that_tell_are_not_among_those_that_are_tried(
    prompted: ContextScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = told(monkeypatch, lambda text, number: 1.0)
    choose_context(prompted, TEXTS, 5_000)
    assert all("text 00" not in text for text in seen)


def test_questions_are_never_cut(prompted: ContextScorer) -> None:
    pairs = [Example(f"{number} " * 100, "yes") for number in range(12)]
    chosen = choose_context(prompted, pairs, 1_000)
    assert all(sample in pairs for sample in chosen.samples)


def test_where_none_is_short_enough_that_is_said(prompted: ContextScorer) -> None:
    with pytest.raises(DataError, match="no sample is short enough for a context of 20 tokens"):
        choose_context(prompted, [Example("x" * 50, "y")], 20)


def test_chats_have_their_plain_form_where_there_is_no_template(prompted: ContextScorer) -> None:
    turns = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"})
    assert prompted.usable([Chat(turns, (1,), plain=("2 + 2?", "four"))]) == [Example("2 + 2?", "four")]


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("losses", "recommended"),
    [
        ((3.0, 2.5, 2.5, 2.0), "both"),
        ((3.0, 2.0, 2.5, 2.0), "context"),
        ((3.0, 2.5, 2.0, 1.99), "adapter"),
        ((3.0, 3.1, 3.2, 3.3), "neither"),
        ((8.72, 1.22, 1.07, 0.96), "both"),
    ],
)
def test_the_cheapest_of_what_is_about_as_good_is_recommended(
    losses: tuple[float, float, float, float], recommended: str
) -> None:
    assert AblationReport(*losses, samples=4).recommended == recommended


def test_a_context_that_is_no_help_by_itself_is_not_recommended() -> None:
    assert AblationReport(3.0, 3.01, 2.9, 2.85, samples=4).recommended == "adapter"


@pytest.mark.parametrize(("least", "recommended"), [(0.1, "both"), (0.3, "adapter")])
def test_where_no_adapter_was_measured_the_context_has_to_be_of_help_beyond_chance(
    least: float, recommended: str
) -> None:
    assert AblationReport(3.0, 2.8, None, None, samples=3, leave_one_out=True, least=least).recommended == recommended


def test_each_of_a_few_samples_is_read_behind_the_others(prompted: ContextScorer) -> None:
    few = [Example("", text) for text in ("grey geese fly south", "grey geese fly west", "grey geese fly east")]
    chosen = choose_context(prompted, few)
    asked = ContextAblation.of(prompted, chosen, few, leave_one_out=True)
    assert asked is not None
    behind = [
        prompted.score(prompted.context_of([few[one], few[two]], chosen.length).context, [few[held]])
        for one, two, held in ((1, 2, 0), (0, 2, 1), (0, 1, 2))
    ]
    assert asked.with_context == pytest.approx(
        sum(one.value * one.count for one in behind) / sum(one.count for one in behind)
    )
    assert asked.without == pytest.approx(prompted.score(None, few).value)
    assert ContextAblation.of(prompted, chosen, few[:1], leave_one_out=True) is None


def test_a_sample_that_is_too_short_for_a_loss_does_not_stop_the_others(prompted: ContextScorer) -> None:
    few = [Example("", text) for text in ("grey geese fly south", "x", "grey geese fly east")]
    asked = ContextAblation.of(prompted, choose_context(prompted, few), few, leave_one_out=True)
    assert asked is not None
    assert asked.samples == 2


def test_what_is_left_out_comes_from_all_over(prompted: ContextScorer) -> None:
    held, others = left_out(TEXTS)
    assert [TEXTS.index(sample) for sample in held] == [0, 6, 12, 18]
    assert sorted(held + others, key=TEXTS.index) == list(TEXTS)
    assert left_out(TEXTS[:7]) == ([], list(TEXTS[:7]))
