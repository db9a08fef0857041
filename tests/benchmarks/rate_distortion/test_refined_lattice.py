"""The lattice with icm's refinement, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import plain
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import added, factors_of
from icmlora.formats.discovery.folder import load_adapter
from icmlora.training.refinement import RefineConfig
from tests.benchmarks.baselines.head import ByteReader, Head
from tests.benchmarks.baselines.lattice import Lattice, from_bytes, to_bytes
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.refined_lattice import RefinedLattice, RelaxedRows, refined
from tests.cli.tiny_fleet import write_mixed_fleet
from tests.icmlora.small_fleet import make_adapter
from tests.icmlora.tiny_base import load_tiny_base, write_tiny_adapter, write_tiny_base

LATTICE = Lattice(4.0, full=True, by_energy=True)
TEXT = "a text of the task that is read again and again"


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return load_adapter(write_tiny_adapter(tmp_path / "adapter", strength=2.0))


def divergence(base: BaseModel, original: Adapter, other: Adapter) -> float:
    """Return KL(original || other) in nats, summed over the tokens of the text."""
    ids, rows = torch.tensor([base.tokenizer(TEXT)["input_ids"]]), []
    for side in (original, other):
        with torch.no_grad(), added(base.model, factors_of(side)):
            rows.append(base.model(ids).logits[0].log_softmax(dim=-1))
    return float((rows[0].exp() * (rows[0] - rows[1])).sum())


def test_relaxed_rows_are_the_code_until_a_step_is_taken(adapter: Adapter) -> None:
    rows = LATTICE.rows(adapter)
    relaxed = RelaxedRows(rows)
    assert relaxed.to_bytes() == to_bytes(rows)
    for module in rows.adapter().modules:
        a, b = relaxed.factors()[module.name]
        assert torch.allclose(b @ a, module.b @ module.a, atol=1e-6)


def test_their_bits_are_those_of_the_code_where_values_are_points() -> None:
    rows = LATTICE.rows(make_adapter(0, rank=8, kinds=("q_proj", "v_proj", "down_proj")))
    relaxed = RelaxedRows(rows)
    with torch.no_grad():
        relaxed.values[0].copy_(torch.from_numpy(rows.doubled()).float() / 2)
    reader = ByteReader(to_bytes(rows))
    Head.read(reader)
    reader.take(reader.number(4))
    assert float(relaxed.bits().detach()) == pytest.approx(8 * len(reader.rest()), abs=64)
    relaxed.bits().backward()
    assert float((relaxed.values[0].grad * relaxed.values[0].detach()).sum()) > 0  # smaller values are cheaper


def test_refinement_brings_back_what_rounding_lost_and_a_price_takes_bits_away(
    base: BaseModel, adapter: Adapter
) -> None:
    codes = {
        price: refined(LATTICE, adapter, base, plain([TEXT]), RefineConfig(steps=30, price=price, samples=1))
        for price in (0.0, 5.0)
    }
    before = LATTICE.encode(adapter, b"")
    assert divergence(base, adapter, from_bytes(codes[0.0])) < 0.7 * divergence(base, adapter, from_bytes(before))
    assert len(codes[5.0]) < len(before)


def test_a_killed_run_refines_only_what_is_missing(tmp_path: Path) -> None:
    write_mixed_fleet(tmp_path / "loras")
    fleet = FleetFolder(tmp_path / "loras", ["poems"])
    method = RefinedLattice("e8-4wf", write_tiny_base(tmp_path / "base"), steps=2)
    first = method.code(fleet, tmp_path / "work")
    (tmp_path / "base" / "model.safetensors").unlink()
    again = method.code(fleet, tmp_path / "work")
    assert first.sizes == again.sizes
    assert torch.equal(first.decode("poems").modules[0].a, again.decode("poems").modules[0].a)
