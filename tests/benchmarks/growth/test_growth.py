"""The synthetic fleet has the statistics that it is asked for, and the bill adds up."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.metrics import dw_norm, squared_error
from icmlora.adapter.model import Adapter
from icmlora.generator.config import ModuleKind
from tests.benchmarks.growth.bill import break_even, per_task, table
from tests.benchmarks.growth.measured import KindStatistics, balance, from_tensors, measure, same_start, to_tensors
from tests.benchmarks.growth.study import Setting, measure_alternatives, measure_setting
from tests.benchmarks.growth.synthetic import UNSEEN, SyntheticAdapterSource
from tests.icmlora.small_fleet import make_adapter, same

KIND = ModuleKind("model.layers.{}.self_attn.q_proj", 96, 64)
LAYERS, SLOTS = 3, 4
MANY = 80


def orthonormal(width: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(width)
    columns: torch.Tensor = torch.linalg.qr(torch.randn(LAYERS, width, SLOTS + 1, generator=draw))[0]
    return columns


def wanted() -> KindStatistics:
    return KindStatistics(
        log_norms=torch.tensor([0.0, -1.0, -2.5, -3.5]).expand(LAYERS, SLOTS) + torch.arange(LAYERS)[:, None] / 4,
        task_spread=torch.tensor(0.2),
        layer_spread=torch.tensor(0.1),
        slot_spread=torch.tensor([0.1, 0.15, 0.1, 0.1]),
        inputs_shared=torch.tensor([0.5, 0.7, 0.8, 0.9]),
        outputs_shared=torch.tensor([0.4, 0.1, 0.1, 0.05]),
        cosine=torch.tensor(0.12),
        inputs_basis=orthonormal(KIND.inputs),
        outputs_basis=orthonormal(KIND.outputs),
    )


def fleet(**options: Any) -> SyntheticAdapterSource:
    return SyntheticAdapterSource({KIND: wanted()}, MANY, **options)


def balanced(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    modules = adapter.modules
    return balance(torch.stack([module.a for module in modules]), torch.stack([module.b for module in modules]))


def shares(adapter: Adapter) -> torch.Tensor:
    """Return the share of v_i inside the measured basis, shape (L, S)."""
    a, _ = balanced(adapter)
    return (a @ wanted().inputs_basis).square().sum(2) / a.square().sum(2)


def test_a_number_always_gives_the_same_adapter() -> None:
    assert same(fleet().load(7, None), fleet().load(7, None))
    assert same(fleet().load(7, None), replace(fleet(), count=2 * MANY).load(7, None))


def test_other_numbers_and_other_seeds_give_other_adapters() -> None:
    one = fleet().load(7, None)
    for other in (fleet().load(8, None), fleet().load(UNSEEN + 7, None), fleet(seed=1).load(7, None)):
        assert squared_error(one, other) > 0.1


def test_singular_values_are_as_asked() -> None:
    found = measure([fleet().load(task, None) for task in range(MANY)], [KIND], range(LAYERS))[KIND]
    assert (found.log_norms - wanted().log_norms).abs().max() < 0.1
    assert found.task_spread == pytest.approx(0.2, abs=0.06)
    assert found.layer_spread == pytest.approx(0.1, abs=0.06)


def test_two_tasks_overlap_as_much_as_asked() -> None:
    found = measure([fleet().load(task, None) for task in range(MANY)], [KIND], range(LAYERS))[KIND]
    assert found.cosine == pytest.approx(0.12, abs=0.02)


def test_a_shared_start_holds_the_asked_share_of_each_input_vector() -> None:
    # A spread that swaps neighbouring slots would swap their shares too.
    still = replace(wanted(), slot_spread=torch.zeros(SLOTS))
    for task in range(5):
        found = shares(SyntheticAdapterSource({KIND: still}, MANY).load(task, None))
        torch.testing.assert_close(found, wanted().inputs_shared.expand_as(found), atol=1e-3, rtol=0)


def test_a_start_of_its_own_leaves_the_shared_basis() -> None:
    own = torch.stack([shares(fleet(same_start=0.0).load(task, None)) for task in range(20)])
    assert own.mean() < 2 * (SLOTS + 1) / KIND.inputs


def test_the_asked_part_of_the_tasks_has_the_shared_start() -> None:
    found = torch.stack([shares(fleet(same_start=0.75).load(task, None)).mean() for task in range(MANY)])
    assert float((found > 0.4).float().mean()) == pytest.approx(0.75, abs=0.12)


def test_statistics_come_back_from_tensors() -> None:
    again = from_tensors(to_tensors({KIND: wanted()}))
    assert list(again) == [KIND]
    for field in fields(KindStatistics):
        assert torch.equal(getattr(again[KIND], field.name), getattr(wanted(), field.name))


def test_adapters_of_one_start_are_told_from_others() -> None:
    kind = ModuleKind("model.layers.{}.self_attn.q_proj", 24, 24)
    group = [make_adapter(seed) for seed in range(4)]  # these share most of A
    alone = [canonicalize(make_adapter(9, own=50.0)), make_adapter(10, own=50.0)]
    assert same_start([alone[0], *group, alone[1]], kind) == group


@pytest.mark.parametrize("trained", [True, False])
def test_one_size_is_measured(trained: bool) -> None:
    found = measure_setting(Setting(MANY, 1.0, trained=trained, step_limit=2), fleet())
    assert found["steps"] == (2 if trained else 0)
    assert found["seen"]["code_bytes"] > 50
    assert found["unseen"]["dw_error"] <= 0.12
    assert found["peak_training_bytes"] > 2**20
    json.dumps(found)


def test_alternatives_are_measured_on_the_unseen_sample() -> None:
    found = {each["name"]: each for each in measure_alternatives(fleet())}
    adapter = fleet().load(UNSEEN, None)
    assert found["bf16"]["code_bytes"] > 2 * sum(shape.parameters for shape in adapter.layout)
    assert found["bf16"]["dw_error"] < 1e-4 < found["svd2-3bit"]["dw_error"]
    assert dw_norm(adapter) > 0


def result(tasks: int, generator: int, code: float, **fields: Any) -> dict[str, Any]:
    each = {"code_bytes": code, "dw_error": 0.1}
    plain = {"same_start": 0.8, "width": 32, "quality": 4, "trained": True, "steps": 1000, "peak_training_bytes": 2**20}
    training = {"cpu_seconds": 1.0, "wall_seconds": 1.0}
    sizes = {"tasks": tasks, "generator_bytes": generator, "seen": each, "unseen": each, "training": training}
    return {**plain, **sizes, **fields}


def test_the_generator_is_shared_by_all_tasks() -> None:
    assert per_task(result(20, 2000, 500)) == 600
    assert per_task(result(20, 2000, 500), 100) == 520


def test_a_trained_generator_pays_once_it_has_saved_its_bytes() -> None:
    plain = result(20, 1000, 600, trained=False)
    found = break_even([result(20, 3000, 500), result(50, 3000, 700), result(20, 900, 500), plain])
    assert [each["seen"]["tasks_to_pay"] for each in found] == [20, None, 0]


def test_only_fleets_of_the_same_sort_are_compared() -> None:
    real = result(14, 3000, 500, same_start=None, unseen=None)
    assert break_even([real, result(14, 1000, 600, trained=False)]) == []
    assert "unseen" not in break_even([real, result(14, 1000, 600, trained=False, same_start=None, unseen=None)])[0]


def test_the_table_has_a_row_for_each_setting() -> None:
    shown = table([result(20, 2000, 500), result(14, 2000, 500, same_start=None, unseen=None)]).splitlines()
    assert "| 20 | 32 | 4 | 1000 | 2,000 | 500 | 500 | 600 | 1 s | 1 MiB |" in shown
    assert shown[-1].startswith("| 14 real | 32 | 4 | 1000 | 2,000 | 500 |  | ")


def test_the_same_study_gives_the_same_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.benchmarks.growth.figure import draw

    settings = [result(tasks, 2000, 500) for tasks in (20, 50)] + [result(20, 1000, 600, trained=False)]
    for name in ("a.svg", "b.svg"):
        draw({"settings": settings, "bf16_bytes": 4000}, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
