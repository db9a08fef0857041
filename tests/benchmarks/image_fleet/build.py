"""Make files of LoRAs for SDXL of any number: shapes and names of kohya's, singular values as measured.

    python -m tests.benchmarks.image_fleet.build FOLDER [--count 50] [--rank 16] [--text] [--flat]

    dW = U S V^T    S drawn from the fit; U and V random, but the first pair of each module has a part that the fleet
                    shares, as large as makes two adapters as similar as measured

A (`lora_down`) is V^T turned, with rows as long as training leaves them; B (`lora_up`) has the rest. fp16, alpha is
half of the rank. Every fifth file also has the convolutions, at half the rank. The same number gives the same file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.benchmarks.image_fleet.sdxl import Module, attention_modules, convolution_modules, text_modules
from tests.benchmarks.image_fleet.spectrum import FLAT, STEEP, Spectrum

_ROW = math.sqrt(1 / 3)
"""Length of a row of A: kohya's initialisation is uniform in +-1 / sqrt(in)."""
_NORM = 0.35
"""Frobenius norm of a typical module's dW; it has no influence on relative errors."""


def write_fleet(
    folder: Path, numbers: range, *, rank: int = 16, text: bool = False, spectrum: Spectrum = STEEP, seed: int = 0
) -> list[Path]:
    """Write the adapters of these numbers that are not there, and return their files; another seed is another fleet."""
    linear = attention_modules() + (text_modules() if text else [])
    convolutions = convolution_modules()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in numbers:
        ranks = [(module, rank) for module in linear]
        if number % 5 == 4:
            ranks += [(module, rank // 2) for module in convolutions]
        path = folder / f"style-{number:04d}.safetensors"
        if not path.exists():
            write_file(path, ranks, number, spectrum=spectrum, seed=seed)
        paths.append(path)
    return paths


def write_file(
    path: Path, ranks: Sequence[tuple[Module, int]], number: int, *, spectrum: Spectrum = STEEP, seed: int = 0
) -> None:
    """Write one adapter of modules with their ranks."""
    random = torch.Generator().manual_seed(1_000_003 * seed + number)
    tensors = {}
    for module, rank in ranks:
        down, up = _factors(module, rank, spectrum, seed, random)
        alpha = rank / 2
        kernel = (module.kernel, module.kernel) if module.kernel else ()
        point = (1, 1) if module.kernel else ()
        tensors[f"{module.name}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
        tensors[f"{module.name}.lora_down.weight"] = down.reshape(rank, module.inputs, *kernel).half()
        tensors[f"{module.name}.lora_up.weight"] = (up * (rank / alpha)).reshape(module.outputs, rank, *point).half()
    largest = max(rank for _, rank in ranks)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(largest),
        "ss_network_alpha": str(largest / 2),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
        "ss_output_name": path.stem,
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    }
    save_file(tensors, path, metadata=header)


def _factors(
    module: Module, rank: int, spectrum: Spectrum, seed: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return A of shape (rank, width) and B of shape (outputs, rank)."""
    of_fleet = torch.Generator().manual_seed(crc32(f"{seed} {module.name}".encode()))
    part = spectrum.shared()
    u = _directions(module.outputs, rank, part, of_fleet, random)
    v = _directions(module.width, rank, part, of_fleet, random)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=random))[0]
    values = _NORM * spectrum.draw(rank, random)
    return _ROW * turn @ v.T, (u * values) @ turn.T / _ROW


def _directions(width: int, rank: int, part: float, of_fleet: torch.Generator, random: torch.Generator) -> Tensor:
    """Return orthonormal columns, shape (width, rank); the first has the same cosine with every adapter's first."""
    common = torch.randn(width, generator=of_fleet)
    columns = torch.randn(width, rank, generator=random)
    columns[:, 0] = math.sqrt(part) * common + math.sqrt(1 - part) * columns[:, 0]
    q, r = torch.linalg.qr(columns)
    return q * r.diagonal().sign()


def main() -> None:
    """Write a fleet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--text", action="store_true", help="with both text encoders")
    parser.add_argument("--flat", action="store_true", help="the flattest singular values measured")
    options = parser.parse_args()
    spectrum = FLAT if options.flat else STEEP
    for path in write_fleet(
        options.folder, range(options.count), rank=options.rank, text=options.text, spectrum=spectrum
    ):
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
