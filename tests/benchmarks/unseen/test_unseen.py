"""The study's own parts: what is left out together, what is drawn, what is summed up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.metrics import module_norms
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.fewshot.start import FIRST_RATES, FIRST_SLOPE, FewShotStart, with_first_lengths
from tests.benchmarks.domain_fleet.tasks import TASKS
from tests.benchmarks.unseen.fleet import StudyTask
from tests.benchmarks.unseen.folds import FOLDS, folds_of
from tests.benchmarks.unseen.rows import random_steps, shuffled_pairs, support
from tests.benchmarks.unseen.study import Results
from tests.benchmarks.unseen.summary import summarise, table

STUDY = [StudyTask(Path(task.name), task.group, task.family) for task in TASKS]


@given(st.integers(10, len(STUDY)))
def test_every_task_is_held_out_exactly_once(count: int) -> None:
    folds = folds_of(STUDY[:count])
    assert sorted(task.name for fold in folds for task in fold) == sorted(task.name for task in STUDY[:count])


def test_near_duplicates_are_held_out_together() -> None:
    fold_of = {task.name: number for number, fold in enumerate(folds_of(STUDY)) for task in fold}
    families: dict[str, set[int]] = {}
    for task in STUDY:
        families.setdefault(task.family, set()).add(fold_of[task.name])
    assert all(len(folds) == 1 for folds in families.values())


def test_folds_are_of_about_one_size_and_mix_groups() -> None:
    folds = folds_of(STUDY)
    assert len(folds) == FOLDS
    assert max(map(len, folds)) - min(map(len, folds)) <= 3
    assert all(len({task.group for task in fold}) >= 4 for fold in folds)


@given(st.integers(0, 5))
def test_fewer_samples_are_among_more_of_the_same_draw(seed: int) -> None:
    samples = [Scored([number, number], 1) for number in range(64)]
    four, sixteen = support(samples, 4, seed), support(samples, 16, seed)
    assert four == sixteen[:4]
    assert support(samples, 64, seed) != support(samples, 64, seed + 1)


def test_a_task_is_shuffled_with_one_of_another_family() -> None:
    for fold in folds_of(STUDY):
        assert all(task.family != other.family for task, other in shuffled_pairs(fold))


def test_random_steps_are_as_long_as_learned_ones() -> None:
    zero = LoraModule("m.0.q", torch.zeros(1, 40), torch.zeros(30, 1))
    start = FewShotStart(Adapter("base", None, ("q",), (zero,)), (8,), ((-8,),), (0,), (0,), 3)
    assert module_norms(random_steps(start, 16, 0))["m.0.q"] == pytest.approx(start.length(0, 0, 16), rel=1e-4)


def test_results_go_on_where_they_were(tmp_path: Path) -> None:
    task = STUDY[0]
    Results(tmp_path / "results.jsonl").measure(task, "base", 0, lambda: 3.0)
    again = Results(tmp_path / "results.jsonl")
    again.measure(task, "base", 0, lambda: pytest.fail("measured twice"))
    assert again.values[task.name, "base", 0] == 3.0


def test_a_gain_is_relative_to_the_base_model_and_the_tasks_own_adapter() -> None:
    losses = {
        (task.name, row, seed): nats
        for task in STUDY[:10]
        for row, seed, nats in (("base", 0, 3.0), ("own", 0, 2.0), ("icm-16", 0, 2.4), ("icm-16", 1, 2.2))
    }
    document = summarise(losses, STUDY[:10], folds_of(STUDY[:10]))
    assert document["rows"]["base"]["mean"] == 0
    assert document["rows"]["own"]["mean"] == 1
    assert document["rows"]["icm-16"]["mean"] == pytest.approx(0.7)
    assert document["rows"]["icm-16"]["between_seeds"] == pytest.approx(0.1)
    assert "| icm-16 | 10 | 0.700 | 0.700 to 0.700 | 0.700 | 0.700 |" in table(document)


def test_a_start_without_its_episodes_has_the_first_lengths() -> None:
    zero = LoraModule("m.0.q", torch.zeros(1, 40), torch.zeros(30, 1))
    learned = FewShotStart(Adapter("base", None, ("q",), (zero,)), (8,), ((-8,), (-9,)), (3, 4), (0, 0), 3)
    assert with_first_lengths(learned).rates == ((FIRST_RATES[0],), (FIRST_RATES[1],))
    assert with_first_lengths(learned).slopes == (FIRST_SLOPE, FIRST_SLOPE)
    assert with_first_lengths(learned).sizes == learned.sizes


def test_the_same_study_gives_the_same_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.benchmarks.unseen.figure import draw

    losses = {
        (task.name, row, 0): nats
        for task in STUDY[:10]
        for row, nats in (("base", 3.0), ("own", 2.0), ("icm-16", 2.4), ("nearest", 9.0))
    }
    for name in ("a.svg", "b.svg"):
        draw(summarise(losses, STUDY[:10], folds_of(STUDY[:10])), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
