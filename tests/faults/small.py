"""One of the small commands of the registry, as a process: it prints each fact once the store has acknowledged it.

python -m tests.faults.small NAME FOLDER [SABOTAGE]      on the store of ICM_STORE
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from registry.store import Store
from tests.registry.writing import COMMANDS, Place


def run(name: str, folder: str, sabotage: str = "") -> None:
    """Run a command in this process."""
    if sabotage:
        from tests.faults import sabotage as wrong

        getattr(wrong, sabotage)()
    address = os.environ["ICM_STORE"]
    COMMANDS[name](Place(lambda: Store.open(address), Path(folder), partial(print, flush=True)))


if __name__ == "__main__":
    run(*sys.argv[1:])
