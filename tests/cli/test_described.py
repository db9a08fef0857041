"""Tasks by a sentence: `icm recognize --description` and `icm generate --description`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran

Icm = Callable[..., Ran]


def ranked(icm: Icm, description: str, *options: object) -> list[str]:
    document = icm("recognize", "--description", description, "--json", *options).document
    assert [row["score"] for row in document["candidates"]] == sorted(
        (row["score"] for row in document["candidates"]), reverse=True
    )
    return [row["task"] for row in document["candidates"]]


@pytest.fixture
def described(icm: Icm, trained: Path) -> Path:
    icm("edit", "poems", "--note", "Verses about the sea, in the style of sailors")
    icm("edit", "rules", "--tag", "legal")
    return trained


def test_tasks_are_ranked_by_words_of_name_note_and_tags(icm: Icm, described: Path) -> None:
    assert ranked(icm, "a sailor's verse")[0] == "poems"  # by stems
    assert ranked(icm, "LEGAL texts")[0] == "rules"
    assert ranked(icm, "rules of a game")[0] == "rules"


def test_words_that_no_task_has_find_none(icm: Icm, described: Path) -> None:
    ran = icm("recognize", "--description", 'zebra" OR name:*')
    assert (ran.code, ran.out) == (ExitCode.DONE, "")
    assert "found none of these words in a task's name, note, tags or card" in ran.err


def test_a_word_that_all_tasks_have_tells_none_from_the_others(icm: Icm, described: Path) -> None:
    for task in icm("ls", "--json").document:
        icm("edit", task["name"], "--note", "a language model of the sea")
    assert ranked(icm, "models") == []
    assert ranked(icm, "a model with rules") == ["rules"]


def test_quiet_prints_the_best_task_alone(icm: Icm, described: Path) -> None:
    assert icm("-q", "recognize", "--description", "verses of the sea").out == "poems\n"


@pytest.mark.one_case
@pytest.mark.parametrize("options", [[], ["--samples", "x.jsonl", "--description", "x"]])
def test_a_task_is_recognized_by_one_of_the_two(icm: Icm, trained: Path, options: list[str]) -> None:
    assert icm("recognize", *options).code == ExitCode.USAGE


def test_a_description_of_no_word_is_refused(icm: Icm, trained: Path) -> None:
    assert "contains no word" in icm("recognize", "--description", "?!").err


def test_an_adapter_is_made_from_a_sentence(icm: Icm, started: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    options = ["--description", "Songs of geese", "-o", out, "--device", "cpu", "--count", "8", "--register"]
    ran = icm("generate", "geese", *options, "--json")
    document = ran.document
    assert document["described"] is True
    assert 1 <= document["samples_count"] <= 8
    assert document["measured"] is None
    assert (out / "context.txt").read_text() == "Songs of geese\n\n"
    chat = json.loads((out / "context.json").read_text())["messages"]
    assert chat == [{"role": "system", "content": "Songs of geese"}]
    assert ranked(icm, "songs of geese")[0] == "geese"


def test_without_samples_or_a_description_nothing_is_made(icm: Icm, started: Path, tmp_path: Path) -> None:
    ran = icm("generate", "geese", "-o", tmp_path / "adapter")
    assert ran.code == ExitCode.FAILED
    assert "neither samples nor a description were given" in ran.err
