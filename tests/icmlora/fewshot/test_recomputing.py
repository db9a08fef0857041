"""Activations that are computed again give the gradients of those that are kept, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from icmlora.base_models import log_probabilities
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import factors_of
from icmlora.fewshot import evidence as module
from icmlora.fewshot.evidence import Evidence, gather_evidence, mean_loss, recomputing
from icmlora.fewshot.finetune import FinetuneConfig, finetune
from tests.icmlora.fewshot.trained_tasks import NAMES, is_untouched, random_adapter, scored, weights_of
from tests.icmlora.tiny_base import load_tiny_base

TEXTS = ["a first text", "another one, and a longer one", "third", "one more of the fourth length"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function from whose call on a CPU counts as an accelerator."""
    return lambda: monkeypatch.setattr(module, "_AMPLE", ())


def layer_passes(base: BaseModel, run: Callable[[], object]) -> int:
    """Count how often the first layer's attention runs forward."""
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = base.model.get_submodule(NAMES[0]).register_forward_hook(count)
    run()
    handle.remove()
    return passes


def evidence(base: BaseModel) -> Evidence:
    return gather_evidence(base, factors_of(random_adapter(3)), NAMES, scored(base, TEXTS), batch_size=2)


def test_evidence_is_the_same(base: BaseModel, scarce: Callable[[], None]) -> None:
    kept = evidence(base)
    scarce()
    again = evidence(base)
    assert again.nats == pytest.approx(kept.nats, rel=1e-6)
    for name in NAMES:
        torch.testing.assert_close(again.modules[name].gradient, kept.modules[name].gradient)
        torch.testing.assert_close(again.modules[name].inputs, kept.modules[name].inputs)
        torch.testing.assert_close(again.modules[name].outputs, kept.modules[name].outputs)


def test_fine_tuning_is_the_same(base: BaseModel, scarce: Callable[[], None]) -> None:
    def tuned() -> list[torch.Tensor]:
        *_, (_, adapter) = finetune(base, random_adapter(3), scored(base, TEXTS), FinetuneConfig(3))
        return [factor for each in adapter.modules for factor in (each.a, each.b)]

    kept = tuned()
    scarce()
    for one, other in zip(tuned(), kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_layers_run_forward_twice_where_memory_is_scarce_and_once_where_it_is_not(
    base: BaseModel, scarce: Callable[[], None]
) -> None:
    once = layer_passes(base, lambda: evidence(base))
    scarce()
    assert layer_passes(base, lambda: evidence(base)) == 2 * once


def test_what_comes_into_a_module_is_not_kept_until_backward(
    base: BaseModel, scarce: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[StorageWeakRef] = []
    gone: list[bool] = []

    def before_backward(*arguments: Any) -> Any:
        gone.append(all(reference.expired() for reference in inputs))
        return loss_of_rows(*arguments)

    loss_of_rows = log_probabilities.cross_entropy
    monkeypatch.setattr(log_probabilities, "cross_entropy", before_backward)
    handle = base.model.get_submodule(NAMES[1]).register_forward_pre_hook(
        lambda _, arguments: inputs.append(StorageWeakRef(arguments[0].untyped_storage()))
    )
    gather_evidence(base, {}, NAMES, scored(base, TEXTS[:1]))
    scarce()
    gather_evidence(base, {}, NAMES, scored(base, TEXTS[:1]))
    handle.remove()
    assert gone == [False, True]


def test_backward_outside_of_the_block_is_an_error_and_not_a_wrong_gradient(
    base: BaseModel, scarce: Callable[[], None]
) -> None:
    scarce()
    factors = {name: (a.requires_grad_(), b) for name, (a, b) in factors_of(random_adapter(3)).items()}
    with mean_loss(base, factors, scored(base, TEXTS)) as loss:
        pass
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()  # type: ignore[no-untyped-call]


def test_the_model_is_left_as_it_was(base: BaseModel, scarce: Callable[[], None]) -> None:
    before, forwards = weights_of(base), [each.forward for each in base.model.modules()]
    scarce()
    evidence(base)
    assert is_untouched(base, before)
    assert [each.forward for each in base.model.modules()] == forwards


def test_a_model_without_such_layers_is_run_as_it_is(scarce: Callable[[], None]) -> None:
    scarce()
    model = nn.Sequential(nn.Linear(3, 3))
    with recomputing(model):
        assert model(torch.ones(2, 3)).shape == (2, 3)
