"""The commands that are killed: the starting point, command line and goal of each.

init         nothing               -> an empty store
ingest       absent store, or an empty one where the first command does not make it -> every task with its checkpoints
version      trained store, another adapter of a task -> its second version; the first one keeps its code
base         ingested store        -> the base model's folder
vectors      ingested store        -> every task with its vectors
train        store with vectors    -> a generator and a code per task
materialize  trained store         -> a folder with the very bytes of an undisturbed run
evict        trained store         -> no original, and of every task the code that was checked
update       evicted store, one task more with modules of its own -> the generator with one more version, and all codes
encode       trained store         -> every task is restored within an error, from its code and its extras
export       trained store         -> a file with the very bytes of an undisturbed run
import       absent store, that file -> its generator and its tasks, each with a code that can be decoded
copy         absent or empty store, one in a folder -> its tasks with all that is known of them
edit         trained store         -> a task with a tag and a note
rm           trained store         -> one task less
prune        trained store after removal of a task -> nothing unreferenced
generate     trained store with a start -> a folder with those bytes, and after it a task with code and vectors
repair       the same afterwards, with the database of before the training -> all that the database lacks
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.cli.tiny_fleet import EPISODES, STEPS
from tests.icmlora.tiny_base import LABEL

GENERATED, GONE, TAG = "geese", "rules", "kept"
MAX_ERROR = 0.14


@dataclass(frozen=True)
class Command:
    """One command line, the same every time; `{root}` and `{output}` are paths, `{store}` is an address.

    Attributes:
        line: The command line.
        after: The command whose undisturbed run leaves the store that this one starts from; None for an absent store.
        is_done: The kind of error that the same command raises later if it was done before.
        first: Command lines in between.
        outputs_of: Commands whose output the line names.
        old_database: The command after which the database was copied that replaces the present one at the start.
    """

    line: str
    after: str | None = None
    first: tuple[str, ...] = ()
    outputs_of: tuple[str, ...] = ()
    is_done: str = ""
    old_database: str = ""

    @property
    def has_output(self) -> bool:
        """Whether it writes a file or folder outside the store."""
        return "{output}" in self.line


_TRAIN = f"train --device cpu --steps {STEPS} --no-eval --refine 0"
_LEARN = f"train --device cpu --few-shot --episodes {EPISODES}"
PRUNE = "prune --yes --older-than 0s --empty-quarantine"
_GENERATE = f"generate {GENERATED} --samples {{root}}/later/{GENERATED}.jsonl -o {{output}} --register --device cpu"

COMMANDS = {
    "init": Command("init {store} {blobs}"),
    "ingest": Command("ingest {root}/loras --no-vectors", "init"),
    "base": Command(f"base add {LABEL} {{root}}/base", "ingest"),
    "vectors": Command("vectors --device cpu", "ingest", (f"base add {LABEL} {{root}}/base",)),
    "train": Command(_TRAIN, "vectors"),
    "materialize": Command("materialize rules --source code -o {output}", "train"),
    "evict": Command("evict --max-error 0.7", "train"),
    "update": Command(f"{_TRAIN} --update", "evict", ("ingest {root}/later/extra --no-vectors",)),
    "encode": Command(f"encode --max-error {MAX_ERROR}", "train"),
    "export": Command("export {output}", "train"),
    "import": Command("import {root}/after/export/out", "init", outputs_of=("export",)),
    "copy": Command("copy {root}/laptop {store}", "init", outputs_of=("train",)),
    "edit": Command(f"edit {GONE} --tag {TAG} --note seen", "train"),
    "rm": Command(f"rm {GONE} --yes", "train", is_done="task_not_found"),
    "prune": Command(PRUNE, "rm"),
    "version": Command(f"ingest {{root}}/newer/{GONE} --on-conflict version --no-vectors", "train"),
    "generate": Command(_GENERATE, "train", (_LEARN,), is_done="task_conflict"),
    "repair": Command("verify --repair --yes", "generate", old_database="vectors"),
}
"""Ordered: each command comes after its prerequisites."""


def words(line: str, **places: object) -> list[str]:
    """Return a command line as a shell would split it."""
    return line.format(**places).split()
