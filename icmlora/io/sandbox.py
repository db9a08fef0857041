"""Process untrusted input in a child process with limits on memory, processor time and file size.

    this process ──order, two open files──▶ script: imports, then for each order  fork ──limits──▶ work(order, files)
                 ◀─────── status ─────────

The script imports a module once, which takes seconds, and forks for each order. The fork gets two open files and no
path, and limits itself before it reads. Its output is never shown, because the input could control it. Linux only.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

FAILED, NO_MEMORY, TOO_SLOW, UNAVAILABLE = 1, 13, 14, 15
"""Statuses besides 0 for success; a module may return others. TOO_SLOW and UNAVAILABLE come only from `Sandbox.run`."""
# Windows has none of these but SIGABRT.
_MEMORY_SIGNALS = {-getattr(signal, name) for name in ("SIGABRT", "SIGKILL", "SIGXFSZ") if hasattr(signal, name)}
_TIME_SIGNALS = {-getattr(signal, name) for name in ("SIGXCPU",) if hasattr(signal, name)}
_MAX_ORDER_LENGTH = 1 << 16  # bytes


class Work(Protocol):
    """The function `work` of a module that runs in a sandbox."""

    def __call__(self, order: dict[str, Any], source: BinaryIO, target: BinaryIO) -> int:
        """Process one input and return the status."""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits for one input, in addition to what the process needs for its imports."""

    memory: int = 256 << 20
    memory_per_byte: int = 4
    seconds: int = 30
    seconds_per_byte: float = 0.0
    wall_seconds: int = 120  # extra, for a slow process start

    def for_size(self, size: int) -> tuple[int, int]:
        """Return the memory in bytes and the processor time in seconds for an input of `size` bytes."""
        return self.memory + self.memory_per_byte * size, self.seconds + int(self.seconds_per_byte * size)


class Sandbox:
    """A script that imports a module and then runs its `work` in a new process for each input.

    The script starts with the first input. If it had to be killed, it starts again with the next input.

    Args:
        module: Full name of the module.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Kill the script."""
        self._end()

    def run(self, order: dict[str, Any], source: int, target: int, size: int, limits: SandboxLimits) -> int:
        """Process one input and return its status.

        Args:
            order: JSON for the module.
            source: Descriptor of the input, read from the beginning.
            target: Descriptor of the output.
            size: Size of the input in bytes, which scales the limits.
            limits: The limits.
        """
        if sys.platform != "linux":  # the limits and the transfer of descriptors need Linux
            return UNAVAILABLE
        memory, seconds = limits.for_size(size)
        message = json.dumps({**order, "memory": memory, "seconds": seconds}).encode()
        os.lseek(source, 0, os.SEEK_SET)
        process, line = self._running = self._running or self._start()
        answer = b""
        with suppress(ConnectionError):  # the script exited by itself
            socket.send_fds(line, [message], [source, target])
            if not select.select([line], [], [], limits.wall_seconds + 2 * seconds)[0]:
                self._end()
                return TOO_SLOW
            answer = line.recv(64)
        if not answer:
            self._end()
        status = int(answer) if answer else process.returncode
        return NO_MEMORY if status in _MEMORY_SIGNALS else TOO_SLOW if status in _TIME_SIGNALS else status

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -I drops package paths outside the interpreter's own folder.
        paths = os.pathsep.join(path for path in sys.path if Path(path).is_absolute())
        # The script must not see the user's tokens and proxies.
        kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PATH") if key in os.environ}
        with its:
            process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(its.fileno()), self._module, paths],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
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


def _serve(channel: int, work: Work) -> None:
    """Run `work` in a fork for each order, until the other end of the socket is closed."""
    with socket.socket(fileno=channel) as line:
        while True:
            order, files, _, _ = socket.recv_fds(line, _MAX_ORDER_LENGTH, 2)
            if not order:
                return
            forked = os.fork()
            if forked == 0:
                status = FAILED
                try:
                    line.close()
                    fields = json.loads(order)
                    limit(fields["memory"], fields["seconds"])
                    with os.fdopen(files[0], "rb") as source, os.fdopen(files[1], "wb") as target:
                        status = work(fields, source, target)
                except MemoryError:
                    status = NO_MEMORY
                finally:
                    os._exit(status)
            for file in files:
                os.close(file)
            line.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))


def limit(memory: int, seconds: int) -> None:
    """Limit the further resource use of this process."""
    import resource  # not available on every system that imports this module

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + memory,
        resource.RLIMIT_CPU: math.ceil(used.ru_utime + used.ru_stime) + seconds,
        resource.RLIMIT_FSIZE: memory,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # At the hard CPU limit the kernel sends SIGKILL, as it does out of memory; at the soft limit SIGXCPU.
        resource.setrlimit(kind, (lower, hard if kind == resource.RLIMIT_CPU else lower))


if __name__ == "__main__":
    _channel, _module, _paths = sys.argv[1:]
    sys.path.extend(path for path in _paths.split(os.pathsep) if path not in sys.path)
    _serve(int(_channel), import_module(_module).work)
