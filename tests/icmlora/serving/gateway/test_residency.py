"""Which adapters are in the engine: loaded once, unloaded when idle, replaced when their task is."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from icmlora import Fleet
from icmlora.errors import CodeError
from icmlora.serving.folders import AdapterFolders
from icmlora.serving.gateway import residency
from icmlora.serving.gateway.settings import GatewaySettings
from icmlora.serving.tasks import ServedTask, ServedTasks, open_tasks
from tests.cli.tiny_fleet import icm_quietly, write_lora
from tests.icmlora.serving.conftest import Served, folder_bytes
from tests.icmlora.serving.gateway.gateways import Gateway, StartGateway, running_gateway, wait_for
from tests.icmlora.serving.gateway.stub_engine import StubEngine


@pytest.fixture
def slow_writing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing adapters waits for this event."""
    go, write = threading.Event(), ServedTasks.write

    def wait(self: ServedTasks, task: ServedTask, directory: Path) -> None:
        assert go.wait(120)
        write(self, task, directory)

    monkeypatch.setattr(ServedTasks, "write", wait)
    return go


@contextmanager
def asking(gateway: Gateway, *models: str, **fields: object) -> Iterator[list[Any]]:
    """Ask for several models at once; after the block the answers are in the list."""
    answers: list[Any] = []
    with ThreadPoolExecutor(len(models)) as threads:
        futures = [threads.submit(gateway.ask, model, **fields) for model in models]
        yield answers
        answers.extend(future.result() for future in futures)


def test_the_engine_gets_the_folder_that_materialize_writes(
    gateway: Gateway, engine: StubEngine, served: Served, tmp_path: Path
) -> None:
    gateway.ask("poems")
    Fleet(served.store).materialize("poems", tmp_path / "written")
    assert folder_bytes(Path(engine.adapters["poems"])) == folder_bytes(tmp_path / "written")


def test_a_bundle_alone_is_enough(start: StartGateway, engine: StubEngine, served: Served) -> None:
    gateway = start(tasks=open_tasks(None, served.bundle, command="test"), base_model=served.label)
    assert gateway.ask("poems").status_code == 200
    assert engine.loads == ["poems"]


def test_an_adapter_is_written_and_loaded_once_however_many_ask(
    gateway: Gateway, engine: StubEngine, slow_writing: threading.Event
) -> None:
    with asking(gateway, *["rules"] * 16) as answers:
        wait_for(lambda: gateway.metric("icm_adapter_misses_total") == 16)
        slow_writing.set()
    assert [answer.status_code for answer in answers] == [200] * 16
    assert engine.loads == ["rules"]
    assert gateway.metric("icm_materialize_seconds_count") == 1


def test_a_client_that_leaves_does_not_stop_the_loading_for_others(
    gateway: Gateway, engine: StubEngine, slow_writing: threading.Event
) -> None:
    with asking(gateway, "rules") as answers:
        wait_for(lambda: gateway.metric("icm_adapter_misses_total") == 1)
        with pytest.raises(Exception, match="timed out"):
            gateway.client.post("/v1/completions", json={"model": "rules"}, timeout=0.2)
        slow_writing.set()
    assert answers[0].status_code == 200
    assert engine.loads == ["rules"]


def test_tasks_that_wait_are_written_while_the_engine_loads_another_one(gateway: Gateway, engine: StubEngine) -> None:
    engine.holds_load = threading.Event()
    with asking(gateway, "rules", "poems", "silent") as answers:
        wait_for(lambda: gateway.metric("icm_materialize_seconds_count") == 3)
        assert engine.adapters == {}
        engine.holds_load.set()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert gateway.metric("icm_materialize_seconds_count") == 3
    assert len(gateway.folders.keys()) == 3


def test_only_so_many_tasks_may_wait(start: StartGateway, engine: StubEngine, slow_writing: threading.Event) -> None:
    gateway = start(max_waiting=1)
    with asking(gateway, "rules") as answers:
        wait_for(lambda: gateway.metric("icm_adapter_misses_total") == 1)
        refused = gateway.ask("poems")
        slow_writing.set()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_waiting")
    assert int(refused.headers["retry-after"]) > 0
    assert answers[0].status_code == 200
    assert gateway.ask("poems").status_code == 200


