"""What cards this machine has, asked of torch and of the machine itself; nothing here raises, whatever they answer.

Asking torch for free memory starts CUDA on the card, so this is for `icm doctor`, not for every command.
"""

from __future__ import annotations

import subprocess
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # the vendor, and the first byte of the class of what can compute or draw
_PATIENCE = 10.0  # seconds: nvidia-smi takes one or two, and waits for ever for a card that hangs
# Oldest driver that runs builds for a CUDA version (NVIDIA, CUDA compatibility), newest first; PyTorch has published
# stable builds for both since 2.9.
_BUILDS = ((580, "cu130"), (525, "cu126"))


@dataclass(frozen=True)
class Card:
    """A card that torch computes on.

    Attributes:
        name: What it is called.
        memory_bytes: How much memory it has.
        free_bytes: How much of that nobody uses; None if the card does not say.
        bfloat16: Whether it computes in bfloat16.
    """

    name: str
    memory_bytes: int
    free_bytes: int | None
    bfloat16: bool


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver, and the names of the cards that it drives."""

    version: str
    cards: tuple[str, ...]


def cuda_cards() -> tuple[dict[str, Card], str | None]:
    """Return the cards that torch reaches through CUDA or ROCm by device, and why it reaches none, if it says so."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            cards = {f"cuda:{index}": _cuda_card(index) for index in range(count)}
        except Exception as error:  # a driver makes torch raise all kinds of errors
            return {}, _first_line(error)
    return cards, _first_line(said[0].message) if said and not cards else None


def _cuda_card(index: int) -> Card:
    facts = torch.cuda.get_device_properties(index)
    free = None
    with suppress(RuntimeError):  # a card that is full cannot even say so
        free, _ = torch.cuda.mem_get_info(index)
    # As torch.cuda.is_bf16_supported says without its emulation, but for this card instead of the current one.
    bfloat16 = torch.version.hip is not None or facts.major >= 8
    return Card(facts.name, facts.total_memory, free, bfloat16)


def mps_card() -> Card | None:
    """Return the GPU of a Mac; its memory is the part of the machine's that it may use."""
    with suppress(Exception):
        if torch.backends.mps.is_available():
            bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
            return Card("Apple GPU", torch.mps.recommended_max_memory(), None, bfloat16)
    return None


def toolkit() -> str | None:
    """Return what torch is built for: "CUDA 13.0", "ROCm 7.2", or None for a build that knows no such card."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return None if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def nvidia_driver() -> Driver | None:
    """Return NVIDIA's driver, asked through nvidia-smi, which comes with it; None where it drives no card."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ", 1) for line in ran.stdout.splitlines() if ", " in line]
    return Driver(rows[0][0], tuple(name for _, name in rows)) if rows else None


def has_nvidia_card() -> bool:
    """Return whether a card of NVIDIA is plugged into this machine, with a driver or without (Linux only)."""
    with suppress(OSError):
        return any(
            (device / "vendor").read_text().strip() == _NVIDIA and (device / "class").read_text().startswith(_DISPLAY)
            for device in _PCI.iterdir()
        )
    return False


def install_command(driver: Driver) -> str:
    """Return the command that replaces torch with a build for CUDA that a driver runs."""
    major = driver.version.partition(".")[0]
    build = next((name for least, name in _BUILDS if major.isdigit() and int(major) >= least), _BUILDS[-1][1])
    # Without --upgrade pip keeps the build that is there, whose version is the same but for what follows the "+".
    return f"pip install --upgrade torch --index-url https://download.pytorch.org/whl/{build}"


def _first_line(message: object) -> str:
    return (str(message).splitlines() or [type(message).__name__])[0]
