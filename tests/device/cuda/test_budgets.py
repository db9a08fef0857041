"""What work on a card may cost: an operator takes 5 to 10 microseconds to launch, a wait as long as what is left to do.

The numbers are those of today, rounded up. They do not depend on the machine. `tests/benchmarks/device_counts.py`
counts the same on a base model of real size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from icmlora import Fleet
from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import plain
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.modality import BaseModel
from icmlora.formats.discovery.folder import load_adapter
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.training.loop import draws_of
from icmlora.training.refinement import RefineConfig, items_for
from tests.device import workloads
from tests.device.counts import counting
from tests.icmlora.small_fleet import begin, mixed_fleet
from tests.icmlora.tiny_base import LABEL, write_tiny_adapter, write_tiny_base
from tests.icmlora.untrained import untrained_codec

TEXTS = plain([f"text number {number} of eight, of about the same length" for number in range(8)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = write_tiny_base(tmp_path_factory.mktemp("base") / "base")
    return CausalLM().load(inspect_base(LABEL, folder), device=workloads.CARD)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [load_adapter(write_tiny_adapter(folder / str(seed), seed=seed, strength=2.0)) for seed in range(4)]


@pytest.fixture(scope="module")
def codec(adapters: list[Adapter]) -> Codec:
    return untrained_codec(*adapters)


def test_a_training_step_of_eight_adapters_waits_for_nothing_and_copies_only_what_is_read_ahead() -> None:
    counts, steps = workloads.training(begin(mixed_fleet(), 1).net, mixed_fleet())
    assert counts.operators / steps / draws_of(workloads.CARD) <= 120
    assert counts.copies_to / steps <= 3
    assert (counts.copies_from, counts.syncs) == (1, 1)  # progress reads the loss, once in ten steps


def test_a_step_of_refining_one_code_waits_only_for_the_base_model(
    base: BaseModel, codec: Codec, adapters: list[Adapter]
) -> None:
    items = base.modality.prepare(base, TEXTS, 64, whole=True)
    counts = workloads.refinement(base, codec, adapters[:1], items)
    assert counts.operators <= 700
    assert counts.copies_to <= 4
    assert (counts.copies_from, counts.syncs) == (0, 1)  # transformers looks whether texts are packed


def test_four_codes_that_are_refined_together_take_less_than_three_quarters_of_what_they_take_alone(
    base: BaseModel, codec: Codec, adapters: list[Adapter]
) -> None:
    items = base.modality.prepare(base, TEXTS, 64, whole=True)
    alone, together = (workloads.refinement(base, codec, adapters[:number], items) for number in (1, 4))
    assert together.operators <= 3 * alone.operators


def test_a_model_that_writes_texts_is_given_the_factors_once(base: BaseModel, adapters: list[Adapter]) -> None:
    with counting() as counts:
        items_for(base, adapters[0], (), RefineConfig(samples=2, tokens=32))
    factors, forward_passes = 2 * len(adapters[0].modules), 2 * 32
    assert counts.copies_to <= factors + forward_passes


def test_a_text_of_an_evaluation_takes_a_share_of_its_batch(base: BaseModel) -> None:
    counts = workloads.evaluation(base, TEXTS, 64)
    assert counts.operators <= 40
    assert counts.copies_to <= 2
    assert counts.syncs == 0  # the losses of eight texts are read at once


def test_the_vectors_of_a_task_are_read_once_for_each_view(base: BaseModel, tmp_path: Path) -> None:
    counts = workloads.vectors(base, write_tiny_adapter(tmp_path / "adapter"), TEXTS)
    assert counts.copies_from == 2


def test_a_code_is_decoded_on_the_cpu_and_its_factors_copied(trained: Path) -> None:
    fleet = Fleet(trained)
    task = fleet.tasks()[0].name
    counts = workloads.decoding(fleet, task)
    assert counts.operators == 0
    assert counts.copies_to == 2 * len(fleet.load(task, source="code").modules)


def test_a_code_can_be_decoded_on_the_card_to_which_its_integers_are_copied(
    codec: Codec, adapters: list[Adapter]
) -> None:
    code = encode_adapter(codec, adapters[0], {}).data
    with counting() as counts:
        found = codec.decode(code, workloads.CARD)
    for module, expected in zip(found.modules, codec.decode(code).modules, strict=True):
        assert module.a.device.type == module.b.device.type == "cuda"
        torch.testing.assert_close(module.a.cpu(), expected.a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.b.cpu(), expected.b, rtol=1e-5, atol=1e-6)
    kinds = len({module.shape[1:] for module in found.modules})
    assert counts.copies_from <= 4 * kinds  # whether all values are finite
