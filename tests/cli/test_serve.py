"""`icm serve`: its options, its log, and how it stops. What it serves is tested in tests/icmlora/serving/gateway."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from icm_cli.errors import ExitCode  # noqa: E402
from icmlora.serving.gateway import server  # noqa: E402
from icmlora.serving.gateway.settings import GatewaySettings  # noqa: E402
from registry.store import Store  # noqa: E402
from tests.cli.conftest import Ran, modules_of  # noqa: E402
from tests.icmlora.serving.gateway.gateways import wait_for  # noqa: E402
from tests.icmlora.serving.gateway.stub_engine import PIECES, StubEngine, running  # noqa: E402
from tests.icmlora.tiny_base import LABEL  # noqa: E402

Icm = Callable[..., Ran]
ENGINE = ("--engine-url", "http://127.0.0.1:9")
MAIN = "from icm_cli.app import main; main()"
STUCK = """
import time
from icmlora.io import staging
fill = staging._fill
def stick(folder, files):
    name, data = next(iter(files.items()))
    fill(folder, {name: data})
    time.sleep(600)
staging._fill = stick
"""
"""Makes a process that never gets beyond the first file of an adapter."""


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[GatewaySettings]:
    """The settings of servers that were started; none is really run."""
    started: list[GatewaySettings] = []
    monkeypatch.setattr(server, "serve", lambda listening, tasks, folders, settings: started.append(settings))
    return started


@pytest.fixture
def serve(icm: Icm, trained: Path, tmp_path: Path) -> Icm:
    """Run `icm serve` with folders of its own, on any free port."""
    own = ("serve", *ENGINE, "--adapters", tmp_path / "adapters", "--port", "0")
    return lambda *options: icm(*own, *options)


@pytest.fixture
def engine() -> StubEngine:
    """An engine whose base model is not on this machine: icm knows it by name, and imports nothing to compare it."""
    return StubEngine(model=LABEL)


@contextmanager
def served(engine: StubEngine, store: Path, folder: Path, *options: str, before: str = "") -> Iterator[Any]:
    """Run `icm serve` in a process of its own; yield it, with its address."""
    with running(engine) as url:
        words = [
            "--store",
            str(store),
            "serve",
            "--engine-url",
            url,
            "--adapters",
            str(folder),
            "--port",
            "0",
            *options,
        ]
        command = [sys.executable, "-c", before + MAIN, *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            process.url = process.stdout.readline().strip()  # type: ignore[attr-defined]
            yield process
        finally:
            process.kill()
            process.communicate()


def ask(url: str, model: str = "rules", **fields: object) -> Any:
    return httpx.post(f"{url}/v1/completions", json={"model": model, **fields}, timeout=120, trust_env=False)


def ask_in_vain(url: str) -> None:
    with pytest.raises(httpx.HTTPError):
        ask(url)


def test_the_address_is_the_answer(serve: Icm, settings: list[GatewaySettings]) -> None:
    ran = serve()
    assert ran.code == 0
    assert ran.out.startswith("http://127.0.0.1:")
    assert ran.err == "serving 3 tasks through the engine at http://127.0.0.1:9\n"
    assert settings[0].engine_url == "http://127.0.0.1:9"
    assert settings[0].token is None


def test_the_address_as_json(serve: Icm, settings: list[GatewaySettings]) -> None:
    (event,) = serve("--json").events
    assert event.keys() == {"type", "url", "engine_url", "tasks_count"}
    assert (event["type"], event["tasks_count"]) == ("listening", 3)


def test_the_defaults_of_the_options_are_those_of_the_gateway(serve: Icm, settings: list[GatewaySettings]) -> None:
    serve()
    assert settings == [GatewaySettings(engine_url="http://127.0.0.1:9", port=0, local_names=frozenset({"127.0.0.1"}))]


def test_options_reach_the_server(serve: Icm, settings: list[GatewaySettings]) -> None:
    ran = serve(
        *("--engine", "sglang", "--base-model", "tiny/llama", "--max-adapters", "7", "--max-waiting", "8"),
        *("--max-requests", "9", "--max-body", "1MiB", "--first-byte-timeout", "2"),
        *("--idle-timeout", "3", "--drain-seconds", "4", "--access-log", "--engine-token", "e"),
        *("--max-connections", "10", "--body-timeout", "6"),
    )
    assert ran.code == 0
    found = settings[0]
    assert (found.engine, found.base_model, found.engine_token, found.access_log) == ("sglang", "tiny/llama", "e", True)
    assert (found.max_adapters, found.max_waiting, found.max_requests) == (7, 8, 9)
    assert (found.max_body, found.first_byte_timeout, found.idle_timeout) == (1 << 20, 2, 3)
    assert (found.header_timeout, found.body_timeout, found.max_connections) == (6, 6, 10)
    assert found.drain_seconds == 4


@pytest.mark.parametrize(("options", "names"), [((), {"127.0.0.1"}), (("--token", "t"), None), (("--no-token",), None)])
def test_without_a_token_requests_have_to_be_for_this_machine(
    serve: Icm, settings: list[GatewaySettings], options: tuple[str, ...], names: set[str] | None
) -> None:
    serve(*options)
    assert settings[0].local_names == names


def test_an_empty_store_is_served_with_a_warning(icm: Icm, settings: list[GatewaySettings], tmp_path: Path) -> None:
    Store.open(tmp_path / "empty", create=True).close()
    ran = icm("--store", tmp_path / "empty", "serve", *ENGINE, "--adapters", tmp_path / "adapters", "--port", "0")
    assert "there are no tasks to serve yet" in ran.err


def test_the_address_of_the_engine_may_be_that_of_its_api(serve: Icm, settings: list[GatewaySettings]) -> None:
    assert serve("--engine-url", "http://127.0.0.1:9/v1/").code == 0
    assert settings[0].engine_url == "http://127.0.0.1:9"


def test_the_token_comes_from_where_the_user_says(
    serve: Icm, settings: list[GatewaySettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.setenv("ICM_SERVE_TOKEN", "from-environment")
    monkeypatch.setenv("ICM_ENGINE_TOKEN", "of-the-engine")
    for options in ((), ("--token", "flag"), ("--token-file", tmp_path / "token"), ("--no-token",)):
        assert serve(*options).code == 0
    assert [found.token for found in settings] == ["from-environment", "flag", "from-file", None]
    assert settings[0].engine_token == "of-the-engine"


@pytest.mark.parametrize(
    "options", [("--token", "a", "--no-token"), ("--token", ""), ("--token", "a b"), ("--token", "ä")]
)
def test_a_token_that_makes_no_sense_is_wrong_usage(
    serve: Icm, settings: list[GatewaySettings], options: tuple[str, ...]
) -> None:
    assert serve(*options).code == ExitCode.USAGE
    assert settings == []


def test_an_address_that_others_reach_needs_a_token_or_a_word(serve: Icm, settings: list[GatewaySettings]) -> None:
    ran = serve("--host", "0.0.0.0")
    assert (ran.code, settings) == (ExitCode.USAGE, [])
    assert "serving on 0.0.0.0 without a token gives everyone access" in ran.err
    assert serve("--host", "0.0.0.0", "--no-token").code == 0
    assert serve("--host", "0.0.0.0", "--token", "secret").code == 0


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (("--engine-url", "localhost:8000"), "is not an HTTP address"),
        (("--max-body", "much"), "'much' is not a size"),
        (("--adapters-size", "0"), "'0' is not a size"),
        (("--base-model", "acme/none"), "no task belongs to base model 'acme/none'"),
        (("--from", "none.icm"), "none.icm"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    serve: Icm, settings: list[GatewaySettings], options: tuple[str, ...], fact: str
) -> None:
    ran = serve(*options)
    assert ran.code != 0
    assert fact in ran.err
    assert settings == []


def test_without_a_store_there_is_nothing_to_serve(icm: Icm, settings: list[GatewaySettings]) -> None:
    assert icm("serve", *ENGINE).code == ExitCode.NO_STORE


def test_a_port_that_is_taken_is_named(serve: Icm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = serve("--port", port)
    assert (ran.code, f"127.0.0.1:{port}: Address already in use" in ran.err) == (ExitCode.FAILED, True)


def test_without_the_extra_the_error_says_what_to_install(serve: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("icmlora.serving.gateway")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delattr("icmlora.serving.gateway", raising=False)
    ran = serve()
    assert ran.code == ExitCode.FAILED
    assert "needs the package fastapi" in ran.err
    assert "pip install 'icm-lora[serve]'" in ran.err


@pytest.mark.slow
def test_the_help_imports_no_server() -> None:
    assert not {"fastapi", "uvicorn", "httpx", "torch"} & modules_of("serve", "--help")


def test_two_servers_do_not_share_their_folders(engine: StubEngine, trained: Path, serve: Icm, tmp_path: Path) -> None:
    with served(engine, trained, tmp_path / "adapters"):
        ran = serve()
    assert (ran.code, "another server uses this folder" in ran.err) == (ExitCode.FAILED, True)


@pytest.mark.one_case
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_in_flight_end(
    engine: StubEngine, trained: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with served(engine, trained, tmp_path / "adapters") as process:
        assert ask(process.url).status_code == 200
        engine.between = 0.3
        url = f"{process.url}/v1/completions"
        with httpx.stream("POST", url, json={"model": "rules", "stream": True}, timeout=120, trust_env=False) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            process.send_signal(number)
            rest = b"".join(pieces)
        assert rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(120) == 0
        out, err = process.communicate()
    assert (out, "stopping after the requests in flight\n" in err) == ("", True)
    assert "Traceback" not in err
    assert "POST" not in err, "requests are not logged"


@pytest.mark.slow
def test_a_request_that_takes_too_long_to_end_is_cut(engine: StubEngine, trained: Path, tmp_path: Path) -> None:
    engine.hold = threading.Event()
    with served(engine, trained, tmp_path / "adapters", "--drain-seconds", "1") as process:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(ask(process.url, "base")))
        thread.start()
        wait_for(lambda: engine.bodies("/v1/completions"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        thread.join()
        err = process.communicate()[1]
    assert answers[0].status_code == 503
    assert "Traceback" not in err
    assert "cancelled 1 request that did not finish within --drain-seconds" in err


@pytest.mark.parametrize(("addresses", "lines"), [(1, 0), (4, 1)])
def test_hundreds_of_halves_of_requests_leave_no_traceback_where_descriptors_are_few(
    engine: StubEngine, trained: Path, tmp_path: Path, addresses: int, lines: int
) -> None:
    err = ""
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    with served(engine, trained, tmp_path / "adapters", before=few) as process, ExitStack() as open_ones:
        host, port = process.url.removeprefix("http://").split(":")
        for number in range(400):
            place = (host, int(port)), 20, (f"127.0.0.{1 + number % addresses}", 0)
            open_ones.enter_context(socket.create_connection(*place)).sendall(b"POST /v1/compl")
        if addresses == 1:  # there are descriptors left for others
            with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.9")) as other:
                assert other.get(f"{process.url}/healthz").status_code == 200
        else:
            deadline = threading.Timer(120, process.kill)
            deadline.start()
            err = next(line for line in process.stderr if "out of file descriptors" in line)
            deadline.cancel()
        open_ones.close()
        wait_for(lambda: _is_healthy(process.url))
        process.send_signal(signal.SIGTERM)
        err += process.communicate()[1]
    assert "Traceback" not in err
    assert err.count("out of file descriptors for new connections") == lines


def _is_healthy(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return bool(httpx.get(f"{url}/healthz", trust_env=False).status_code == 200)
    return False


@pytest.mark.slow
def test_after_kill_9_while_an_adapter_is_written_the_next_start_works(
    engine: StubEngine, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    with served(engine, trained, folder, before=STUCK) as process:
        thread = threading.Thread(target=ask_in_vain, args=[process.url])
        thread.start()
        wait_for(lambda: any(".icm-" in path.name for path in folder.iterdir()))
        process.kill()
        thread.join()
    assert any(".icm-" in path.name for path in folder.iterdir())
    with served(engine, trained, folder) as process:
        assert ask(process.url).status_code == 200
    assert [path.name[:7] for path in folder.iterdir() if path.is_dir()] == ["sha256-"]
    assert not any(".icm-" in path.name for path in folder.iterdir())


@pytest.mark.slow
def test_adapters_of_a_killed_server_are_taken_over_by_the_next(
    engine: StubEngine, trained: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        with served(engine, trained, tmp_path / "adapters") as process:
            assert ask(process.url).status_code == 200
            process.kill()
    assert engine.loads == ["rules"]


@pytest.mark.slow
def test_with_json_the_log_is_json(engine: StubEngine, trained: Path, tmp_path: Path) -> None:
    with served(engine, trained, tmp_path / "adapters", "--json") as process:
        url = json.loads(process.url)["url"]
        assert ask(url).status_code == 200
        process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in process.communicate()[1].splitlines()]
    assert {"type", "time", "level", "message"} == set().union(*lines)
    assert any(line["message"].startswith("loaded rules (") for line in lines)


@pytest.mark.slow
def test_requests_are_logged_if_asked_for(engine: StubEngine, trained: Path, tmp_path: Path) -> None:
    with served(engine, trained, tmp_path / "adapters", "--access-log") as process:
        assert ask(process.url, "base", stream=True).content.count(b"piece") == PIECES
        process.send_signal(signal.SIGTERM)
        assert '"POST /v1/completions HTTP/1.1" 200' in process.communicate()[1]
