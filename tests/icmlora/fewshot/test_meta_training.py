"""How far to step is learned from tasks whose adapters are known, each taken out in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from icmlora.adapter.arithmetic import times, with_modules
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.errors import GeneratorError
from icmlora.fewshot import meta_training
from icmlora.fewshot.meta_training import Episode, MetaConfig, meta_train
from icmlora.fewshot.start import FewShotStart, untrained_fewshot_start
from icmlora.fewshot.start_file import fewshot_start_from_bytes, fewshot_start_to_bytes
from tests.icmlora.fewshot.trained_tasks import NAMES, TrainedTasks, is_untouched, trained_tasks, weights_of
from tests.icmlora.small_fleet import dense
from tests.icmlora.tiny_base import load_tiny_base

CONFIG = MetaConfig(episodes=3, updates=2, support=(2, 4), learning_rate=4.0)
MEASURE = replace(CONFIG, learning_rate=0.0, seed=9)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def fleet(base: BaseModel) -> TrainedTasks:
    return trained_tasks(base)


@pytest.fixture(scope="module")
def short(fleet: TrainedTasks) -> FewShotStart:
    """A start whose steps are far too short."""
    start = untrained_fewshot_start(fleet.adapters)
    return replace(start, rates=((-64,) * len(NAMES),) * 2)


def run(
    base: BaseModel, start: FewShotStart, fleet: TrainedTasks, config: MetaConfig = CONFIG
) -> tuple[list[Episode], list[FewShotStart]]:
    episodes, states = zip(*meta_train(base, start, fleet, config), strict=True)
    return list(episodes), list(states)


def numbers(start: FewShotStart) -> tuple[object, ...]:
    return start.rates, start.slopes, start.in_context, start.sizes


def test_steps_that_are_too_short_become_longer_and_better(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart
) -> None:
    _, states = run(base, short, fleet, replace(CONFIG, episodes=6))
    assert all(sum(row) > -64 * len(NAMES) for row in states[-1].rates)
    before, after = ([at.loss for at in run(base, start, fleet, MEASURE)[0]] for start in (short, states[-1]))
    assert sum(after) < sum(before)


def test_half_of_the_episodes_are_in_context_and_learn_what_that_adds(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart
) -> None:
    episodes, states = run(base, short, fleet, replace(CONFIG, episodes=6))
    assert [at.in_context for at in episodes] == [False, True, False, True, False, True]
    assert states[0].in_context == (0, 0)
    assert all(added > 0 for added in states[-1].in_context)


def test_a_seed_decides_everything(base: BaseModel, fleet: TrainedTasks, short: FewShotStart) -> None:
    one, other = run(base, short, fleet), run(base, short, fleet)
    assert one[0] == other[0]
    assert numbers(one[1][-1]) == numbers(other[1][-1])
    assert run(base, short, fleet, replace(CONFIG, seed=1))[0] != one[0]


def test_every_task_has_its_turn_before_any_has_a_second(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart
) -> None:
    episodes, _ = run(base, short, fleet, replace(CONFIG, updates=1))
    assert sorted(at.task for at in episodes) == [0, 1, 2]
    assert [at.number for at in episodes] == [1, 2, 3]


def test_what_is_learned_is_whole_and_is_stored_as_it_is(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart
) -> None:
    learned = run(base, short, fleet)[1][-1]
    assert all(type(value) is int for row in (*learned.rates, learned.slopes, learned.in_context) for value in row)
    stored = fewshot_start_from_bytes(fewshot_start_to_bytes(learned, b"code"), lambda _: learned.adapter)
    assert numbers(stored) == numbers(learned)
    assert learned.adapter is short.adapter


def test_the_start_that_was_given_is_not_changed(base: BaseModel, fleet: TrainedTasks, short: FewShotStart) -> None:
    before = numbers(short)
    run(base, short, fleet)
    assert numbers(short) == before


def test_the_base_model_is_left_as_it_was(base: BaseModel, fleet: TrainedTasks, short: FewShotStart) -> None:
    before = weights_of(base)
    run(base, short, fleet, replace(CONFIG, episodes=1))
    assert is_untouched(base, before)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, torch.Tensor], Sequence[Scored]]]:
    """Return a list that fills with where evidence is gathered, as dW, and from which samples."""
    seen = []

    def gather(base: BaseModel, factors: Any, names: Any, samples: Sequence[Scored]) -> Any:
        seen.append(({name: b.double() @ a.double() for name, (a, b) in factors.items()}, samples))
        return real(base, factors, names, samples)

    real = meta_training.gather_evidence
    monkeypatch.setattr(meta_training, "gather_evidence", gather)
    return seen


def test_an_episode_begins_at_the_mean_of_the_other_tasks(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    episodes, _ = run(base, short, fleet, replace(CONFIG, updates=1))
    for at, (begin, _) in zip(episodes, seen[::2], strict=True):
        others = [dense(fleet.load(task)) for task in range(3) if task != at.task]
        for name in NAMES:
            wanted = (others[0][name] + others[1][name]) / 2
            assert torch.allclose(begin[name], wanted, atol=1e-4)


def test_samples_that_are_adapted_to_are_not_those_that_judge(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[list[int]] = []

    def nats(base: BaseModel, factors: Any, batch: Sequence[Scored]) -> Any:
        judged.extend(item.ids for item in batch)
        return real(base, factors, batch)

    real = meta_training.mean_loss
    monkeypatch.setattr(meta_training, "mean_loss", nats)
    seen = watch(monkeypatch)
    run(base, short, fleet, replace(CONFIG, episodes=1))
    assert judged
    assert not [item for _, samples in seen for item in samples if item.ids in judged]


def test_of_a_task_with_few_samples_half_are_adapted_to(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart
) -> None:
    few = TrainedTasks(fleet.adapters, [texts[:3] for texts in fleet.texts])
    episodes, _ = run(base, short, few, replace(CONFIG, support=(16,), updates=1))
    assert {at.support for at in episodes} == {1}


def test_a_fleet_of_one_task_begins_at_it(base: BaseModel, fleet: TrainedTasks) -> None:
    alone = TrainedTasks(fleet.adapters[:1], fleet.texts[:1])
    episodes, _ = run(base, untrained_fewshot_start(alone.adapters), alone, replace(CONFIG, episodes=1))
    assert [at.task for at in episodes] == [0]


def test_an_episode_whose_loss_is_no_number_ends_it(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meta_training, "_nats", lambda *_: float("nan"))
    with pytest.raises(GeneratorError, match=r"episode 1, of [24] samples, diverged"):
        run(base, short, fleet)


def test_gradients_that_are_no_numbers_are_said_to_be_so(
    base: BaseModel, fleet: TrainedTasks, short: FewShotStart
) -> None:
    huge = replace(short, adapter=with_modules(short.adapter, times(short.adapter.modules, 1e38)))
    with pytest.raises(
        GeneratorError, match=r"not finite|diverged"
    ):  # where numbers overflow first depends on the processor
        run(base, huge, fleet)
