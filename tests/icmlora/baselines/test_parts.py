"""Heads, truncation, means and shared bases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
import torch

from icmlora.adapter.canonical import truncated
from icmlora.adapter.layout import target_modules
from icmlora.adapter.metrics import dw_norm, relative_dw_error
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.baselines.catalogue import baseline_named
from icmlora.baselines.head import ByteReader, Head
from icmlora.baselines.joint import fit_bases
from icmlora.errors import CodeError, NotCovered
from tests.icmlora.small_fleet import make_adapter, with_factors


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {module.name: module.b @ module.a for module in adapter.modules}


def with_names(*names: str) -> Adapter:
    modules = tuple(LoraModule(name, torch.ones(1, 3), torch.ones(2, 1)) for name in names)
    return Adapter("a/b", None, target_modules(names), modules, "main")


@pytest.mark.parametrize(
    "names",
    [
        ("model.layers.0.q", "model.layers.1.q", "model.layers.3.q", "model.layers.10.v"),
        ("lm_head",),
        ("experts.0.1.up", "experts.0.2.up", "experts.1.1.up"),
        ("blocks.07.q", "blocks.7.q"),
    ],
)
def test_a_head_gives_labels_names_and_sizes_back(names: tuple[str, ...]) -> None:
    head = Head.of(with_names(*names))
    assert Head.read(ByteReader(head.to_bytes())) == head


def test_a_head_of_sixty_modules_takes_two_hundred_bytes() -> None:
    names = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(30) for kind in "qv"]
    assert len(Head.of(with_names(*names)).to_bytes()) < 200


@pytest.mark.parametrize("data", [b"", b"\x05\0abcde", b"\xff\xff"])
def test_something_else_is_no_head(data: bytes) -> None:
    with pytest.raises(CodeError):
        Head.read(ByteReader(data))


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
    assert relative_dw_error(stranger, baseline.decode(baseline.encode(stranger, shared), shared)) < 1e-4


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no mean"):
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
    lost = {
        task: relative_dw_error(a, baseline.decode(baseline.encode(a, shared), shared)) for task, a in fleet.items()
    }
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
