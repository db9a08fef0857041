"""Run a script of icm in a process of its own, for work on files that nobody vouches for.

The process gets open files and no path. It limits itself before it touches what it is given; see
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
    """Run a script with these arguments and the places of packages; return its exit status, or None if it was slow.

    Args:
        script: The script's file.
        arguments: What it is given before the places of packages, which it has to add to `sys.path`.
        source: Descriptor of what it reads from its standard input; it is read from its beginning.
        target: Descriptor of what it writes to its standard output.
        wall_seconds: How long it may take, waiting included.
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
    """Run a script that imports what it needs once, and then forks itself for each pair of files it is sent.

    Each file still has a process of its own, without the seconds that the imports take. The script is started with the
    first file, and again with the next one after it had to be ended.
    """

    # Its arguments are the descriptor of a socket, over which it gets an order and two files and sends exit statuses,
    # and the places of packages.

    def __init__(self, script: str) -> None:
        self._script = script
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the script."""
        self._end()

    def run(self, order: str, source: int, target: int, *, wall_seconds: float) -> int | None:
        """Have one file read from its beginning and another written; return as `run_child`."""
        os.lseek(source, 0, os.SEEK_SET)
        process, line = self._running = self._running or self._start()
        answer = b""
        with suppress(ConnectionError):  # it ended by itself
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
                start_new_session=True,  # it is ended together with what it forked
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
    # -I leaves out where packages may be if they are not in the interpreter's own folder.
    paths = os.pathsep.join(path for path in sys.path if Path(path).is_absolute())
    return [sys.executable, "-I", script, *arguments, paths]


def _environment() -> dict[str, str]:
    # Tokens and proxies of the user's environment are none of its business.
    kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PATH") if key in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
