"""Detect this machine's GPUs through torch and the system; no function here raises.

Querying free memory through torch initialises CUDA on the card: for `icm doctor`, not for every command.
"""

from __future__ import annotations

import subprocess
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI vendor, and first byte of the class of display controllers
_TIMEOUT = 10.0  # seconds: nvidia-smi takes one or two, and blocks forever on a hung card
# Oldest driver for each CUDA build, newest first (NVIDIA, CUDA compatibility). PyTorch has published stable builds for
# both since 2.9.
_BUILDS = ((580, "cu130"), (525, "cu126"))


@dataclass(frozen=True)
class Card:
    """A card that torch computes on.

    Attributes:
        name: The model name.
        memory_bytes: Total memory.
        free_bytes: Unused memory; None if the card does not report it.
        bfloat16: Whether it computes in bfloat16.
    """

    name: str
    memory_bytes: int
    free_bytes: int | None
    bfloat16: bool


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver version and the names of its cards."""

    version: str
    cards: tuple[str, ...]


def cuda_cards() -> tuple[dict[str, Card], str | None]:
    """Return torch's CUDA or ROCm cards by device, and torch's reason if it finds none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            cards = {f"cuda:{index}": _cuda_card(index) for index in range(count)}
        except Exception as error:  # a broken driver makes torch raise many kinds of errors
            return {}, _first_line(error)
    return cards, _first_line(said[0].message) if said and not cards else None


def _cuda_card(index: int) -> Card:
    facts = torch.cuda.get_device_properties(index)
    free = None
    with suppress(RuntimeError):  # fails on a full card
        free, _ = torch.cuda.mem_get_info(index)
    # torch.cuda.is_bf16_supported(including_emulation=False) checks only the current card.
    bfloat16 = torch.version.hip is not None or facts.major >= 8
    return Card(facts.name, facts.total_memory, free, bfloat16)


def mps_card() -> Card | None:
    """Return the GPU of a Mac; its memory is the share of system memory that it may use."""
    with suppress(Exception):
        if torch.backends.mps.is_available():
            bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
            return Card("Apple GPU", torch.mps.recommended_max_memory(), None, bfloat16)
    return None


def toolkit() -> str | None:
    """Return the GPU toolkit of this torch build: "CUDA 13.0", "ROCm 7.2", or None."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return None if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def nvidia_driver() -> Driver | None:
    """Return NVIDIA's driver as nvidia-smi reports it; None where it drives no card."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ", 1) for line in ran.stdout.splitlines() if ", " in line]
    return Driver(rows[0][0], tuple(name for _, name in rows)) if rows else None


def has_nvidia_card() -> bool:
    """Return whether this machine has an NVIDIA card, with or without a driver (Linux only)."""
    with suppress(OSError):
        return any(
            (device / "vendor").read_text().strip() == _NVIDIA and (device / "class").read_text().startswith(_DISPLAY)
            for device in _PCI.iterdir()
        )
    return False


def install_command(driver: Driver) -> str:
    """Return the command that installs a CUDA build of torch for a driver."""
    major = driver.version.partition(".")[0]
    build = next((name for least, name in _BUILDS if major.isdigit() and int(major) >= least), _BUILDS[-1][1])
    # Without --upgrade, pip keeps the installed build: its version differs only after the "+".
    return f"pip install --upgrade torch --index-url https://download.pytorch.org/whl/{build}"


def _first_line(message: object) -> str:
    return (str(message).splitlines() or [type(message).__name__])[0]
