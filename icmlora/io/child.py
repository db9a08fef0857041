"""Run a script of icm in a process of its own, for work on files that nobody vouches for.

The process gets two open files as its standard input and output, and no path. It limits itself before it touches what
it is given; see `icmlora.formats.pickle_child.limit`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_child(script: str, arguments: list[str], source: int, target: int, *, wall_seconds: float) -> int | None:
    """Run a script with these arguments and the places of packages; return its exit status, or None if it was slow.

    Args:
        script: The script's file.
        arguments: What it is given before the places of packages, which it has to add to `sys.path`.
        source: Descriptor of what it reads; it is read from its beginning.
        target: Descriptor of what it writes.
        wall_seconds: How long it may take, waiting included.
    """
    # -I leaves out where packages may be if they are not in the interpreter's own folder.
    paths = os.pathsep.join(path for path in sys.path if Path(path).is_absolute())
    command = [sys.executable, "-I", script, *arguments, paths]
    # Tokens and proxies of the user's environment are none of its business.
    kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PATH") if key in os.environ}
    environment = {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.lseek(source, 0, os.SEEK_SET)
    try:
        return subprocess.run(
            command,
            stdin=source,
            stdout=target,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            timeout=wall_seconds,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return None
