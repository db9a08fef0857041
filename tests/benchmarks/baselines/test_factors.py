"""Baselines that store factors: truncation, the fleet's mean, mixed precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
import torch

from icmlora.adapter.arithmetic import truncated
from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from tests.benchmarks.baselines.catalogue import baseline_named
from tests.icmlora.small_fleet import dense, make_adapter


def test_truncation_is_the_best_of_its_rank() -> None:
    adapter = make_adapter(0, rank=8)
    kept = dense(truncated(adapter, 3))
    for name, full in dense(adapter).items():
        u, s, v = torch.linalg.svd(full, full_matrices=False)
        assert torch.allclose(kept[name], u[:, :3] @ torch.diag(s[:3]) @ v[:3], atol=1e-5)


def test_the_mean_is_the_mean() -> None:
    fleet = {"a": make_adapter(0), "b": make_adapter(1), "c": make_adapter(2)}
    baseline = baseline_named("mean32")
    mean = dense(baseline.decode(b"", baseline.prepare(fleet)))
    for name, value in mean.items():
        expected = torch.stack([dense(adapter)[name] for adapter in fleet.values()]).mean(dim=0)
        assert torch.allclose(value, expected, atol=0.02 * float(expected.abs().max()))


def test_the_mean_leaves_out_what_few_tasks_have() -> None:
    fleet = {"a": make_adapter(0), "b": make_adapter(1), "c": make_adapter(2, kinds=("q_proj", "v_proj", "down_proj"))}
    baseline = baseline_named("mean8")
    assert all("down_proj" not in module.name for module in baseline.decode(b"", baseline.prepare(fleet)).modules)


def test_a_task_without_a_module_of_the_mean_gets_its_own_back() -> None:
    fleet = {"a": make_adapter(0), "b": make_adapter(1)}
    stranger = make_adapter(5, kinds=("down_proj",))
    baseline = baseline_named("mean8+svd8")
    shared = baseline.prepare(fleet)
    assert squared_error(stranger, baseline.decode(baseline.encode(stranger, shared), shared)) < 1e-4


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapters to average"):
        baseline_named("mean").prepare({})


def test_more_bits_go_to_the_directions_that_carry_the_energy() -> None:
    adapter = make_adapter(0, rank=8)
    sizes = [len(baseline_named(f"loraquant4-{share}").encode(adapter, b"")) for share in (10, 90, 100)]
    assert sizes[0] < sizes[1] < sizes[2]


class Counting(Mapping[str, Adapter]):
    """A fleet that counts how many adapters are held at once and how often each is loaded."""

    def __init__(self, fleet: dict[str, Adapter]) -> None:
        self._fleet, self.loads = fleet, Counter[str]()

    def __getitem__(self, task: str) -> Adapter:
        self.loads[task] += 1
        return self._fleet[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fleet)

    def __len__(self) -> int:
        return len(self._fleet)


@pytest.mark.parametrize("name", ["bf16", "svd2", "loraquant2"])
def test_what_stores_each_adapter_alone_loads_no_fleet(name: str) -> None:
    fleet = Counting({"a": make_adapter(0)})
    assert baseline_named(name).prepare(fleet) == b""
    assert not fleet.loads
