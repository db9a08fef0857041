"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from icmlora.errors import DeviceUnavailable
from icmlora.io.devices import gradient_dtype, inference_dtype, resolve_device, seed_everything


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("no_accelerator")
def test_auto_is_the_cpu_where_nothing_else_exists() -> None:
    assert resolve_device() == torch.device("cpu")


@pytest.mark.usefixtures("two_cards")
def test_auto_prefers_a_gpu() -> None:
    assert resolve_device("auto") == torch.device("cuda")


def test_auto_takes_mps_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_an_accelerator_that_is_not_there_is_an_error_with_a_hint(name: str) -> None:
    with pytest.raises(DeviceUnavailable) as caught:
        resolve_device(name)
    assert name in str(caught.value)
    assert caught.value.hint is not None


@pytest.mark.usefixtures("two_cards")
def test_a_card_can_be_chosen_by_its_number() -> None:
    assert resolve_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.usefixtures("two_cards")
def test_a_card_beyond_the_last_is_an_error_that_gives_the_range() -> None:
    with pytest.raises(DeviceUnavailable) as caught:
        resolve_device("cuda:2")
    assert caught.value.hint == "use cuda:0 to cuda:1"


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cpu:0", "CUDA", "cuda:-1"])
def test_an_unknown_name_is_an_error_that_lists_the_names(name: str) -> None:
    with pytest.raises(DeviceUnavailable) as caught:
        resolve_device(name)
    assert "cuda:N" in str(caught.value.hint)


def test_a_cpu_computes_in_float32_and_an_accelerator_in_bfloat16() -> None:
    assert inference_dtype(torch.device("cpu")) is torch.float32
    assert inference_dtype(torch.device("cuda:0")) is torch.bfloat16


def test_the_same_seed_gives_the_same_numbers() -> None:
    seed_everything(7)
    first = torch.randn(4)
    seed_everything(7)
    assert torch.equal(first, torch.randn(4))


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_gradients_on_a_cpu_are_in_bfloat16_where_it_multiplies_that(
    monkeypatch: pytest.MonkeyPatch, supported: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert gradient_dtype(torch.device("cpu")) == expected


def test_gradients_on_an_accelerator_are_in_bfloat16() -> None:
    assert gradient_dtype(torch.device("cuda")) == torch.bfloat16
