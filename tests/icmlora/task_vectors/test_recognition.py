"""Recognising a task by its vectors: what is known, what is new, and what the probabilities mean."""

from __future__ import annotations

import numpy as np
import pytest

from icmlora.task_vectors.recognition import Recognizer, TooFewVectors
from tests.icmlora.task_vectors.test_distances import CHANNELS, Floats, fleet, without


def drawn(seed: int = 0, tasks: int = 12, noise: float = 0.2) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return the vectors of known tasks, and other vectors of the same tasks."""
    vectors = fleet(seed, tasks, sets=6, noise=noise)
    return {name: rows[:4] for name, rows in vectors.items()}, {name: rows[4:] for name, rows in vectors.items()}


def test_other_samples_of_a_known_task_are_recognised() -> None:
    known, others = drawn()
    recognizer = Recognizer(known)
    assert [recognizer.recognize(others[name]).task for name in known] == list(known)


def test_a_task_that_is_not_known_is_none_of_them() -> None:
    known, others = drawn(tasks=20)
    found = [Recognizer(without(known, name)).recognize(others[name]).task for name in known]
    assert found.count(None) >= 18


def test_the_probabilities_sum_to_one_and_follow_the_distances() -> None:
    known, others = drawn(noise=0.6)
    found = Recognizer(known).recognize(others["task-3"])
    assert sum(one.probability for one in found.candidates) + found.new == pytest.approx(1.0)
    assert {one.task for one in found.candidates} == set(known)
    distances = [one.distance for one in found.candidates]
    probabilities = [one.probability for one in found.candidates]
    assert distances == sorted(distances)
    assert probabilities == sorted(probabilities, reverse=True)


def test_noisier_vectors_give_less_certain_answers() -> None:
    certain, doubtful = (
        np.mean([Recognizer(known).recognize(others[name]).candidates[0].probability for name in known])
        for known, others in (drawn(noise=0.2), drawn(noise=1.2))
    )
    assert doubtful < certain


def test_the_units_of_a_channel_do_not_matter() -> None:
    known, others = drawn()
    units = np.geomspace(0.01, 100.0, CHANNELS)
    plain = Recognizer(known).recognize(others["task-1"])
    scaled = Recognizer({name: rows * units for name, rows in known.items()}).recognize(others["task-1"] * units)
    assert scaled.task == plain.task


def test_a_known_vector_itself_brings_back_its_task() -> None:
    known, _ = drawn(noise=1.0)
    recognizer = Recognizer(known)
    assert all(recognizer.recognize(rows).task == name for name, rows in known.items())


def test_tasks_with_one_support_set_are_known_too() -> None:
    known, others = drawn()
    known["task-0"] = known["task-0"][:1]
    assert Recognizer(known).recognize(others["task-0"]).task == "task-0"


@pytest.mark.parametrize(("tasks", "sets"), [(2, 4), (5, 1)])
def test_too_few_tasks_or_support_sets_are_refused(tasks: int, sets: int) -> None:
    known = {name: rows[:sets] for name, rows in drawn(tasks=tasks)[0].items()}
    with pytest.raises(TooFewVectors, match="3 tasks, and two support sets for two of them"):
        Recognizer(known)


def test_a_task_with_a_near_neighbour_is_given_less_room_than_one_that_stands_alone() -> None:
    known, _ = drawn(tasks=12)
    near = {"task-0-twin": known["task-0"] + 0.35 * (known["task-1"].mean(axis=0) - known["task-0"].mean(axis=0))}
    strange = known["task-0"] + 0.6 * (known["task-2"].mean(axis=0) - known["task-0"].mean(axis=0))
    alone, crowded = (Recognizer(known | others).recognize(strange).new for others in ({}, near))
    assert alone < crowded


def test_two_tasks_of_the_same_data_share_the_probability_and_are_not_new() -> None:
    known, others = drawn()
    known["twin"] = others["task-0"]
    found = Recognizer(known).recognize(np.concatenate([known["task-0"][:1], known["twin"][:1]]))
    assert {one.task for one in found.candidates[:2]} == {"task-0", "twin"}
    assert found.task is not None


def test_equal_support_sets_do_not_make_every_other_vector_new() -> None:
    known, others = drawn()
    known["task-0"][:] = known["task-0"][0]
    assert Recognizer(known).recognize(others["task-1"]).task == "task-1"


def test_the_order_of_the_tasks_does_not_matter_for_the_answer() -> None:
    known, others = drawn()
    turned = dict(reversed(known.items()))
    assert Recognizer(turned).recognize(others["task-5"]).task == Recognizer(known).recognize(others["task-5"]).task
