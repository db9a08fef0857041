"""Rows are cut from documents that are in one part only, and a classifier's head is compared by its bytes."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.benchmarks.classification.rows import CHARACTERS, HELD_OUT, TRAIN, cut
from tests.benchmarks.classification.study import head
from tests.benchmarks.classification.tasks import TASKS
from tests.benchmarks.classification.train import accuracy

DOCUMENTS = {name: [f"{name}{number} " * 100 for number in range(50)] for name in ("ale", "bread")}


def test_there_are_six_tasks_of_different_names() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS) == 6


def test_each_class_has_as_many_rows() -> None:
    rows = cut(DOCUMENTS)
    for part, count in ((rows.train, TRAIN), (rows.held_out, HELD_OUT)):
        labels = [row.label for row in part]
        assert labels.count(0) == labels.count(1) == count // 2


def test_no_document_is_in_both_parts() -> None:
    rows = cut(DOCUMENTS)
    seen, held_out = ({word for row in part for word in row.text.split()[1:-1]} for part in (rows.train, rows.held_out))
    assert seen
    assert held_out
    assert not seen & held_out


def test_no_row_is_longer_than_it_may_be() -> None:
    assert max(len(row.text) for row in cut(DOCUMENTS).train) <= CHARACTERS


def test_the_same_documents_give_the_same_rows() -> None:
    assert cut(DOCUMENTS) == cut(DOCUMENTS)


def test_a_head_that_differs_in_one_bit_is_another_head(tmp_path: Path) -> None:
    tensors = {"m.lora_A.weight": torch.ones(2, 2), "classifier.bias": torch.ones(2)}
    heads = []
    for name, bias in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-23)):
        (tmp_path / name).mkdir()
        save_file(
            tensors | {"classifier.bias": torch.tensor([1.0, bias])}, tmp_path / name / "adapter_model.safetensors"
        )
        heads.append(head(tmp_path / name))
    assert heads[0] == heads[1] != heads[2]
    assert list(heads[0]) == ["classifier.bias"]


def test_accuracy_is_the_share_of_rows_whose_class_is_right() -> None:
    rows = cut(DOCUMENTS).held_out[:4]  # all of the first class
    assert accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), rows) == 0.75
