"""Rows that no training saw, intervals from the literature, and answers that do not depend on how they are batched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from tests.benchmarks.answers.generate import Answerer
from tests.benchmarks.answers.intervals import difference, mean, share
from tests.benchmarks.answers.rows import (
    HELD_OUT,
    SAMPLES,
    Row,
    classified,
    divided,
    examples_that_fit,
    read,
    turns,
)
from tests.benchmarks.answers.study import Result, compared, right, table, table_of_tasks
from tests.benchmarks.answers.tasks import TASKS
from tests.benchmarks.answers.train import IGNORED, Chats, batch, tokens
from tests.benchmarks.example_fleet.train import load_base
from tests.benchmarks.realistic_fleet.stores import NAMES
from tests.icmlora.base_models.chat_templates import QWEN
from tests.icmlora.tiny_base import tiny_tokenizer, write_tiny_adapter, write_tiny_base

ROWS = [Row(f"{number} + 1?", str(number + 1)) for number in range(1000)]
QUESTIONS = [Row("the cat", "sat"), Row("a", "b"), Row("the dog sat on the mat", "cat")]


def test_tasks_have_names_of_their_own_and_base_models_that_stores_are_made_for() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert sum(NAMES[task.base_model] == "smollm2" for task in TASKS) >= 8
    assert sum(NAMES[task.base_model] == "qwen" for task in TASKS) >= 2


def test_no_prompt_is_in_both_parts_and_each_has_one_answer() -> None:
    rows = divided([*ROWS, Row(ROWS[0].prompt, "another answer")])
    prompts = [row.prompt for row in (*rows.train, *rows.held_out)]
    assert len(prompts) == len(set(prompts)) == len(ROWS)
    assert len(rows.held_out) == HELD_OUT
    assert "another answer" not in {row.answer for row in (*rows.train, *rows.held_out)}


def test_pieces_of_a_document_are_in_one_part_only() -> None:
    documents = {name: [f"{name}{number} " * 100 for number in range(50)] for name in ("ale", "bread")}
    rows = classified(documents, "Which?", 60)
    trained, held_out = ({row.prompt.split()[1] for row in part} for part in (rows.train, rows.held_out))
    assert trained
    assert held_out
    assert not trained & held_out
    assert all(row.prompt.startswith(row.answer) for row in rows.held_out)


def test_written_rows_are_read_again(tmp_path: Path) -> None:
    rows = divided(ROWS)
    rows.write(tmp_path)
    assert read(tmp_path / "eval.jsonl") == list(rows.held_out)
    assert read(tmp_path / "samples.jsonl") == list(rows.train[:SAMPLES])


def test_examples_are_cut_to_what_has_room() -> None:
    assert examples_that_fit(ROWS[:4], [5, 5, 5, 5], 14) == ROWS[:2]
    assert examples_that_fit(ROWS[:4], [5, 5, 5, 5], 20) == ROWS[:4]
    assert examples_that_fit(ROWS[:1], [5], -3) == []


def test_an_answer_is_right_only_if_it_is_the_whole_answer() -> None:
    rows = [Row("?", "spam")] * 5
    assert right(["spam", " spam\n", "Spam", "spam.", ""], rows) == [True, True, False, False, False]


def test_wilson_s_interval_is_that_of_the_literature() -> None:
    """81 of 263: Newcombe, Statistics in Medicine 17 (1998), page 857."""
    found = share(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_the_paired_interval_is_that_of_the_literature() -> None:
    """36, 12, 2 and 0 pairs: Newcombe, Statistics in Medicine 17 (1998), page 2635."""
    pairs = [(True, True)] * 36 + [(True, False)] * 12 + [(False, True)] * 2
    found = difference([one for one, _ in pairs], [two for _, two in pairs])
    assert found.value == 0.2
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)


def test_equal_answers_still_leave_an_interval() -> None:
    found = difference([True] * 50, [True] * 50)
    assert found.value == 0
    assert found.low == -found.high < 0


def test_a_mean_of_tasks_has_a_narrower_interval_than_each() -> None:
    one = share(60, 200)
    four = mean([one] * 4)
    assert four.value == pytest.approx(one.value)
    assert four.high - four.value == pytest.approx((one.high - one.value) / 2)


def test_a_loss_is_that_of_the_original_minus_one_s_own() -> None:
    found = compared(["1", "3", "3", "4"], ["1", "2", "3", "5"], ROWS[:4], 7, {})
    assert (found.right, found.accuracy.value, found.loss.value, found.same) == (3, 0.75, 0.0, 0.5)
    result = Result("code", 7.0, 9.0, found.accuracy, found.loss, found.same, {"sums": found})
    assert "| code | 7 | 9 | 0.750 (" in table([result])
    assert table_of_tasks([result]).splitlines()[-1] == "| sums | 0.750 |"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_tiny_base(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = QWEN, "<pad>"
    tokenizer.save_pretrained(folder)
    return folder


def test_the_loss_is_taken_on_the_answer_alone(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    item = Chats(QUESTIONS, tokenizer)[0]
    scored = [label for label in item["labels"] if label != IGNORED]
    assert tokenizer.decode(scored) == "sat<|im_end|>\n"
    assert item["input_ids"][-len(scored) :] == scored


def test_the_loss_of_a_batch_is_that_of_its_chats(base: Path) -> None:
    """As the model takes it of each whole chat, weighted by the tokens of the answers."""
    model = load_base(base, torch.float64).eval()
    chats = Chats(QUESTIONS, AutoTokenizer.from_pretrained(base))
    items = [chats[number] for number in range(len(QUESTIONS))]
    total, count = 0.0, 0
    for item in items:
        scored = sum(label != IGNORED for label in item["labels"])
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
        total, count = total + model(input_ids=ids, labels=labels).loss.item() * scored, count + scored
    assert model(**batch(items, padding=0)).loss.item() == pytest.approx(total / count)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # between PEFT and transformers
def test_answers_in_batches_are_those_that_the_model_gives_alone(base: Path, tmp_path: Path) -> None:
    """What all questions begin with is read once, and there is padding after it; the adapter is taken off again."""
    adapter = write_tiny_adapter(tmp_path / "adapter", strength=2.0)
    answerer, tokenizer = Answerer(base, torch.float64), AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(load_base(base, torch.float64), str(adapter)).eval()
    alone = []
    for row in QUESTIONS:
        ids = torch.tensor([tokens(tokenizer, turns([], row.prompt), add_generation_prompt=True)])
        written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=0, pad_token_id=0)
        alone.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip())
    before, answers, after = (
        answerer.with_examples([], QUESTIONS),
        answerer.answers(QUESTIONS, adapter=adapter),
        answerer.with_examples([], QUESTIONS),
    )
    assert answers == alone
    assert len(set(answers)) > 1
    assert before == after != (answers, 0)


def test_examples_that_the_context_has_no_room_for_are_left_out(base: Path) -> None:
    long = [Row("a" * 300, "b")] * 5
    assert Answerer(base, torch.float32).with_examples(long, QUESTIONS)[1] == 2
