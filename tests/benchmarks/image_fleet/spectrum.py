"""How the singular values of real adapters fall, fitted to a fleet, and values drawn from the fit.

    python -m tests.benchmarks.image_fleet.spectrum FLEET

    sigma_i = i^-p exp(scatter z_i)    p ~ N(decay, decay_spread) per module, z ~ N(0, 1), then sorted
    |dW| of a module = exp(norm_spread z)

FLEET is a folder of PEFT folders. What was fitted are language adapters: no image adapter was at hand.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Factors = dict[str, tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r) by module; the scale is in B."""


@dataclass(frozen=True)
class Spectrum:
    """What the fit found.

    Attributes:
        decay: Mean exponent p.
        decay_spread: Its standard deviation over modules.
        scatter: Of the logarithm of a singular value around the power law.
        norm_spread: Of the logarithm of the Frobenius norms of an adapter's modules.
        cosine: Between the dW of two adapters whose A started from different seeds.
    """

    decay: float
    decay_spread: float
    scatter: float
    norm_spread: float
    cosine: float

    def draw(self, rank: int, random: torch.Generator) -> Tensor:
        """Return singular values of one module in falling order, shape (rank,)."""
        exponent = max(0.3, self.decay + self.decay_spread * float(torch.randn((), generator=random)))
        steps = torch.arange(1, rank + 1).log()
        values = torch.exp(-exponent * steps + self.scatter * torch.randn(rank, generator=random))
        norm = math.exp(self.norm_spread * float(torch.randn((), generator=random)))
        return norm * values.sort(descending=True).values / values.norm()

    def shared(self) -> float:
        """Return the cosine of two adapters' first singular vectors that gives `cosine` to their dW."""
        first = 1 / sum(step ** (-2 * self.decay) for step in range(1, 33))
        return math.sqrt(self.cosine / first)


STEEP = Spectrum(decay=1.651, decay_spread=0.432, scatter=0.245, norm_spread=0.292, cosine=0.034)
"""Of 18 adapters of rank 8 that were trained for 100 steps: the fleet of 20 without the two of other ranks."""
FLAT = Spectrum(decay=0.983, decay_spread=0.240, scatter=0.139, norm_spread=0.253, cosine=0.034)
"""Of its adapter of rank 16, trained with rsLoRA: the flattest there is. The cosine is that of the others."""


def measure(adapters: list[Factors], different: list[tuple[int, int]]) -> Spectrum:
    """Fit adapters of one rank.

    Args:
        adapters: Their factors.
        different: Pairs of numbers of adapters whose A started from different seeds; without any, the cosine is 0.
    """
    logs, spreads = [], []
    for factors in adapters:
        values = torch.stack([_singular_values(a, b) for a, b in factors.values()])
        spreads.append(float(values.norm(dim=1).log().std()))
        logs.append((values / values[:, :1]).log())
    pooled = torch.cat(logs)[:, 1:]
    steps = torch.arange(2, pooled.shape[1] + 2).log()
    exponents = -(pooled @ steps) / (steps @ steps)
    cosines = [_cosine(adapters[one], adapters[other]) for one, other in different]
    return Spectrum(
        decay=float(exponents.mean()),
        decay_spread=float(exponents.std()),
        scatter=float((pooled + exponents[:, None] * steps).square().mean().sqrt()),
        norm_spread=sum(spreads) / len(spreads),
        cosine=sum(cosines) / max(1, len(cosines)),
    )


def read(folder: Path) -> tuple[int, Factors]:
    """Return rank and factors of an adapter in PEFT's format."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    rank = int(config["r"])
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return rank, {
        name: (tensors[f"{name}.lora_A.weight"].float(), scale * tensors[f"{name}.lora_B.weight"].float())
        for name in names
    }


def _singular_values(a: Tensor, b: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T)
    return values


def _inner(one: Factors, other: Factors) -> float:
    return sum(
        float(((b.T @ other[name][1]) * (a @ other[name][0].T)).sum()) for name, (a, b) in one.items() if name in other
    )


def _cosine(one: Factors, other: Factors) -> float:
    shared = one.keys() & other.keys()
    one, other = ({name: factors[name] for name in shared} for factors in (one, other))
    return _inner(one, other) / math.sqrt(_inner(one, one) * _inner(other, other))


def _same_start(one: Factors, other: Factors) -> bool:
    """Judge by A, which training moves little: adapters of one seed keep a common start."""
    name = next(name for name in one if name in other)
    a, b = one[name][0].flatten(), other[name][0].flatten()
    return a.shape == b.shape and float(a @ b / (a.norm() * b.norm())) > 0.3


def main() -> None:
    """Print the fit of each rank in a fleet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", type=Path)
    found: dict[int, list[Factors]] = {}
    for config in sorted(parser.parse_args().fleet.glob("*/adapter_config.json")):
        rank, factors = read(config.parent)
        found.setdefault(rank, []).append(factors)
    for rank, adapters in sorted(found.items()):
        pairs = combinations(range(len(adapters)), 2)
        different = [(one, other) for one, other in pairs if not _same_start(adapters[one], adapters[other])]
        fit = {name: round(value, 3) for name, value in asdict(measure(adapters, different)).items()}
        print(json.dumps({"rank": rank, "adapters": len(adapters), "pairs": len(different), **fit}))


if __name__ == "__main__":
    main()