def test_the_adapter_used_longest_ago_goes_first(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(max_adapters=2)
    for name in ("poems", "rules", "poems", "silent"):
        assert gateway.ask(name).status_code == 200
    assert (engine.unloads, sorted(engine.adapters)) == (["rules"], ["poems", "silent"])
    assert gateway.metric("icm_loaded_adapters") == 2
    assert len(gateway.folders.keys()) == 2


@pytest.mark.slow
def test_folders_keep_below_the_limit(start: StartGateway, engine: StubEngine, tmp_path: Path, served: Served) -> None:
    tasks = open_tasks(served.store, None, command="test")
    sizes = {}
    for name in tasks.names():
        found = tasks.find(name)
        assert found is not None
        tasks.write(found, tmp_path / name)
        sizes[name] = sum(len(data) for data in folder_bytes(tmp_path / name).values())
    gateway = start(room=sum(sizes.values()) - 1)
    for name in sizes:
        assert gateway.ask(name).status_code == 200
    assert gateway.folders.size < sum(sizes.values())
    assert len(engine.unloads) == 1
    assert engine.gone == []


def test_a_full_disk_makes_an_idle_adapter_go(
    start: StartGateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start()
    assert gateway.ask("rules").status_code == 200
    write = ServedTasks.write

    def write_if_alone(self: ServedTasks, task: ServedTask, directory: Path) -> None:
        if engine.adapters:  # less than the limit, and yet no space: others fill the disk
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, task, directory)

    monkeypatch.setattr(ServedTasks, "write", write_if_alone)
    assert gateway.ask("poems").status_code == 200
    assert (engine.unloads, sorted(engine.adapters)) == (["rules"], ["poems"])


def test_a_full_disk_without_an_idle_adapter_is_said(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ServedTasks, "write", full)
    answer = start().ask("poems")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_room")


def test_an_adapter_that_alone_is_over_the_limit_is_refused(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(room=1000)
    answer = gateway.ask("rules")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_room")
    assert (engine.loads, gateway.folders.keys()) == ([], [])


def test_a_task_waits_for_room_while_all_adapters_are_in_use(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(max_adapters=1)
    gateway.ask("rules")
    engine.hold = threading.Event()
    with asking(gateway, "rules") as answers:
        wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 2)
        with asking(gateway, "poems") as others:
            wait_for(lambda: gateway.metric("icm_adapter_misses_total") == 2)
            engine.hold.set()
    assert [answer.status_code for answer in (*answers, *others)] == [200, 200]
    assert (engine.loads, engine.gone) == (["rules", "poems"], [])


@pytest.mark.slow
def test_an_old_version_makes_room_once_its_requests_have_ended(
    start: StartGateway, engine: StubEngine, served: Served, tmp_path: Path
) -> None:
    gateway = start(max_adapters=1)
    gateway.ask("rules")
    engine.hold = threading.Event()
    with asking(gateway, "rules") as answers:
        wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 2)
        icm_quietly(served.store, "ingest", write_lora(tmp_path / "rules", seed=5), "--on-conflict", "version")
        with asking(gateway, "rules") as later:
            wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 3)
            with asking(gateway, "poems") as others:  # waits for both versions
                wait_for(lambda: gateway.metric("icm_adapter_misses_total") == 3)
                engine.hold.set()
    assert [answer.status_code for answer in (*answers, *later, *others)] == [200] * 3
    assert (list(engine.adapters), len(gateway.folders.keys())) == (["poems"], 1)
    assert engine.gone == []


@pytest.mark.slow
def test_an_adapter_with_requests_in_flight_stays(
    start: StartGateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_PATIENCE", 0.1)
    gateway = start(max_adapters=1)
    gateway.ask("rules")
    engine.hold = threading.Event()
    with asking(gateway, "rules") as answers:
        wait_for(lambda: gateway.metric("icm_requests_in_flight") == 1)
        wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 2)
        refused = gateway.ask("poems")
        engine.hold.set()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_room")
    assert (answers[0].status_code, engine.unloads) == (200, [])
    assert gateway.ask("poems").status_code == 200
    assert (engine.unloads, engine.gone) == (["rules"], [])


