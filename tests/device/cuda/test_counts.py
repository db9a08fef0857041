"""What the stand-in counts: budgets are only as good as that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.device.counts import Counts, counting


def counted(work: Callable[[], Any]) -> Counts:
    with counting() as counts:
        work()
    return counts


def recorded() -> torch.Event:
    event = torch.Event("cuda")
    event.record()
    return event


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(12.0, device="cuda").reshape(3, 4)


def test_kernels_are_operators_and_looks_at_memory_are_views(x: torch.Tensor) -> None:
    counts = counted(lambda: (x.T[1:].unsqueeze(0).expand(2, -1, -1).detach() * 2).sum())
    assert (counts.operators, counts.views, counts.syncs) == (2, 5, 0)


def test_work_on_the_cpu_is_free() -> None:
    counts = counted(lambda: torch.ones(3).add(1).sum().item())
    assert counts == Counts()


def test_backward_passes_count(x: torch.Tensor) -> None:
    weight = torch.ones(4, device="cuda", requires_grad=True)
    forward = counted(lambda: (x * weight).sum())
    both = counted(lambda: (x * weight).sum().backward())
    assert (forward.operators, both.operators > forward.operators) == (2, True)


def test_a_fused_optimiser_is_a_few_operators_whatever_it_is_given() -> None:
    def step(count: int, **options: bool) -> Counts:
        weights = [torch.ones(4, device="cuda", requires_grad=True) for _ in range(count)]
        optimiser = torch.optim.AdamW(weights, **options)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimiser.step()
        return counted(optimiser.step)

    assert step(3, fused=True).operators == step(30, fused=True).operators == 2
    assert step(3).operators == step(30).operators > 2  # `foreach`, as on a card
    assert step(30, foreach=False).operators > 100


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: f"{x.sum():.2f}",
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 3],
        lambda x: x.masked_select(x > 3),
        lambda x: torch.unique(x),
        lambda x: torch.equal(x, x),
        lambda x: torch.isin(x, torch.arange(99, device="cuda")),
        lambda x: torch.bincount(x.long().flatten()),
        lambda x: torch.repeat_interleave(x, x[:, 1].long(), dim=0),
        lambda x: torch.multinomial(x + 1, 1),
        lambda x: torch.linalg.svd(x),
        lambda x: x.index_put((x > 3,), x.new_zeros(1)),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.empty(3, 4).copy_(x, non_blocking=True),
        lambda _: torch.cuda.synchronize(),
        lambda _: recorded().synchronize(),
    ],
    ids=range(21),
)
def test_the_host_waits(work: Callable[[torch.Tensor], Any], x: torch.Tensor) -> None:
    assert counted(lambda: work(x)).syncs == 1


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[torch.arange(2, device="cuda")],
        lambda x: torch.where(x > 3, x, 0),
        lambda x: x.clone().masked_fill_(x > 3, 0),
        lambda x: torch.repeat_interleave(x, torch.ones(3, dtype=torch.long, device="cuda"), dim=0, output_size=3),
        lambda x: torch.isin(x, torch.zeros(1, device="cuda")),
        lambda x: torch.ones(3).to("cuda", non_blocking=True),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(3, 4).pin_memory().copy_(x, non_blocking=True),
        lambda x: torch.randn(3, device="cuda").sort(),
        lambda x: torch.linalg.qr(x),
    ],
    ids=range(10),
)
def test_the_host_does_not_wait(work: Callable[[torch.Tensor], Any], x: torch.Tensor) -> None:
    assert counted(lambda: work(x)).syncs == 0


def test_copies_are_counted_with_their_bytes(x: torch.Tensor) -> None:
    counts = counted(lambda: (torch.ones(5).cuda(), x.cpu(), x[torch.tensor([0, 2])]))
    assert (counts.copies_to, counts.bytes_to) == (2, 5 * 4 + 2 * 8)  # the indices too
    assert (counts.copies_from, counts.bytes_from) == (1, 12 * 4)


def test_it_counts_in_other_threads_and_inside_another_count(x: torch.Tensor) -> None:
    with counting() as outer:
        with counting() as inner:
            thread = threading.Thread(target=lambda: torch.zeros(3, device="cuda").add(1))
            thread.start()
            thread.join()
        x.add(1)
    assert (inner.operators, outer.operators) == (2, 3)
