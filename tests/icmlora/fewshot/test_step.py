"""A step is a direction of length 1 that goes downhill; the same evidence gives the same step."""

from __future__ import annotations

import pytest
import torch

from icmlora.adapter.arithmetic import with_modules
from icmlora.adapter.model import LoraModule
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fewshot.evidence import Evidence, ModuleEvidence, gather_evidence
from icmlora.fewshot.step import strongest, unit_steps
from tests.icmlora.fewshot.trained_tasks import NAMES, random_adapter, scored
from tests.icmlora.tiny_base import load_tiny_base

TEXTS = ["a first text", "another one, and a longer one", "third"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny_base(tmp_path_factory.mktemp("base"))


def evidence(outputs: int = 12, inputs: int = 20, seed: int = 0, rank: int | None = None) -> Evidence:
    """Return evidence of one module whose gradient is of a rank, or of full rank."""
    random = torch.Generator().manual_seed(seed)
    rank = rank or min(outputs, inputs)
    gradient = torch.randn(outputs, rank, generator=random) @ torch.randn(rank, inputs, generator=random)
    squares = torch.rand(inputs, generator=random), torch.rand(outputs, generator=random)
    return Evidence({"m": ModuleEvidence(gradient, *squares)}, 1.0, 10)


def change(module: LoraModule) -> torch.Tensor:
    return module.b.double() @ module.a.double()


def nats_after(base: BaseModel, length: float) -> float:
    samples = scored(base, TEXTS)
    units = unit_steps(gather_evidence(base, {}, NAMES, samples))
    long = [LoraModule(unit.name, unit.a, length * unit.b) for unit in units]
    adapter = with_modules(random_adapter(0), long)
    return gather_evidence(base, factors_of(adapter), NAMES, samples).nats


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_its_length_is_one(rank: int) -> None:
    (unit,) = unit_steps(evidence(outputs=30, inputs=40), rank)
    assert unit.a.shape == (rank, 40)
    assert float(change(unit).norm()) == pytest.approx(1, rel=1e-4)


def test_a_module_narrower_than_the_rank_has_its_width_of_directions() -> None:
    (unit,) = unit_steps(evidence(outputs=3, inputs=5))
    assert unit.a.shape == (3, 5)
    assert float(change(unit).norm()) == pytest.approx(1, rel=1e-4)


def test_it_is_the_gradient_over_the_damped_root_mean_squares_turned_downhill() -> None:
    given = evidence()
    module = given.modules["m"]
    roots = [(part + 0.05 * part.mean()).sqrt() for part in (module.outputs, module.inputs)]
    wanted = -(module.gradient / roots[0][:, None] / roots[1]).double()
    (unit,) = unit_steps(given)
    assert torch.allclose(change(unit), wanted / wanted.norm(), atol=1e-5)


def test_its_directions_are_the_strongest_ones() -> None:
    given = evidence(rank=6)
    (whole,), (cut,) = unit_steps(given), unit_steps(given, 2)
    u, s, v = torch.linalg.svd(change(whole))
    wanted = u[:, :2] @ s[:2].diag() @ v[:2]
    assert torch.allclose(change(cut), wanted / wanted.norm(), atol=1e-4)


def test_against_it_the_gradient_points_uphill() -> None:
    given = evidence()
    (unit,) = unit_steps(given)
    assert float((given.modules["m"].gradient.double() * change(unit)).sum()) < 0


def test_the_loss_falls_along_a_short_one(base: BaseModel) -> None:
    assert nats_after(base, 0.02) < nats_after(base, 0.0) < nats_after(base, -0.02)


def test_a_module_without_a_gradient_gets_zeros() -> None:
    nothing = ModuleEvidence(torch.zeros(4, 6), torch.zeros(6), torch.zeros(4))
    (unit,) = unit_steps(Evidence({"m": nothing}, 1.0, 1))
    assert torch.equal(change(unit), torch.zeros(4, 6, dtype=torch.float64))


def test_silent_inputs_get_finite_values() -> None:
    given = evidence().modules["m"]
    (unit,) = unit_steps(Evidence({"m": ModuleEvidence(given.gradient, 0 * given.inputs, given.outputs)}, 1.0, 1))
    assert torch.isfinite(change(unit)).all()


def test_it_is_the_same_each_time_and_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = unit_steps(evidence(outputs=40, inputs=60))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = unit_steps(evidence(outputs=40, inputs=60))
    assert torch.equal(first[0].a, again[0].a)
    assert torch.equal(first[0].b, again[0].b)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (12, 12)])
def test_the_strongest_directions_are_those_of_torch_bit_for_bit(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    count = min(24, *shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = torch.svd_lowrank(matrix, q=count, niter=2)
    found = strongest(matrix, count, torch.Generator().manual_seed(0))
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