@pytest.mark.slow
def test_an_adapter_stays_for_a_moment_after_a_request_was_cut_short(
    start: StartGateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_PATIENCE", 0.1)
    gateway = start(max_adapters=1)
    gateway.ask("rules")
    engine.hold = threading.Event()
    with pytest.raises(Exception, match="timed out"):
        gateway.client.post("/v1/completions", json={"model": "rules"}, timeout=0.2)
    wait_for(lambda: engine.aborted == 1)
    engine.hold = None
    assert gateway.ask("poems").status_code == 503
    assert "rules" in engine.adapters


def test_an_adapter_is_unloaded_before_its_folder_is_deleted(
    start: StartGateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, discard = [], AdapterFolders.discard

    def look(self: AdapterFolders, key: str) -> None:
        seen.append("rules" in engine.adapters)
        discard(self, key)

    monkeypatch.setattr(AdapterFolders, "discard", look)
    gateway = start(max_adapters=1)
    gateway.ask("rules")
    gateway.ask("poems")
    assert seen == [False]


@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_task_that_was_replaced_is_loaded_anew(
    start: StartGateway, engine: StubEngine, served: Served, tmp_path: Path, kind: Any
) -> None:
    engine.kind = kind
    gateway = start()
    gateway.ask("poems")
    (before,) = engine.adapters.values()
    icm_quietly(served.store, "ingest", write_lora(tmp_path / "poems", seed=77), "--on-conflict", "version")
    # A store that takes a quarter of a second to read is not waited for: the first answer may be of before.
    wait_for(lambda: gateway.ask("poems").status_code == 200 and before not in engine.adapters.values())
    (after,) = engine.adapters.values()
    assert not Path(before).exists()
    assert folder_bytes(Path(after))["adapter_model.safetensors"] == (
        (tmp_path / "poems" / "adapter_model.safetensors").read_bytes()
    )
    assert engine.gone == []


@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_requests_in_flight_keep_the_version_that_they_began_with(
    start: StartGateway, engine: StubEngine, served: Served, tmp_path: Path, kind: Any
) -> None:
    engine.kind = kind
    gateway = start()
    gateway.ask("poems")
    (before,) = engine.adapters.values()
    engine.hold = threading.Event()
    with asking(gateway, "poems") as answers:
        wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 2)
        icm_quietly(served.store, "ingest", write_lora(tmp_path / "poems", seed=77), "--on-conflict", "version")
        with asking(gateway, "poems") as later:
            wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 3)
            assert Path(before).is_dir()
            engine.hold.set()
    assert [answer.status_code for answer in (*answers, *later)] == [200, 200]
    wait_for(lambda: not Path(before).exists())
    assert len(engine.adapters) == 1
    assert engine.gone == []


@pytest.mark.slow
def test_a_version_that_comes_back_while_it_is_still_in_use_is_kept(
    start: StartGateway, engine: StubEngine, served: Served, tmp_path: Path
) -> None:
    gateway = start()
    gateway.ask("rules")
    (first,) = engine.adapters.values()
    rules = served.base.parent / "loras" / "rules"
    engine.hold = threading.Event()
    with asking(gateway, "rules") as answers:
        wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 2)
        icm_quietly(served.store, "ingest", write_lora(tmp_path / "rules", seed=5), "--on-conflict", "version")
        with asking(gateway, "rules"):
            wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 3)
            icm_quietly(served.store, "ingest", rules, "--on-conflict", "version")
            with asking(gateway, "rules") as last:
                wait_for(lambda: len(engine.bodies("/v1/chat/completions")) == 4)
                engine.hold.set()
    assert (answers[0].status_code, last[0].status_code) == (200, 200)
    wait_for(lambda: len(gateway.folders.keys()) == 1)
    assert gateway.ask("rules").status_code == 200
    assert engine.gone == []
    assert Path(engine.adapters["rules"]).is_dir()
    assert first == engine.adapters["rules"]


def test_a_task_that_is_new_in_the_store_is_found(gateway: Gateway, served: Served, tmp_path: Path) -> None:
    assert gateway.ask("fresh").status_code == 404
    icm_quietly(served.store, "ingest", write_lora(tmp_path / "fresh", seed=9))
    assert gateway.ask("fresh").status_code == 200


@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_task_that_is_removed_is_no_longer_served(
    start: StartGateway, engine: StubEngine, served: Served, kind: Any
) -> None:
    engine.kind = kind
    gateway = start()
    assert gateway.ask("poems").status_code == 200
    icm_quietly(served.store, "rm", "poems", "--yes")
    assert gateway.ask("poems").status_code == 404
    assert (engine.adapters, gateway.folders.keys()) == ({}, [])


