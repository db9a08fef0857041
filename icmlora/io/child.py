"""Run an icm script in a child process, for work on untrusted files.

The child gets open files and no path. It restricts itself before it reads its input; see
`icmlora.formats.discovery.pickle_child.limit`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self


def run_child(script: str, arguments: list[str], source: int, target: int, *, wall_seconds: float) -> int | None:
    """Run a script; return its exit status, or None after a timeout.

    Args:
        script: The script's file.
        arguments: Its arguments. The package paths, which it has to add to `sys.path`, follow them.
        source: Descriptor of its standard input, read from the beginning.
        target: Descriptor of its standard output.
        wall_seconds: Timeout in wall-clock time.
    """
    os.lseek(source, 0, os.SEEK_SET)
    try:
        return subprocess.run(
            _command(script, arguments),
            stdin=source,
            stdout=target,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            cwd="/",
            timeout=wall_seconds,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return None


class Forker:
    """Run a script that does its imports once and then forks for each pair of files.

    Each file still has its own process, but does not pay seconds for imports. The script starts with the first file; if
    it had to be killed, it starts again with the next file.
    """

    # The script's arguments are a socket descriptor and the package paths. The socket carries an order and two files
    # to the script, and exit statuses back.

    def __init__(self, script: str) -> None:
        self._script = script
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Kill the script."""
        self._end()

    def run(self, order: str, source: int, target: int, *, wall_seconds: float) -> int | None:
        """Run the script on one pair of files; returns as `run_child` does."""
        os.lseek(source, 0, os.SEEK_SET)
        process, line = self._running = self._running or self._start()
        answer = b""
        with suppress(ConnectionError):  # the script exited by itself
            socket.send_fds(line, [order.encode()], [source, target])
            if not select.select([line], [], [], wall_seconds)[0]:
                self._end()
                return None
            answer = line.recv(64)
        if answer:
            return int(answer)
        self._end()
        return process.returncode

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            process = subprocess.Popen(
                _command(self._script, [str(its.fileno())]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                cwd="/",
                pass_fds=[its.fileno()],
                start_new_session=True,  # killed together with its forks
            )
        return process, ours

    def _end(self) -> None:
        if self._running is None:
            return
        (process, line), self._running = self._running, None
        line.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _command(script: str, arguments: list[str]) -> list[str]:
    # -I drops package paths outside the interpreter's own folder.
    paths = os.pathsep.join(path for path in sys.path if Path(path).is_absolute())
    return [sys.executable, "-I", script, *arguments, paths]


def _environment() -> dict[str, str]:
    # The child must not see the user's tokens and proxies.
    kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PATH") if key in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
