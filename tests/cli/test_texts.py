"""Texts as people have them, through the commands: what is odd is skipped and named, and the rest goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.fleet import write_run, write_texts
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.base_models.chat_templates import GEMMA, QWEN, chat_tokenizer
from tests.icmlora.tiny_base import LABEL, write_tiny_base

Icm = Callable[..., Ran]
Form = Callable[[str], dict[str, Any]]
CPU = ("--device", "cpu")
WORDS = ("red", "green", "tall", "small", "late", "soft", "loud", "slow")


def question(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {word}?"}, {"role": "assistant", "content": f"A {word} thing."}]


def as_messages(word: str) -> dict[str, Any]:
    return {"messages": question(word)}


def as_sharegpt(word: str) -> dict[str, Any]:
    asked, answered = question(word)
    return {
        "conversations": [{"from": "human", "value": asked["content"]}, {"from": "gpt", "value": answered["content"]}]
    }


def as_alpaca(word: str) -> dict[str, Any]:
    asked, answered = question(word)
    return {"instruction": asked["content"], "output": answered["content"]}


def as_prompt(word: str) -> dict[str, Any]:
    asked, answered = question(word)
    return {"prompt": [asked], "completion": [answered]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(folder: Path, form: Form, seed: int = 0) -> Path:
    """Write an adapter with eight chats as samples and two as held-out text."""
    write_lora(folder, seed=seed)
    write_rows(folder / "samples.jsonl", [form(word) for word in WORDS])
    write_rows(folder / "eval.jsonl", [form(word) for word in WORDS[:2]])
    return folder


@pytest.fixture
def base(icm: Icm, tmp_path: Path) -> Path:
    """The tiny base model with the chat template of Qwen, known to the store."""
    folder = write_tiny_base(tmp_path / "base")
    chat_tokenizer(QWEN).save_pretrained(folder)
    icm("base", "add", LABEL, folder)
    return folder


def set_template(base: Path, template: str | None) -> None:
    (base / "chat_template.jinja").unlink()
    chat_tokenizer(template).save_pretrained(base)


def extractors(store: Path, task: str) -> list[dict[str, Any]]:
    with Store.open(store, read_only=True) as opened:
        return [dict(vector.extractor) for vector in opened.task(task).vectors]


class TestIngest:
    def test_odd_lines_are_skipped_counted_and_the_first_is_named(self, icm: Icm, tmp_path: Path) -> None:
        run = write_run(tmp_path / "poems")
        with (run / "samples.jsonl").open("a") as file:
            file.write('\n{"text": ""}\nnot json\n')
        ran = icm("ingest", run)
        assert ran.code == 0
        assert "poems: kept 4 rows of the samples, skipped 2; first problem: line 6 is empty text" in ran.err

    def test_json_has_what_was_kept_and_skipped(self, icm: Icm, tmp_path: Path) -> None:
        run = write_run(tmp_path / "poems")
        (run / "samples.jsonl").write_text('{"text": "a"}\n{"words": 1}\n')
        event = icm("ingest", run, "--json").events[0]
        assert event["samples"] == {"kept": 1, "skipped": 1, "reason": "line 2 has no text"}
        assert event["eval_data"] == {"kept": 2, "skipped": 0, "reason": None}

    @pytest.mark.parametrize("text", ['{"txt": 1}\n', "", '{"messages": [{"role": "user", "content": "a"}]}\n'])
    @pytest.mark.parametrize("name", ["samples.jsonl", "eval.jsonl"])
    def test_a_task_is_taken_without_a_text_of_no_use(self, icm: Icm, tmp_path: Path, name: str, text: str) -> None:
        run = write_run(tmp_path / "poems")
        (run / name).write_text(text)
        ran = icm("ingest", run)
        assert (ran.code, str(run / name) in ran.out.splitlines()[-1]) == (ExitCode.PARTLY, True)
        assert "1 ingested in part" in ran.out
        with Store.open(tmp_path / "store") as store:
            task = store.task("poems")
            assert [task.samples is None, task.eval_data is None] == [name == "samples.jsonl", name == "eval.jsonl"]

    @pytest.mark.slow
    def test_one_text_of_no_use_does_not_stop_the_other_tasks(self, icm: Icm, fleet: Path) -> None:
        (fleet / "rust" / "samples.jsonl").write_text("not json\n")
        ran = icm("ingest", fleet, "--json")
        assert (ran.code, ran.events[-1]["tasks"], ran.events[-1]["in_part"]) == (ExitCode.PARTLY, 3, 1)
        (problem,) = [event for event in ran.events if event["type"] == "problem"]
        assert (problem["task"], problem["hint"].endswith("or use --no-texts")) == ("rust", True)

    def test_without_texts_nothing_is_said_of_them(self, icm: Icm, tmp_path: Path) -> None:
        run = write_run(tmp_path / "poems")
        (run / "samples.jsonl").write_text("not json\n")
        assert icm("ingest", run, "--no-texts").code == 0

    def test_a_text_that_was_corrected_is_taken_the_next_time(self, icm: Icm, tmp_path: Path) -> None:
        run = write_run(tmp_path / "poems")
        (run / "samples.jsonl").write_text("not json\n")
        assert icm("ingest", run).code == ExitCode.PARTLY
        write_texts(run)
        assert icm("ingest", run, "--json").events[0]["status"] == "updated"

    def test_a_dry_run_finds_a_text_of_no_use(self, icm: Icm, tmp_path: Path) -> None:
        run = write_run(tmp_path / "poems")
        (run / "samples.jsonl").write_text("not json\n")
        assert icm("ingest", run, "-n").code == ExitCode.PARTLY
        assert not (tmp_path / "store").exists()

    @pytest.mark.parametrize("form", [as_messages, as_sharegpt, as_alpaca, as_prompt])
    def test_chats_are_stored_as_they_are(self, icm: Icm, tmp_path: Path, form: Form) -> None:
        folder = write_chats(tmp_path / "talks", form)
        assert icm("ingest", folder).code == 0
        with Store.open(tmp_path / "store") as store:
            assert store.blobs.read(str(store.task("talks").samples)) == (folder / "samples.jsonl").read_bytes()

    def test_json_and_parquet_are_found_by_their_names(self, icm: Icm, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        folder = write_lora(tmp_path / "talks")
        parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / "samples.parquet")
        (folder / "eval.json").write_text(json.dumps([{"text": "three"}], indent=1))
        event = icm("ingest", folder, "--json").events[0]
        assert (event["samples"]["kept"], event["eval_data"]["kept"]) == (2, 1)
        with Store.open(tmp_path / "store") as store:
            stored = store.blobs.read(str(store.task("talks").samples))
        assert stored == (folder / "samples.parquet").read_bytes()

    def test_json_lines_come_before_other_forms_of_the_same_text(self, icm: Icm, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "poems")
        (folder / "samples.json").write_text("[]")
        assert icm("ingest", folder, "--json").events[0]["samples"]["kept"] == 4


class TestVectors:
    def test_the_digest_of_the_chat_template_is_recorded(self, icm: Icm, base: Path, tmp_path: Path) -> None:
        assert icm("ingest", write_chats(tmp_path / "talks", as_messages), *CPU).code == 0
        digest = hashlib.sha256(QWEN.encode()).hexdigest()
        assert {row["template"] for row in extractors(tmp_path / "store", "talks")} == {digest}

    def test_plain_text_records_no_template(self, icm: Icm, base: Path, tmp_path: Path) -> None:
        folder = write_lora(tmp_path / "poems")
        write_texts(folder, count=8)
        icm("ingest", folder, *CPU)
        assert all("template" not in row for row in extractors(tmp_path / "store", "poems"))

    @pytest.mark.slow
    def test_all_forms_of_a_chat_give_the_same_vectors(self, icm: Icm, base: Path, tmp_path: Path) -> None:
        for form in (as_messages, as_sharegpt, as_alpaca, as_prompt):
            write_chats(tmp_path / "loras" / form.__name__, form)
        assert icm("ingest", tmp_path / "loras", *CPU).code == 0
        with Store.open(tmp_path / "store", read_only=True) as store:
            blobs = {vector.blob for task in store.tasks() for vector in task.vectors}
        assert len(blobs) == 1

    @pytest.mark.slow
    def test_vectors_of_chats_and_of_plain_text_can_be_compared(self, icm: Icm, base: Path, tmp_path: Path) -> None:
        write_chats(tmp_path / "loras" / "talks", as_messages)
        for seed in (1, 2):
            write_texts(write_lora(tmp_path / "loras" / f"poems-{seed}", seed=seed), count=8)
        icm("ingest", tmp_path / "loras", *CPU)
        document = icm("map", "--json").document
        assert "talks" in json.dumps(document["tasks"])
        assert not document.get("left_out")

    def test_a_base_model_without_a_template_reads_chatml_and_says_so_once(
        self, icm: Icm, base: Path, tmp_path: Path
    ) -> None:
        set_template(base, None)
        for name in ("one", "two"):
            write_chats(tmp_path / "loras" / name, as_messages)
        ran = icm("ingest", tmp_path / "loras", *CPU)
        assert ran.code == 0
        assert ran.err.count("tiny/llama has no chat template; chats are read as ChatML") == 1

    def test_instructions_have_a_plain_form_for_a_base_model_without_a_template(
        self, icm: Icm, base: Path, tmp_path: Path
    ) -> None:
        set_template(base, None)
        ran = icm("ingest", write_chats(tmp_path / "talks", as_alpaca), *CPU)
        assert (ran.code, "ChatML" in ran.err) == (0, False)

    @pytest.mark.slow
    def test_a_task_whose_chats_the_template_refuses_is_named_and_the_others_go_on(
        self, icm: Icm, base: Path, tmp_path: Path
    ) -> None:
        set_template(base, GEMMA.replace("{{ bos_token }}", ""))
        system = {"role": "system", "content": "Be brief."}
        for name in ("fine", "odd"):
            write_chats(tmp_path / "loras" / name, as_messages)
        write_rows(tmp_path / "loras" / "odd" / "samples.jsonl", [{"messages": [system, *question("red")]}] * 3)
        icm("ingest", tmp_path / "loras", "--no-vectors")
        ran = icm("vectors", *CPU, "--json")
        assert (ran.code, ran.events[-1]["extracted"], ran.events[-1]["failed"]) == (ExitCode.PARTLY, 1, ["odd"])
        assert "System role not supported" in ran.error["message"]

    def test_the_only_task_that_is_asked_for_and_cannot_be_read_is_an_error(
        self, icm: Icm, base: Path, tmp_path: Path
    ) -> None:
        icm("ingest", write_chats(tmp_path / "talks", as_messages), "--no-vectors")
        set_template(base, "{{ raise_exception('no chats') }}")
        ran = icm("vectors", "talks", *CPU, "--json")
        assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "data_error")

    def test_chats_that_the_template_refuses_leave_the_others_of_their_task(
        self, icm: Icm, base: Path, tmp_path: Path
    ) -> None:
        set_template(base, GEMMA.replace("{{ bos_token }}", ""))
        folder = write_chats(tmp_path / "talks", as_messages)
        system = {"role": "system", "content": "Be brief."}
        rows = [as_messages(word) for word in WORDS]
        write_rows(folder / "samples.jsonl", [{"messages": [system, *question("red")]}, *rows])
        icm("ingest", folder, "--no-vectors")
        event = icm("vectors", *CPU, "--json").events[0]
        assert event["vectors"] == 2
        assert event["skipped"].startswith("skipped 1 of 9 rows; the first: a chat was rejected by the chat template")


class TestEval:
    def test_only_the_answers_of_chats_are_scored(self, icm: Icm, base: Path, tmp_path: Path) -> None:
        icm("ingest", write_chats(tmp_path / "talks", as_messages), "--no-vectors")
        event = icm("eval", *CPU, "--json").events[0]
        # One byte is a token here, and the end of the turn is scored too.
        answers = [f"A {word} thing.<|im_end|>\n" for word in WORDS[:2]]
        assert event["sources"]["original"]["tokens"] == sum(map(len, answers))

    @pytest.mark.slow
    def test_another_chat_template_is_measured_again(self, icm: Icm, base: Path, tmp_path: Path) -> None:
        icm("ingest", write_chats(tmp_path / "talks", as_messages), "--no-vectors")
        before = icm("eval", *CPU, "--json").events[0]["sources"]["base"]["nats_per_token"]
        set_template(base, QWEN.replace("helpful", "very rude"))
        assert icm("eval", *CPU, "--json").events[0]["sources"]["base"]["nats_per_token"] != before

    def test_the_digest_of_the_chat_template_is_recorded(self, icm: Icm, base: Path, tmp_path: Path) -> None:
        icm("ingest", write_chats(tmp_path / "talks", as_messages), "--no-vectors")
        icm("eval", *CPU)
        with Store.open(tmp_path / "store", read_only=True) as store:
            settings = [dict(one.settings) for one in store.task("talks").measured]
        assert {row["template"] for row in settings} == {hashlib.sha256(QWEN.encode()).hexdigest()}

    def test_chats_are_read_with_the_chat_template_that_came_with_the_adapter(
        self, icm: Icm, base: Path, tmp_path: Path
    ) -> None:
        own = QWEN.replace("<|im_end|>", "<end of turn>")
        folder = write_chats(tmp_path / "talks", as_messages)
        (folder / "chat_template.jinja").write_text(own)
        icm("ingest", folder, "--no-vectors")
        event = icm("eval", *CPU, "--json").events[0]
        answers = [f"A {word} thing.<end of turn>\n" for word in WORDS[:2]]
        assert event["sources"]["original"]["tokens"] == sum(map(len, answers))
        shown = icm("show", "talks", "--json").document
        assert shown["template"] == hashlib.sha256(own.encode()).hexdigest()
        assert shown["has_own_template"]
        assert "of the adapter" in icm("show", "talks").out

    def test_a_task_that_cannot_be_measured_is_named_and_the_others_go_on(
        self, icm: Icm, base: Path, tmp_path: Path
    ) -> None:
        for name in ("fine", "odd"):
            write_chats(tmp_path / "loras" / name, as_messages)
        write_rows(tmp_path / "loras" / "odd" / "eval.jsonl", [{"text": "a"}])  # one token: nothing to predict
        icm("ingest", tmp_path / "loras", "--no-vectors")
        ran = icm("eval", *CPU, "--json")
        assert ran.code == ExitCode.PARTLY
        assert [event["task"] for event in ran.events if event["type"] == "task"] == ["fine"]
        assert ran.error["task"] == "odd"

    def test_a_file_of_chats_can_be_given(self, icm: Icm, base: Path, tmp_path: Path) -> None:
        icm("ingest", write_lora(tmp_path / "silent"), "--no-vectors")
        data = write_rows(tmp_path / "chats.jsonl", [as_sharegpt(word) for word in WORDS])
        assert icm("eval", "--data", data, *CPU).code == 0