def test_a_bundle_that_is_replaced_is_read_anew(
    start: StartGateway, engine: StubEngine, served: Served, tmp_path: Path
) -> None:
    bundle = tmp_path / "fleet.icm"
    icm_quietly(served.store, "export", bundle, "poems")
    gateway = start(tasks=open_tasks(None, bundle, command="test"), base_model=served.label)
    gateway.ask("poems")
    assert gateway.ask("rules").status_code == 404
    icm_quietly(served.store, "export", bundle, "--force")
    assert gateway.ask("rules").status_code == 200
    assert gateway.ask("poems").status_code == 200
    assert engine.loads == ["poems", "rules"], "poems is the same in both"


def test_a_warm_task_reads_no_store(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.ask("rules")
    monkeypatch.setattr(ServedTasks, "find", lambda self, name: pytest.fail("the store was read"))
    assert gateway.ask("rules").status_code == 200


def test_a_warm_task_answers_while_the_store_cannot_be_read(gateway: Gateway, served: Served) -> None:
    gateway.ask("rules")
    shutil.rmtree(served.store)
    assert gateway.ask("rules").status_code == 200
    answer = gateway.ask("poems")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")


def test_a_task_whose_files_are_deleted_before_it_is_written_is_looked_up_again(
    gateway: Gateway, engine: StubEngine, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = ServedTasks.write, []

    def change_first(self: ServedTasks, task: ServedTask, directory: Path) -> None:
        if not calls:
            Fleet(served.store).evict(["rules"], max_error=10)
        calls.append(task.key)
        write(self, task, directory)

    monkeypatch.setattr(ServedTasks, "write", change_first)
    assert gateway.ask("rules").status_code == 200
    assert len(set(calls)) == 2
    assert engine.adapters["rules"].endswith(calls[1])
    assert gateway.folders.keys() == [calls[1]]


def test_versions_of_a_task_are_models_of_their_own(
    gateway: Gateway, engine: StubEngine, served: Served, tmp_path: Path
) -> None:
    gateway.ask("rules")
    icm_quietly(
        served.store, "ingest", write_lora(tmp_path / "rules", seed=5), "--on-conflict", "version", "--no-vectors"
    )
    for model in ("rules@1", "rules", "rules@2"):
        assert gateway.ask(model).status_code == 200
    assert engine.adapters["rules@1"] != engine.adapters["rules"] == engine.adapters["rules@2"]
    for model in ("rules@3", "rules@", "rules@" + 30 * "9", "rules@none", "Rules@1"):
        assert gateway.ask(model).status_code == 404


def test_a_restarted_engine_is_given_its_adapters_again(gateway: Gateway, engine: StubEngine) -> None:
    gateway.ask("rules")
    engine.adapters.clear()
    assert gateway.ask("rules").status_code == 200
    assert engine.loads == ["rules", "rules"]
    assert gateway.metric("icm_materialize_seconds_count") == 1, "the folder was there"


def test_sglang_that_was_restarted_is_given_its_adapters_again(start: StartGateway, engine: StubEngine) -> None:
    engine.kind = "sglang"
    gateway = start()
    gateway.ask("poems")
    engine.adapters.clear()
    assert gateway.ask("poems").status_code == 200
    assert len(engine.loads) == 2


def test_a_refusal_for_another_reason_is_passed_on_and_nothing_is_loaded_again(
    gateway: Gateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.ask("rules")
    monkeypatch.setattr(engine, "_missing", lambda fields: (404, {"detail": "Not Found"}))
    answer = gateway.ask("rules", "/v1/embeddings")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    assert engine.loads == ["rules"]


def test_a_bad_request_to_sglang_is_not_taken_for_a_restart(
    start: StartGateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.kind = "sglang"
    gateway = start()
    gateway.ask("poems")
    before = len(engine.asked)
    monkeypatch.setattr(engine, "_missing", lambda fields: (400, {"message": "temperature must be positive"}))
    assert gateway.ask("poems").json() == {"message": "temperature must be positive"}
    assert len(engine.asked) == before + 1, "nothing was asked but this"


@pytest.mark.slow
def test_the_next_gateway_takes_over_what_the_engine_has(
    engine: StubEngine, engine_url: str, served: Served, tmp_path: Path, start: StartGateway
) -> None:
    folders = AdapterFolders(tmp_path / "adapters", 1 << 30, alone=True)
    tasks = open_tasks(served.store, None, command="test")
    with running_gateway(tasks, folders, GatewaySettings(engine_url=engine_url)) as url:
        import httpx

        for name in ("rules", "poems"):
            assert httpx.post(f"{url}/v1/completions", json={"model": name}, trust_env=False).status_code == 200
    folders.close()
    shutil.rmtree(engine.adapters["poems"])
    (tmp_path / "adapters" / f"sha256-{'0' * 64}").mkdir()
    gateway = start()
    assert gateway.ask("rules").status_code == 200
    assert gateway.ask("poems").status_code == 200
    assert (engine.loads, engine.unloads) == (["rules", "poems", "poems"], ["poems"])
    assert len(gateway.folders.keys()) == 2, "a folder that the engine does not have is gone"


def test_a_task_of_another_base_model_is_refused_and_said_why(start: StartGateway, engine: StubEngine) -> None:
    engine.model = "acme/another"
    answer = start().ask("rules")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_unsuited")
    assert "'acme/another'" in answer.json()["error"]["message"]
    assert engine.loads == []


@pytest.mark.parametrize(
    ("model", "said"), [(None, "serving 3 tasks"), ("acme/another", "no task uses this base model")]
)
def test_the_log_says_at_the_start_which_tasks_are_for_the_engine(
    start: StartGateway, engine: StubEngine, log: pytest.LogCaptureFixture, model: str | None, said: str
) -> None:
    engine.model = model or engine.model
    start()
    wait_for(lambda: said in log.text)


def test_adapters_of_the_plug_in_are_warned_about_once(
    gateway: Gateway, engine: StubEngine, log: pytest.LogCaptureFixture
) -> None:
    engine.adapters["rules"] = f"/dev/shm/icm-0/vllm/sha256-{'a' * 64}"
    for _ in range(3):
        assert gateway.ask("rules").status_code == 200
    assert (engine.loads, log.text.count("was loaded by icm's vLLM plug-in")) == ([], 1)


def test_the_user_may_say_which_base_model_the_engine_runs(
    start: StartGateway, engine: StubEngine, served: Served
) -> None:
    engine.model = "renamed"
    assert start(base_model=served.label).ask("rules").status_code == 200


def test_sglang_would_ignore_a_part_of_an_adapter_so_the_gateway_refuses_it(
    start: StartGateway, engine: StubEngine
) -> None:
    engine.kind = "sglang"
    gateway = start()
    answer = gateway.ask("rules")  # q, k and down, but not v
    assert answer.status_code == 404
    assert "q_proj and v_proj together" in answer.json()["error"]["message"]
    assert engine.loads == []


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks whose first writing fails."""
    failed: list[str] = []
    write = ServedTasks.write

    def fail_first(self: ServedTasks, task: ServedTask, directory: Path) -> None:
        if task.name not in failed:
            failed.append(task.name)
            raise CodeError("the code is damaged")
        write(self, task, directory)

    monkeypatch.setattr(ServedTasks, "write", fail_first)
    return failed


def test_a_task_that_cannot_be_written_says_why(
    gateway: Gateway, failing: list[str], log: pytest.LogCaptureFixture
) -> None:
    answers = [gateway.ask("rules") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503] * 3, "a failure is not tried again at once"
    assert answers[0].json()["error"]["message"] == "The adapter of 'rules' could not be written: the code is damaged"
    assert "cannot serve rules: The adapter" in log.text
    assert gateway.ask("poems").status_code == 503
    assert gateway.folders.keys() == []


def test_a_task_that_could_not_be_written_is_tried_again_later(
    gateway: Gateway, failing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_REMEMBERED", 0.0)
    assert [gateway.ask("rules").status_code for _ in range(2)] == [503, 200]


def test_one_line_is_logged_for_each_adapter_that_comes_or_goes(
    start: StartGateway, log: pytest.LogCaptureFixture
) -> None:
    gateway = start(max_adapters=1)
    for name in ("rules", "poems", "poems"):
        gateway.ask(name)
    records = [record for record in log.records if record.name.startswith("icmlora.") and record.levelname == "INFO"]
    lines = [" ".join(record.getMessage().split()[:2]).rstrip(":") for record in records]
    lines = [line for line in lines if line != "the engine"]  # what it runs, whenever that is known
    assert lines == ["loaded rules", "unloaded rules", "loaded poems"]
