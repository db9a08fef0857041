"""The study of conditions, on vectors that are made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.benchmarks.recognition.open_set import counted, fleets, measured
from tests.benchmarks.recognition.study import Conditions, Vectors, recognition


def test_vectors_name_their_tasks_and_a_guess_names_one() -> None:
    random = np.random.default_rng(0)
    means = {f"task-{number}": random.standard_normal((1, 24)) for number in range(8)}

    def drawn(sets: int) -> Vectors:
        return {
            name: (mean + 0.1 * random.standard_normal((sets, 24))).astype(np.float32) for name, mean in means.items()
        }

    known = {"adapted": drawn(4), "context": drawn(4), "description": drawn(1), "label": {}}
    found = recognition(Conditions(known, {"adapted": drawn(2), "context": drawn(2)}))
    rows = found["conditions"]
    assert (rows["context"]["right"], rows["adapted"]["right"], rows["description"]["right"]) == (8, 8, 8)
    assert (rows["label"]["right"], rows["none"]["right"], found["tasks"]) == (1, 1, 8)


def test_a_collection_is_divided_into_fleets_and_every_draw_is_read_twice(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    arrays = {}
    for number in range(6):
        mean = random.standard_normal(24)
        for name, sets in (("known", 4), ("0", 2), ("1", 2)):
            arrays[f"task-{number}/{name}"] = mean + 0.1 * random.standard_normal((sets, 24))
    np.savez(tmp_path / "vectors.npz", **arrays)
    assert [list(known) for known, _ in fleets(tmp_path / "vectors.npz", "1-5")] == [[f"task-{n}" for n in range(1, 5)]]
    groups = [measured(*fleet) for fleet in fleets(tmp_path / "vectors.npz", "0-6/4x3")]
    found = counted(groups)
    assert (found["fleets"], found["draws"]) == (3, 3 * 4 * 2)
    assert (found["right"], found["called_new_when_unknown"], found["missed"]) == (24, 24, {})
