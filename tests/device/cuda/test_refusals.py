"""Controls: lines that are wrong on a card are refused by the stand-in. Else the other tests would show little."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch


def test_two_devices_in_one_operator_are_refused() -> None:
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_a_number_on_the_cpu_may_be_multiplied_with_but_not_added_into() -> None:
    assert (torch.ones(3, device="cuda") * torch.tensor(2.0)).tolist() == [2, 2, 2]
    total = torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="found at least two devices"):
        total += torch.ones((), device="cuda")


def test_a_generator_of_the_cpu_draws_nothing_on_the_card() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, generator=torch.Generator().manual_seed(1), device="cuda")
    assert torch.randn(3, generator=torch.Generator("cuda").manual_seed(1), device="cuda").is_cuda


def test_indices_on_the_card_find_nothing_in_a_tensor_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.arange(5)[torch.tensor([1, 2], device="cuda")]
    assert torch.arange(5, device="cuda")[torch.tensor([1, 2])].tolist() == [1, 2]


def test_numpy_sees_nothing_of_a_tensor_on_the_card() -> None:
    tensor = torch.ones(3, device="cuda")
    for read in (lambda x: x.numpy(), np.asarray, np.array, memoryview):
        with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy|bytes-like"):
            read(tensor)


def test_a_tensor_on_the_card_is_not_pickled_for_another_process() -> None:
    tensor = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="cannot be pickled for another process"):
        pickle.dumps({"weights": [tensor]})
    with pytest.raises(RuntimeError, match="cannot be pickled for another process"):
        multiprocessing.reduction.ForkingPickler.dumps(tensor)
    assert copy.deepcopy(tensor).is_cuda
