"""Bases that tasks share, and the clusters of tasks that share them."""

from __future__ import annotations

import pytest
import torch

from icmlora.adapter.metrics import dw_norm, squared_error
from icmlora.baselines.bases import fit_bases
from icmlora.baselines.catalogue import baseline_named
from icmlora.errors import CodeError, NotCovered
from tests.icmlora.small_fleet import make_adapter, with_factors


def test_full_bases_keep_what_a_sum_of_projections_keeps() -> None:
    fleet = {str(seed): make_adapter(seed) for seed in range(4)}
    bases = fit_bases(fleet, fleet, 6, diagonal=False, passes=10)
    for module in fleet["1"].modules:
        u, v = bases.outputs[module.name], bases.inputs[module.name]
        assert torch.allclose(u.mT @ u, torch.eye(u.shape[1]), atol=1e-5)
        assert torch.allclose(bases.core(module), u.mT @ module.b @ module.a @ v, atol=1e-5)


@pytest.mark.parametrize("diagonal", [False, True])
def test_passes_over_the_fleet_improve_the_bases(diagonal: bool) -> None:
    fleet = {str(seed): make_adapter(seed) for seed in range(4)}
    kept = []
    for passes in (0, 1, 10):
        bases = fit_bases(fleet, fleet, 3, diagonal=diagonal, passes=passes)
        kept.append(sum(bases.explained(adapter) / dw_norm(adapter) ** 2 for adapter in fleet.values()))
    assert kept == sorted(kept)


def test_a_strong_task_does_not_take_the_bases_for_itself() -> None:
    fleet = {"loud": with_factors(make_adapter(0), b=100.0), "quiet": make_adapter(1)}
    baseline = baseline_named("jd2")
    shared = baseline.prepare(fleet)
    lost = {task: squared_error(a, baseline.decode(baseline.encode(a, shared), shared)) for task, a in fleet.items()}
    assert lost["quiet"] < 0.9


def test_clusters_part_what_does_not_belong_together() -> None:
    first, second = make_adapter(1, own=0.0), make_adapter(2, own=50.0)
    fleet = {"a": first, "b": second, "c": with_factors(first, b=1.1), "d": with_factors(second, b=1.1)}
    baseline = baseline_named("jd2x2")
    shared = baseline.prepare(fleet)
    places = {task: baseline.encode(adapter, shared)[0] for task, adapter in fleet.items()}
    assert places["a"] == places["c"] != places["b"] == places["d"]


def test_an_adapter_without_a_shared_module_is_refused() -> None:
    baseline = baseline_named("jd2")
    shared = baseline.prepare({"a": make_adapter(0)})
    with pytest.raises(NotCovered):
        baseline.encode(make_adapter(1, kinds=("down_proj",)), shared)


def test_a_cluster_that_is_not_there_is_refused() -> None:
    baseline = baseline_named("jd2")
    shared = baseline.prepare({"a": make_adapter(0)})
    code = baseline.encode(make_adapter(0), shared)
    with pytest.raises(CodeError, match="cluster 7"):
        baseline.decode(b"\x07" + code[1:], shared)
