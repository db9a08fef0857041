"""A process that has imported what takes long and forks a child per command line: a run to be killed starts at once.

    stdin   {"argv": [...], "env": {...}, "out": FILE, "sabotage": NAMES}     one JSON line per run
            an empty line: wait for the run that started last
    stdout  the child's pid; once it is waited for, its exit status, negative for a signal

It is a process of its own because torch refuses to train in the fork of a process that has trained.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
SMALL = "small"
"""Instead of a command of icm: one of `tests.registry.writing`, which reports the facts that the store acknowledged."""
_EVENT = re.compile(r"^\{(?:[^\n]*|\n.*?\n)\}$", re.DOTALL | re.MULTILINE)
"""An object on a line of its own, or a document, whose inner lines are indented."""


@dataclass(frozen=True)
class Run:
    """The outcome of one command: its exit status and output lines."""

    status: int
    lines: tuple[str, ...]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON lines and the JSON document, without one that the kill cut off."""
        return [json.loads(found) for found in _EVENT.findall("\n".join(self.lines))]


class Zygote:
    """The parent's end."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.zygote"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()  # ready

    def run(
        self,
        argv: Sequence[object],
        *,
        env: dict[str, str],
        out: Path,
        sabotage: str = "",
        then: Callable[[int], object] | None = None,
    ) -> Run:
        """Run one command line; `then` gets the pid and may wait and kill it, or run other commands."""
        out.touch()  # the child may be killed before it opens it
        order = {"argv": [str(word) for word in argv], "env": env, "out": str(out), "sabotage": sabotage}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = self._answer()
        if then is not None:
            then(pid)  # the pid stays the child's until it is waited for
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        status = self._answer()
        return Run(status, tuple(out.read_text(encoding="utf-8", errors="replace").splitlines()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def wait_until(pid: int, state: str) -> None:
    """Wait until a process is stopped, "T", or has ended and is not yet waited for, "Z"."""
    deadline = time.monotonic() + 120
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != state:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _child(order: dict[str, Any]) -> None:
    for number in (1, 2):
        os.dup2(os.open(order["out"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), number)
    os.environ.update(order["env"])
    for name in order["sabotage"].split():
        from tests.faults import sabotage

        getattr(sabotage, name)()
    if order["argv"][0] == SMALL:
        from tests.faults import small

        small.run(*order["argv"][1:])
        os._exit(0)
    from icm_cli.app import run

    status = run(order["argv"])
    sys.stdout.flush()
    os._exit(int(status))


def _serve() -> None:
    # What takes seconds: PEFT, a model, and torch's compiler, which every optimizer imports.
    import peft.tuners.lora  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from icmlora.fleet.bundles import import_ as importing
    from icmlora.fleet.ingest import files as ingest_files
    from icmlora.fleet.train import run as training

    # A run of a second then has several checkpoints and commits, with kills between them.
    training._CHECKPOINT_SECONDS = 0.02
    ingest_files._BATCH_ADAPTERS = 2
    importing._BATCH_BYTES = 4096
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    answers.write("0\n")
    running: list[int] = []
    while line := sys.stdin.readline():
        if not line.strip():
            answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(running.pop(), 0)[1])}\n")
            continue
        pid = os.fork()
        if pid == 0:
            try:
                _child(json.loads(line))
            finally:
                os._exit(99)
        running.append(pid)
        answers.write(f"{pid}\n")


if __name__ == "__main__":
    _serve()
