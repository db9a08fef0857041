"""The study of conditions, on vectors that are made up."""

from __future__ import annotations

import numpy as np

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
