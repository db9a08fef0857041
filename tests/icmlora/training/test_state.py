"""A stopped run as two files."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from icmlora.errors import GeneratorError
from icmlora.io.tensors import decode_torch, encode_torch
from icmlora.training.loop import fit
from icmlora.training.state import TrainState, state_from_bytes
from tests.icmlora.small_fleet import begin, mixed_fleet, trained_file

CPU = torch.device("cpu")


def stopped(steps: int = 3) -> TrainState:
    state = begin(mixed_fleet(), 12)
    for _ in islice(fit(state, mixed_fleet()), steps):
        pass
    return state


def changed(data: bytes, drop: str = "", **header: str) -> bytes:
    stored, tensors = decode_torch(data)
    tensors.pop(drop, None)
    return encode_torch(tensors, {**stored, **header}, dtype="float32")


@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_comes_back_from_its_two_files(steps: int) -> None:
    state = stopped(steps)
    back = state_from_bytes(state.network_bytes(), state.optimizer_bytes(), CPU)
    assert (back.step, back.config, back.net.config) == (steps, state.config, state.net.config)
    assert back.network_bytes() == state.network_bytes()
    assert back.optimizer_bytes() == state.optimizer_bytes()


def test_files_of_different_steps_are_refused() -> None:
    early, late = stopped(2), stopped(3)
    with pytest.raises(GeneratorError, match="different training steps"):
        state_from_bytes(early.network_bytes(), late.optimizer_bytes(), CPU)


def test_the_two_files_are_not_interchangeable() -> None:
    state = stopped()
    with pytest.raises(GeneratorError, match="not a file of format"):
        state_from_bytes(state.optimizer_bytes(), state.network_bytes(), CPU)


@pytest.mark.parametrize("network", [b"", b"\0" * 40, trained_file()])
def test_a_file_that_is_no_network_of_a_run_is_refused(network: bytes) -> None:
    with pytest.raises(GeneratorError):
        state_from_bytes(network, stopped().optimizer_bytes(), CPU)


def test_a_file_cut_short_is_refused() -> None:
    state = stopped()
    with pytest.raises(GeneratorError, match="not a complete training state file"):
        state_from_bytes(state.network_bytes(), state.optimizer_bytes()[:-4], CPU)


@pytest.mark.parametrize("drop", ["prior.weight", "norm_mean"])
def test_a_network_that_lacks_a_tensor_is_refused(drop: str) -> None:
    state = stopped()
    with pytest.raises(GeneratorError, match="cannot be read"):
        state_from_bytes(changed(state.network_bytes(), drop), state.optimizer_bytes(), CPU)


@pytest.mark.parametrize("drop", ["counts", "0.exp_avg", "1.exp_avg_sq"])
def test_an_optimizer_that_lacks_a_tensor_is_refused(drop: str) -> None:
    state = stopped()
    with pytest.raises(GeneratorError, match="cannot be read"):
        state_from_bytes(state.network_bytes(), changed(state.optimizer_bytes(), drop), CPU)


@pytest.mark.parametrize("text", ["", "{}", '{"steps": 0}', '{"steps": 3, "surprise": 1}'])
def test_options_that_cannot_be_read_are_refused(text: str) -> None:
    state = stopped()
    with pytest.raises(GeneratorError):
        state_from_bytes(state.network_bytes(), changed(state.optimizer_bytes(), train=text), CPU)


def test_a_run_that_diverged_is_not_saved() -> None:
    state = stopped()
    with torch.no_grad():
        state.net.prior.bias[0] = torch.inf
    with pytest.raises(GeneratorError, match="diverged") as caught:
        state.network_bytes()
    assert caught.value.hint
