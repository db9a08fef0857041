"""Commands as whole processes: the help, a listing, and `icm materialize` against a re-save with safetensors."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from icmlora import Fleet
from icmlora.fleet.write.sources import Source
from tests.benchmarks.performance.figures import Figure, seconds
from tests.benchmarks.performance.machine import weight_files
from tests.benchmarks.performance.runs import alternate, ratio, walls

_RESAVE = """import sys
from safetensors.torch import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2], metadata={"format": "pt"})
"""
_LISTING = """import sys
from icm_cli.app import run
code = run(["--store", sys.argv[1], "--quiet", "ls"])
sys.exit(code or "torch" in sys.modules)
"""


def icm(*arguments: str, store: Path) -> list[str]:
    """Return the command line of the `icm` that belongs to this interpreter."""
    return [str(Path(sys.executable).with_name("icm")), "--store", str(store), *arguments]


def process(command: list[str], also: int = 0) -> str:
    """Run a command to its end and return what it printed; its messages are shown where it fails.

    Another exit code than 0 may be no failure.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, also):
        sys.exit(f"{' '.join(command[:4])} ...: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def measure_short_commands(store: Path, runs: int) -> list[Figure]:
    """Measure the help and a listing; the listing must not have imported torch."""
    process([sys.executable, "-c", _LISTING, str(store)])
    cases = {"help": icm("--help", store=store), "ls": icm("ls", store=store)}
    timed = alternate({name: partial(process, command) for name, command in cases.items()}, runs)
    return [
        seconds("icm --help", walls(timed["help"]), 0.5),
        seconds("icm ls, without torch", walls(timed["ls"]), 1.0),
    ]


def measure_materialize(store: Path, fleet: Path, work: Path, sources: list[Source], runs: int) -> list[Figure]:
    """Measure the writing of the fleet's largest final adapter, from every source that the store has."""
    weights = max(weight_files(fleet), key=lambda path: (path.stat().st_size, not path.parent.name.startswith("check")))
    folder = weights.parent.parent if weights.parent.name.startswith("checkpoint-") else weights.parent
    copy, output = str(work / "resaved.safetensors"), work / "adapter"
    commands = {"resave": [sys.executable, "-c", _RESAVE, str(weights), copy]}
    for source in sources:
        options = ("--output", str(output), "--force", "--source", source)
        commands[source] = icm("--quiet", "materialize", folder.name, *options, store=store)
    timed = alternate({name: partial(process, command) for name, command in commands.items()}, runs)
    resaving = walls(timed["resave"])
    figures = [seconds("load and re-save with safetensors, whole process", resaving)]
    for source in sources:
        writing = walls(timed[source])
        ratios = tuple(round(above / below, 3) for above, below in zip(writing, resaving, strict=True))
        name = f"icm materialize --source {source}"
        figures.append(seconds(f"{name}, whole process", writing))
        figures.append(Figure(f"{name}, of a re-save", ratio(writing, resaving), "ratio", 2.0, runs=ratios))
    return figures + _inside(store, folder.name, output, sources, runs)


def _inside(store: Path, task: str, output: Path, sources: list[Source], runs: int) -> list[Figure]:
    """Measure the work alone, in this process, where all imports are done."""

    def write(source: Source) -> None:
        Fleet(store).materialize(task, output, source=source, force=True)

    timed = alternate({source: partial(write, source) for source in sources}, runs)
    return [
        seconds(f"materialize from {source}, without start and imports", walls(timed[source])) for source in sources
    ]
