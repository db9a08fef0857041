"""Workers and shards of a team's store: each has a home of its own, without the store and the adapters."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from icm_cli.app import run
from registry.store import Store
from tests.icmlora.fleet.stores import TASKS
from tests.icmlora.tiny_base import LABEL
from tests.pg_server import new_database
from tests.s3_server import S3Server

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # every process imports torch

_PATIENCE = 300.0  # seconds
_FOREIGN = ("AWS_", "HF_", "ICM_", "PG", "XDG_")
_COMMIT = "1" * 40


@dataclass(frozen=True)
class Team:
    """A team's store, trained, whose adapters are nowhere else any more.

    Attributes:
        url: Its address.
        base: A folder with its base model.
        credentials: The variables that say how to reach the bucket.
    """

    url: str
    base: Path
    credentials: Mapping[str, str]

    def machine(self, home: Path) -> dict[str, str]:
        """Return the environment of a machine that has credentials, and the base model in a cache of its own."""
        repository = home / "hf" / "hub" / f"models--{LABEL.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(_COMMIT)
        shutil.copytree(self.base, repository / "snapshots" / _COMMIT)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return {**kept, **own, **self.credentials}

    def codes(self) -> dict[str, str]:
        """Return the digest of the code of each task."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.credentials.items():
                patch.setenv(name, value)
            with Store.open(self.url, read_only=True) as store:
                return {task.name: str(task.code.blob) for task in store.tasks() if task.code is not None}


@pytest.fixture(scope="module")
def team(mixed_template: Path, s3: S3Server, postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    with pytest.MonkeyPatch.context() as patch:
        url = new_database(postgres)
        for name, value in {**s3.environment, "HOME": str(folder), "ICM_STORE": url}.items():
            patch.setenv(name, value)
        loras = shutil.copytree(mixed_template / "loras", folder / "loras")
        assert run(["init", "--blobs", f"s3://icm/{uuid4().hex}"]) == 0
        assert run(["ingest", str(loras), "--no-vectors"]) == 0
        assert run(["train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", "20"]) == 0
        shutil.rmtree(loras)
        yield Team(url, mixed_template / "base", s3.environment)


@contextmanager
def cluster(environment: dict[str, str]) -> Iterator[str]:
    """Run a Ray cluster whose workers have an environment, and yield its address."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # the names of its sockets have 107 bytes at most
        ports = free_ports(2)
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}", "--include-dashboard=false"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={folder}"]
        with (Path(environment["HOME"]) / "log").open("wb") as log:
            # By itself, it refuses a client whose own server takes longer than half a minute to start; and what gRPC
            # does when its process forks sometimes ends that server before it began.
            settings = {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "300", "GRPC_ENABLE_FORK_SUPPORT": "0"}
            process = subprocess.Popen(command, env=environment | settings, stdout=log, stderr=log, cwd=folder)
        try:
            wait_for(ports[1], process)
            yield f"ray://127.0.0.1:{ports[1]}"
        finally:
            for told in Path(folder).glob("session_latest/logs/ray_client_server*"):  # is shown where a test fails
                sys.stdout.write(f"{told.name}\n{told.read_text()}\n")
            process.terminate()  # it ends all that it started
            process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    pytest.fail("the Ray cluster did not start")


def started(environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Begin a command on a machine."""
    command = [sys.executable, "-c", "from icm_cli.app import main; main()", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=environment["HOME"])


def finished(process: subprocess.Popen[str]) -> str:
    """Wait for a command, which has to succeed, and return its output."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


def test_workers_need_the_address_credentials_and_a_base_model_of_their_own(team: Team, tmp_path: Path) -> None:
    here = {**team.machine(tmp_path / "here"), "ICM_STORE": team.url}
    far = tmp_path / "far"
    with cluster(team.machine(far)) as address:
        finished(started(here, "encode", "--max-error", "0.22", "--workers", address))
        made = team.codes()
        finished(started(here, "eval", "--device", "cpu", "--workers", address))
    assert sorted(made) == TASKS
    assert {path.parent.parent.name for path in files(far / ".cache")} >= {"blobs"}
    assert not [path for path in files(far) if path.name in ("registry.db", "adapter_model.safetensors")]
    finished(started(here, "encode", "--max-error", "0.22", "--again"))
    assert team.codes() == made


def test_shards_run_at_the_same_time_on_machines_that_share_nothing(team: Team, tmp_path: Path) -> None:
    before = team.codes()
    machines = [{**team.machine(tmp_path / name), "ICM_STORE": team.url} for name in ("one", "other")]
    commands = [
        started(machine, "encode", "--max-error", "0.15", "-q", "--shard", f"{number}/2")
        for number, machine in enumerate(machines, 1)
    ]
    for command in commands:
        finished(command)
    after = team.codes()
    assert [name for name in TASKS if after[name] != before[name]] == TASKS
    finished(started(machines[0], "verify", "--read-data", "--decode"))
