"""Files of weights are judged by their header: what is refused by it takes no memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from icmlora import AdapterRefused, Fleet
from icmlora.formats.pairs.gguf import GGUF
from icmlora.formats.peft.peft import PEFT
from icmlora.formats.weights import read_weights
from tests.icmlora.adapter_files import weights, write_adapter
from tests.icmlora.formats.llama_files import gguf_file

HUGE = 6 * 2**30
LITTLE = 32 * 2**20


def sparse(path: Path, start: bytes) -> Path:
    """Write a file of 6 GiB that takes no space: its start, and then zeros."""
    with path.open("wb") as stream:
        stream.write(start)
        stream.truncate(HUGE)
    return path


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail if Python allocates much more than a header takes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


STARTS = {
    "zeros alone": (PEFT, b""),
    "tensors that end early": (PEFT, weights()),
    "a GGUF file": (PEFT, gguf_file()),
    "a GGUF file whose tensors end early": (GGUF, gguf_file()),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_large_file_whose_header_does_not_fit_is_refused_unread(case: str, tmp_path: Path) -> None:
    known, start = STARTS[case]
    path = sparse(tmp_path / "weights", start)
    with little_memory(), pytest.raises(AdapterRefused) as caught:
        read_weights(path, known)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("dry_run", [False, True])
def test_large_damaged_files_next_to_a_good_adapter_take_no_memory(tmp_path: Path, dry_run: bool) -> None:
    write_adapter(tmp_path / "in" / "good")
    cut = write_adapter(tmp_path / "in" / "cut") / "adapter_model.safetensors"
    sparse(cut, cut.read_bytes())
    sparse(tmp_path / "in" / "sd_xl_base_1.0.safetensors", b"")
    with little_memory():
        report = Fleet(tmp_path / "store").ingest([tmp_path / "in"], dry_run=dry_run)
    assert [task.task for task in report.done] == ["good"]
    assert {Path(problem.path).name for problem in report.problems} == {cut.name, "sd_xl_base_1.0.safetensors"}
