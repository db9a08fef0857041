"""The context of a task before its requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from icmlora.base_models.examples.context import TaskContext
from icmlora.fleet.few_shot.context_choice import kept_files
from icmlora.serving.tasks import ServedTask
from registry.store import Store
from tests.icmlora.serving.conftest import Served
from tests.icmlora.serving.gateway.gateways import Gateway, StartGateway
from tests.icmlora.serving.gateway.stub_engine import StubEngine

ASKED, ANSWERED = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}
HELLO = {"role": "user", "content": "hello"}
TEXT = TaskContext("one\n\n")
CHAT = TaskContext("2 + 2? four\n\n", ({"role": "system", "content": "Be brief."}, ASKED, ANSWERED))
ON, OFF = {"icm-context": "on"}, {"icm-context": "off"}


def keep(served: Served, context: TaskContext, task: str = "rules") -> None:
    keep_files(served, context.files, task)


def keep_files(served: Served, files: Mapping[str, bytes], task: str = "rules") -> None:
    with Store.open(served.store) as store:
        extras = kept_files(store.blobs, files)
        store.update(task, lambda known: replace(known, final=replace(known.final, extras=extras)))


def ask(gateway: Gateway, route: str, headers: dict[str, str] = ON, **fields: object) -> Any:
    return gateway.client.post(route, json={"model": "rules", **fields}, headers=headers)


def test_the_context_stands_before_a_prompt_that_wants_it(gateway: Gateway, served: Served) -> None:
    keep(served, TEXT)
    answer = ask(gateway, "/v1/completions", prompt="two")
    assert (answer.json()["asked"]["prompt"], answer.headers["icm-context"]) == ("one\n\ntwo", "on")
    assert ask(gateway, "/v1/completions", prompt=["two", "three"]).json()["asked"]["prompt"] == [
        "one\n\ntwo",
        "one\n\nthree",
    ]


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("context", "route", "fields", "expected"),
    [
        (CHAT, "/v1/chat/completions", {"messages": [HELLO]}, {"messages": [*CHAT.messages, HELLO]}),
        (TEXT, "/v1/chat/completions", {"messages": [HELLO]},
         {"messages": [{"role": "system", "content": "one"}, HELLO]}),
        (CHAT, "/v1/messages", {"messages": [HELLO]}, {"system": "Be brief.", "messages": [ASKED, ANSWERED, HELLO]}),
        (CHAT, "/v1/messages", {"system": "Sing.", "messages": [HELLO]},
         {"system": "Sing.", "messages": [ASKED, ANSWERED, HELLO]}),
        (TEXT, "/v1/messages", {"system": "Sing.", "messages": [HELLO]},
         {"system": "one\n\nSing.", "messages": [HELLO]}),
        (CHAT, "/v1/responses", {"input": "hello"}, {"input": [*CHAT.messages, HELLO]}),
        (CHAT, "/v1/responses", {"input": "hello", "instructions": "Sing."},
         {"input": [ASKED, ANSWERED, HELLO], "instructions": "Sing."}),
        (TEXT, "/v1/responses", {"input": "hello", "instructions": "Sing."},
         {"input": "hello", "instructions": "one\n\nSing."}),
    ],
)  # fmt: skip
def test_every_api_gets_it_in_its_own_form(
    gateway: Gateway, served: Served, context: TaskContext, route: str, fields: dict[str, Any], expected: Any
) -> None:
    keep(served, context)
    assert ask(gateway, route, **fields).json()["asked"] == {"model": "rules", **expected}


def test_calls_of_tools_are_sent_as_json_text(gateway: Gateway, served: Served) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    keep(served, TaskContext("x", (ASKED, {"role": "assistant", "content": "", "tool_calls": [call]})))
    sent = ask(gateway, "/v1/chat/completions", messages=[HELLO]).json()["asked"]["messages"][1]
    assert json.loads(sent["tool_calls"][0]["function"]["arguments"]) == {"a": 2}


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/v1/completions", {"prompt": [1, 2]}),
        ("/v1/embeddings", {"input": "two"}),
        ("/v1/responses", {"input": "two", "previous_response_id": "resp_1"}),
        ("/v1/chat/completions", {"messages": []}),
    ],
)
def test_a_request_before_which_none_can_stand_is_passed_on_as_it_is(
    gateway: Gateway, served: Served, route: str, fields: dict[str, Any]
) -> None:
    keep(served, TEXT)
    answer = ask(gateway, route, **fields)
    assert (answer.json()["asked"], answer.headers["icm-context"]) == ({"model": "rules", **fields}, "unfit")


def test_a_task_with_an_adapter_of_its_own_is_served_without_unless_asked(
    gateway: Gateway, served: Served, engine: StubEngine
) -> None:
    keep(served, TEXT)
    answer = ask(gateway, "/v1/completions", {}, prompt="two")
    assert answer.json()["asked"]["prompt"] == "two"
    assert "icm-context" not in answer.headers
    ask(gateway, "/v1/completions", prompt="two")
    assert "icm-context" not in engine.headers


def test_a_generated_task_is_served_with_it_unless_the_request_says_off(
    gateway: Gateway, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(served, TEXT)
    monkeypatch.setattr(ServedTask, "is_generated", True)
    assert ask(gateway, "/v1/completions", {}, prompt="two").json()["asked"]["prompt"] == "one\n\ntwo"
    assert ask(gateway, "/v1/completions", OFF, prompt="two").json()["asked"]["prompt"] == "two"


def test_another_word_in_the_header_is_refused(gateway: Gateway, served: Served) -> None:
    assert ask(gateway, "/v1/completions", {"icm-context": "maybe"}, prompt="two").status_code == 400


def test_a_request_that_is_too_long_behind_it_is_answered_without(
    gateway: Gateway, served: Served, engine: StubEngine
) -> None:
    keep(served, TaskContext("x" * 1000))
    engine.longest = 500
    answer = ask(gateway, "/v1/completions", prompt="two")
    assert (answer.status_code, answer.headers["icm-context"]) == (200, "too-long")
    assert answer.json()["asked"]["prompt"] == "two"
    assert gateway.metric('icm_contexts_total{result="too-long"}') == 1
    assert ask(gateway, "/v1/completions", prompt="y" * 600).status_code == 400


def test_a_task_without_a_context_says_so_to_a_request_that_wants_one(gateway: Gateway) -> None:
    answer = ask(gateway, "/v1/completions", prompt="two")
    assert (answer.status_code, answer.headers["icm-context"]) == (200, "none")
    assert gateway.metric('icm_contexts_total{result="none"}') == 1


def test_another_context_is_taken_up_by_the_next_request(gateway: Gateway, served: Served) -> None:
    keep(served, TEXT)
    ask(gateway, "/v1/completions", prompt="two")
    keep(served, TaskContext("other\n\n"))
    assert ask(gateway, "/v1/completions", prompt="two").json()["asked"]["prompt"] == "other\n\ntwo"


def test_files_that_are_no_context_are_told_and_left(
    gateway: Gateway, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    keep_files(served, {"context.json": b"[]"})
    answer = ask(gateway, "/v1/completions", prompt="two")
    assert (answer.json()["asked"]["prompt"], answer.headers["icm-context"]) == ("two", "none")
    assert "cannot read the context of rules" in caplog.text


def test_sglang_gets_its_name_of_the_adapter_too(start: StartGateway, served: Served, engine: StubEngine) -> None:
    engine.kind = "sglang"
    keep(served, TEXT, "poems")
    asked = ask(start(), "/v1/completions", model="poems", prompt="two").json()["asked"]
    assert asked["prompt"] == "one\n\ntwo"
    assert asked["model"].startswith("base:poems@")


def test_the_engines_prefix_cache_is_among_the_figures(gateway: Gateway, engine: StubEngine) -> None:
    engine.counts = (
        'vllm:prefix_cache_queries_total{engine="0"} 100.0\nvllm:prefix_cache_queries_total{engine="1"} 20.0\n'
        'vllm:prefix_cache_hits_total{engine="0"} 90.0\n'
    )
    assert (gateway.metric("icm_engine_prefix_tokens "), gateway.metric("icm_engine_prefix_tokens_found")) == (120, 90)
