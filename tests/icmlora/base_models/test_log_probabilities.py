"""Log probabilities of a few classes are those of the formula, and so are their gradients, however many pieces."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from icmlora.base_models import log_probabilities as module
from icmlora.base_models.log_probabilities import cross_entropy, log_probabilities
from icmlora.base_models.modality import IGNORED

ROWS, CLASSES = 7, 11


def drawn(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(ROWS, CLASSES, generator=random)
    return logits.to(dtype).requires_grad_(), torch.randint(CLASSES, (ROWS, 3), generator=random)


@pytest.mark.parametrize("piece", [1, 2 * CLASSES, 1000])
def test_values_and_gradients_are_those_of_the_formula(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    logits, classes = drawn()
    before = logits.detach().clone()
    weights = torch.linspace(-1, 2, classes.numel()).view_as(classes)
    found, wanted = log_probabilities(logits, classes), logits.log_softmax(dim=-1).gather(-1, classes)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((weights * one).sum(), logits)[0] for one in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(logits, before)


def test_logits_in_few_bits_are_added_up_in_float32() -> None:
    logits, classes = drawn(torch.bfloat16)
    found = log_probabilities(logits, classes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits.float().log_softmax(dim=-1).gather(-1, classes))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.dtype == torch.bfloat16


def test_a_loss_is_that_of_the_last_predictions_without_those_that_are_not_scored() -> None:
    logits, _ = drawn()
    wanted = [3, IGNORED, 10, 0]
    expected = functional.cross_entropy(logits[-4:], torch.tensor(wanted), reduction="sum", ignore_index=IGNORED)
    found = cross_entropy(logits, wanted)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_class_without_any_probability_does_no_harm_where_it_is_not_scored() -> None:
    logits = torch.zeros(2, CLASSES)
    logits[:, 0] = -torch.inf
    assert float(cross_entropy(logits, [IGNORED, 1])) == pytest.approx(torch.tensor(CLASSES - 1.0).log().item())
