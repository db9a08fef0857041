"""The commands that are killed: where each one starts, what is typed, and what it is to reach.

ingest       absent store          -> every task with its checkpoints
vectors      ingested store        -> every task with its vectors
train        store with vectors    -> a generator and a code per task
materialize  trained store         -> a folder with the very bytes of an undisturbed run
evict        trained store         -> no original, and of every task the code that was checked
update       evicted store, one task more with modules of its own -> the generator with one more version, and all codes
encode       trained store         -> every task comes back within an error, from its code and what lies beside it
export       trained store         -> a file with the very bytes of an undisturbed run
import       absent store, that file -> its generator and its tasks, each with a code that can be decoded
generate     trained store with a start -> a folder with those bytes, and after it a task with code and vectors
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.cli.tiny_fleet import EPISODES, STEPS
from tests.icmlora.tiny_base import LABEL

GENERATED = "geese"
MAX_ERROR = 0.14


@dataclass(frozen=True)
class Command:
    """One command line, the same every time; `{root}` and `{output}` stand for paths.

    Attributes:
        line: What is typed.
        after: The command whose undisturbed run leaves the store that this one starts from; None for an absent store.
        first: What is typed in between.
        outputs_of: Commands whose output the line names.
    """

    line: str
    after: str | None = None
    first: tuple[str, ...] = ()
    outputs_of: tuple[str, ...] = ()

    @property
    def has_output(self) -> bool:
        """Whether it writes a file or folder beside the store."""
        return "{output}" in self.line


_TRAIN = f"train --device cpu --steps {STEPS} --no-eval --refine 0"
_LEARN = f"train --device cpu --objective functional --episodes {EPISODES}"
_GENERATE = f"generate {GENERATED} --samples {{root}}/later/{GENERATED}.jsonl -o {{output}} --register --device cpu"

COMMANDS = {
    "ingest": Command("ingest {root}/loras --no-vectors"),
    "vectors": Command("vectors --device cpu", "ingest", (f"base add {LABEL} {{root}}/base",)),
    "train": Command(_TRAIN, "vectors"),
    "materialize": Command("materialize rules --source code -o {output}", "train"),
    "evict": Command("evict --max-error 0.7", "train"),
    "update": Command(f"{_TRAIN} --update", "evict", ("ingest {root}/later/extra --no-vectors",)),
    "encode": Command(f"encode --residual --max-error {MAX_ERROR}", "train"),
    "export": Command("export {output}", "train"),
    "import": Command("import {root}/after/export/out", outputs_of=("export",)),
    "copy": Command("copy {root}/after/train/store {root}/now/store", outputs_of=("train",)),
    "generate": Command(_GENERATE, "train", (_LEARN,)),
}
"""In an order in which each comes after what it needs."""


def words(line: str, root: Path, output: Path) -> list[str]:
    """Return a command line as a shell would hand it over."""
    return [word.format(root=root, output=output) for word in line.split()]
