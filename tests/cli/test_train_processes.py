"""`icm train` in two processes, started by torchrun or, to see each of them alone, as torchrun starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from registry.store import Store
from tests.cli.coded import codes
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import icm_quietly
from tests.icmlora.tiny_base import LABEL
from tests.shared import config_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ICM = "from icm_cli.app import main; main()"
THREADS_AT_END = """import atexit, os
from pathlib import Path
names = lambda: [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
atexit.register(lambda: os.write(2, " ".join(["\\nthreads:", *names(), "\\n"]).encode()))  # in one write"""
STEPS = 200
TRAIN = ("train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", str(STEPS))
LIMIT = 300.0  # seconds: far more than a run takes, far less than the ten minutes after which a rank gives up

Icm = Callable[..., Ran]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a process; whatever is left of it at the end is killed."""
    with ExitStack() as stack:

        def popen(command: list[str], **variables: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield popen


def torchrun(store: Path, script: Path) -> list[str]:
    script.write_text(ICM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    return [*launcher, "--store", str(store), *TRAIN, "--json"]


@dataclass(frozen=True)
class Finished:
    """What a training in two processes left and wrote."""

    store: Path
    events: list[dict[str, Any]]
    err: str


@pytest.fixture(scope="module")
def of_two(mixed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The store of the mixed fleet, trained by two processes that name their threads when they end."""
    root = tmp_path_factory.mktemp("two")
    store = Path(shutil.copytree(mixed_template / "store", root / "store"))
    shutil.copytree(config_of(mixed_template), root, dirs_exist_ok=True)
    command = torchrun(store, root / "train.py")
    (root / "train.py").write_text(f"{THREADS_AT_END}\n{ICM}")
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(root))
    env = os.environ | {"PYTHONPATH": str(ROOT)} | places
    ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LIMIT, check=False)
    assert ended.returncode == 0, ended.stderr
    return Finished(store, events(ended.stdout), ended.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no names elsewhere")
def test_no_thread_of_the_connection_is_left_when_a_process_ends(of_two: Finished) -> None:
    """One that still lets go of a tensor while Python shuts down aborts the process."""
    found = [line.split()[1:] for line in of_two.err.splitlines() if line.startswith("threads: ")]
    assert len(found) == 2
    assert not [name for name in chain(*found) if "gloo" in name]


def start_ranks(start: Start, stores: tuple[Path, Path]) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start([sys.executable, "-c", ICM, "--store", str(store), *TRAIN, "--json"], RANK=str(rank), **place)
        for rank, store in enumerate(stores)
    ]


def first_step(process: subprocess.Popen[str]) -> int:
    """Wait for the first step that a process reports."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"type": "step"'):
            return int(json.loads(line)["step"])
    raise AssertionError(process.communicate()[1])


def saved_step(store: Path) -> int:
    with Store.open(store, read_only=True) as opened:
        run = opened.run(LABEL)
        assert run is not None
        assert run.weights
        return run.step


def total_size(store: Path) -> int:
    return sum(code.size for code in codes(store).values())


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_two_processes_make_codes_as_small_as_one_does_and_only_the_first_one_prints(
    of_two: Finished, mixed: Path
) -> None:
    (trained,) = [event for event in of_two.events if event["type"] == "trained"]
    assert (trained["metrics"]["processes"], trained["metrics"]["steps"]) == (2, STEPS)
    icm_quietly(mixed, *TRAIN)
    assert total_size(of_two.store) == pytest.approx(total_size(mixed), rel=0.05)


DECODED = """import hashlib, sys
from pathlib import Path
from registry.store import Store
from icmlora.generator.codec.generator_file import GeneratorFile
digest = hashlib.sha256()
with Store.open(Path(sys.argv[1]), read_only=True) as store:
    for task in store.tasks():
        code = store.blobs.read(task.code.blob)
        opened = GeneratorFile(store.blobs.read(task.code.generator)).codec_of(code).open(code)
        for group in opened.groups:
            for part in (group.norms, group.vectors.places, group.vectors.values):
                digest.update(part.tobytes())
print(digest.hexdigest())
"""


def test_codes_of_two_processes_decode_to_the_same_integers_whatever_the_number_of_threads(
    start: Start, of_two: Finished
) -> None:
    digests = set()
    for threads in ("1", "2", "4"):
        reader = start([sys.executable, "-c", DECODED, str(of_two.store)], OMP_NUM_THREADS=threads)
        out, err = reader.communicate(timeout=LIMIT)
        assert len(out.strip()) == 64, err
        digests.add(out)
    assert len(digests) == 1


def test_a_run_of_two_processes_that_is_stopped_is_resumed_by_one(
    start: Start, icm: Icm, mixed: Path, tmp_path: Path
) -> None:
    process = start(torchrun(mixed, tmp_path / "icm"))
    seen = first_step(process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    step = saved_step(mixed)
    assert step % 2 == 0
    assert step >= max([seen, *(event["step"] for event in events(out))])
    resumed, *steps, _ = icm(*TRAIN, "--json").events
    assert (resumed["type"], resumed["step"]) == ("resumed", step)
    assert steps[-4]["step"] == STEPS  # then three codes


def test_a_run_of_one_process_that_is_stopped_is_resumed_by_two(start: Start, mixed: Path, tmp_path: Path) -> None:
    process = start([sys.executable, "-c", ICM, "--store", str(mixed), *TRAIN, "--json"])
    first_step(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT)
    step = saved_step(mixed)
    process = start(torchrun(mixed, tmp_path / "icm"))
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert events(out)[0]["step"] == step
    assert events(out)[-1]["metrics"]["steps"] == STEPS


@pytest.mark.parametrize("killed", [0, 1])
def test_if_one_process_is_killed_the_other_ends_and_nothing_that_was_saved_is_lost(
    start: Start, mixed: Path, killed: int
) -> None:
    ranks = start_ranks(start, (mixed, mixed))
    seen = first_step(ranks[0])
    ranks[killed].kill()
    out, err = ranks[1 - killed].communicate(timeout=LIMIT)
    assert ranks[1 - killed].returncode == ExitCode.FAILED
    if killed == 1:
        assert json.loads(err.splitlines()[-1])["kind"] == "other_process_failed"
        assert saved_step(mixed) >= max([seen, *(event["step"] for event in events(out))])
    else:
        assert (out, err) == ("", "")
    icm_quietly(mixed, *TRAIN)
    assert total_size(mixed) > 0


def test_what_one_process_fails_of_ends_all_and_the_first_one_says_it(
    start: Start, mixed: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(mixed, tmp_path / "other"))
    icm_quietly(other, "rm", "silent", "--yes")
    ranks = start_ranks(start, (mixed, other))
    failures = [rank.communicate(timeout=LIMIT)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [ExitCode.FAILED] * 2
    first, second = (json.loads(failure.splitlines()[-1])["message"] for failure in failures)
    assert first == f"process 1 of 2 failed: {second}"
    assert "the store changed" in second
