"""Threads: order, errors, and torch on one thread in each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from icmlora.io.threads import ahead, one_thread, side_by_side


def test_one_thread_ends_with_the_block_however_it_ends() -> None:
    before = torch.get_num_threads()
    seen = []

    @one_thread()
    def work() -> None:
        seen.append(torch.get_num_threads())
        raise ValueError

    with pytest.raises(ValueError):
        work()
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_what_is_mapped_side_by_side_comes_in_order_on_one_torch_thread_each_and_without_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)

    def work(number: int) -> tuple[int, int, bool]:
        return number, torch.get_num_threads(), (weight * number).requires_grad

    with side_by_side() as each:
        found = list(each(work, range(20)))
    assert found == [(number, 1, False) for number in range(20)]


def test_what_is_made_ahead_comes_in_order_and_once() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    assert list(ahead(items())) == made == [0, 1, 2, 3, 4]


def test_only_one_item_is_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    running = ahead(items())
    assert next(running) == 0
    running.close()
    assert len(made) <= 2


def test_an_error_in_an_item_reaches_the_caller_when_its_turn_comes() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    running = ahead(items())
    assert next(running) == 1
    with pytest.raises(ValueError, match="broken"):
        next(running)
