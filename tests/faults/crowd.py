"""Concurrent processes on one store, each running one command after another.

Every command succeeds, reports the process that it waited for until the timeout, or reports that another command
changed its task. All output is correct, and the store is sound at the end. `python -m tests.faults.crowd` runs for
three minutes and writes figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SECONDS, WORKERS, LOCK_TIMEOUT = 180.0, 8, 30.0
_MAX_ERROR = "0.7"
_NAMES = ("poems", "rules", "silent", *(f"more-{number}" for number in range(5)))
_TRAIN = ("--no-eval", "--refine", "0", "--device", "cpu", "--steps", "12")
_CHANGED = ("task_not_found", "task_conflict", "last_copy")
"""Kinds of errors where another command removed, replaced or evicted the task in between."""
_COMMANDS: dict[str, tuple[float, tuple[str, ...]]] = {
    "ingest": (2, ("ingest", "{loras}/{name}", "--no-vectors")),
    "ingest all again": (1, ("ingest", "{loras}", "--restore", "--no-vectors")),
    "encode": (1, ("encode", "--max-error", "0.3")),
    "evict": (1.5, ("evict", "{name}", "--max-error", _MAX_ERROR)),
    "evict all": (0.5, ("evict", "--max-error", _MAX_ERROR)),
    "update": (1, ("train", "--update", *_TRAIN)),
    "materialize": (3, ("materialize", "{name}", "-o", "{own}/out", "--force")),
    "ls": (2, ("ls",)),
    "stats": (1, ("stats",)),
    "edit": (1, ("edit", "{name}", "--tag", "seen")),
    "rm": (0.7, ("rm", "{name}", "--yes")),
    "prune": (1, ("prune", "--yes", "--older-than", "0s")),
    "verify": (0.7, ("verify", "--read-data")),
    "export": (0.7, ("export", "{own}/fleet.icm", "--force")),
}
"""How often each command is chosen, and its command line."""


@dataclass(frozen=True)
class Done:
    """One completed command."""

    command: str
    code: int
    seconds: float
    error: dict[str, Any]  # as --json prints it
    wrong: str | None  # the error in its output

    @property
    def is_locked(self) -> bool:
        """Whether it timed out, and reported the process that it waited for."""
        message = self.error.get("message", "")  # empty if it succeeded
        return self.code == 11 and any(words in message for words in ("in use by ", "database", "is being written"))

    @property
    def is_expected(self) -> bool:
        """Whether it succeeded, or reported the obstacle."""
        if self.wrong is not None:
            return False
        return self.code in (0, 3) or self.is_locked or _is_gone(self.error)


def _is_gone(error: dict[str, Any]) -> bool:
    """Return whether another command had changed the task, or left none to work on."""
    words = ("no task", "has no code", "changed", "no generator", "nothing to")
    return error.get("kind") in _CHANGED or any(word in error.get("message", "") for word in words)


def build(folder: Path, address: str) -> None:
    """Create `folder` with loras/ and a trained store of them; copy it to the address, if that is another store."""
    from tests.cli.tiny_fleet import build_ingested, icm_quietly, train_store, write_lora

    store = build_ingested(folder, vectors=False)
    for number in range(5):
        write_lora(folder / "loras" / f"more-{number}", seed=100 + number)
    icm_quietly(store, "ingest", folder / "loras", "--no-vectors")
    train_store(store)
    if address != str(store):
        icm_quietly(store, "copy", store, address)


def crowd(folder: Path, address: str, seconds: float, *, workers: int = WORKERS, seed: int = 1) -> list[Done]:
    """Run workers on the store at an address that `build` filled, and return the outcome of each command.

    Call it in a process that has neither trained nor started threads: it is forked for each command.
    """
    import transformers  # noqa: F401

    import icmlora.fleet.bundles.bundles
    import icmlora.fleet.encode.encode
    import icmlora.fleet.evict.evictor
    import icmlora.fleet.train.train  # noqa: F401

    fork = multiprocessing.get_context("fork")
    answers = [fork.Pipe(duplex=False) for _ in range(workers)]
    end = time.monotonic() + seconds
    running = [
        fork.Process(target=_work, args=(folder, address, end, random.Random(seed * 100 + number), number, answer[1]))
        for number, answer in enumerate(answers)
    ]
    for process in running:
        process.start()
    done = [one for receiver, _ in answers for one in receiver.recv()]
    for process in running:
        process.join()
    return done


def _work(folder: Path, address: str, end: float, draw: random.Random, number: int, answer: Any) -> None:
    own, done = folder / f"worker-{number}", list[Done]()
    own.mkdir(exist_ok=True)
    while time.monotonic() < end:
        command = draw.choices([*_COMMANDS], [weight for weight, _ in _COMMANDS.values()])[0]
        name = draw.choice(_NAMES)
        words = [word.format(loras=folder / "loras", own=own, name=name) for word in _COMMANDS[command][1]]
        began = time.monotonic()
        code = _icm(address, words, own)
        seconds = time.monotonic() - began
        lines = (own / "err").read_text(errors="replace").splitlines()
        error = next((json.loads(line) for line in reversed(lines) if line.startswith('{"type": "error"')), {})
        if code not in (0, 3) and not error:
            error = {"message": "\n".join(lines[-5:])}
        wrong = _wrong(folder / "loras" / name, own) if command == "materialize" and code == 0 else None
        done.append(Done(command, code, seconds, error, wrong))
    answer.send(done)


def _icm(store: str, words: Sequence[str], own: Path) -> int:
    pid = os.fork()
    if pid == 0:
        for number, name in ((1, "out.json"), (2, "err")):
            os.dup2(os.open(own / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), number)
        os.environ |= {
            "ICM_STORE": store,
            "XDG_CACHE_HOME": str(own / "cache"),
            "ICM_LOCK_TIMEOUT": str(LOCK_TIMEOUT),
            "ICM_NO_PROGRESS": "1",
        }
        status = 99
        try:
            from icm_cli.app import run

            status = int(run([*words, "--json"]))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _wrong(original: Path, own: Path) -> str | None:
    """Return the error in a written adapter."""
    from icmlora.adapter.metrics import squared_error
    from icmlora.formats.discovery.folder import load_adapter

    weights = "adapter_model.safetensors"
    digests = [hashlib.sha256((folder / weights).read_bytes()).hexdigest() for folder in (original, own / "out")]
    if json.loads((own / "out.json").read_text())["source"] == "original":
        return None if digests[0] == digests[1] else f"{original.name}: not the bytes of the original"
    error = math.sqrt(squared_error(load_adapter(original), load_adapter(own / "out")))
    return None if error <= float(_MAX_ERROR) else f"{original.name}: a relative error of {error:.3f}"


def figures(done: Sequence[Done]) -> dict[str, Any]:
    """Count the outcomes of the commands."""
    found: dict[str, Any] = {}
    for command in _COMMANDS:
        some = [one for one in done if one.command == command]
        times = sorted(one.seconds for one in some)
        found[command] = {
            "run": len(some),
            "succeeded": sum(one.code in (0, 3) for one in some),
            "gave_up_waiting": sum(one.is_locked for one in some),
            "unexpected": sum(not one.is_expected for one in some),
            "median_seconds": round(times[len(times) // 2], 2) if times else None,
            "longest_seconds": round(times[-1], 2) if times else None,
        }
    return found


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--store", help="the address of an empty store that `icm init` made; by default a folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    os.environ["XDG_CONFIG_HOME"] = str(folder / "config")  # location of the base model
    address = chosen.store or str(folder / "store")
    try:
        builder = multiprocessing.get_context("spawn").Process(target=build, args=(folder, address))
        builder.start()
        builder.join()
        done = crowd(folder, address, chosen.seconds, workers=chosen.workers, seed=chosen.seed)
        (folder / "end").mkdir()
        sound = _icm(address, ["verify", "--read-data"], folder / "end") == 0
    finally:
        shutil.rmtree(folder)
    odd = Counter(f"{one.command}: {one.wrong or one.error.get('message')}" for one in done if not one.is_expected)
    document = {
        "what": "processes on one store, each with one command after the other, tests/faults/crowd.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "seconds": chosen.seconds,
        "processes": chosen.workers,
        "lock_timeout": LOCK_TIMEOUT,
        "run": len(done),
        "exit_codes": dict(sorted(Counter(str(one.code) for one in done).items())),
        "sound_in_the_end": sound,
        "unexpected": dict(odd.most_common(10)),
        "commands": figures(done),
    }
    chosen.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    _main()
