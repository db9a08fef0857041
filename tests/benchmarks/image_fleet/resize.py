"""How small sd-scripts' `networks/resize_lora.py` makes files of kohya's LoRAs, at given errors.

    PYTHON -m tests.benchmarks.image_fleet.resize SD_SCRIPTS FILE ... [--errors 0.1 0.2 ...] [--out FILE.json]

PYTHON has the requirements of sd-scripts (and torch, torchvision). For each method that it has - sv_fro, sv_ratio,
sv_cumulative, and one rank for all - the parameter is sought that makes the smallest file, saved as float16, whose
error ||dW' - dW|| / ||dW|| over the whole adapter is at most the given one.

Which ranks a parameter gives is decided by its own `rank_resize`. What it cuts is the same SVD, but taken from the
factors: its own, of whole matrices of up to 10240 x 1280 with all their vectors, would take hours a file on a CPU.
`--check` compares both, ranks and errors, on the smallest modules of the first file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

Ranks = dict[str, int]
METHODS = ("sv_fro", "sv_ratio", "sv_cumulative")
ERRORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_STEPS = 18
"""Halvings of the interval in which a parameter is sought: 2e-5 of it remain."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One module's dW as it was in the file: U diag(values) V^T.

    Attributes:
        values: Singular values of B A without the scale, as the tool sees them: also those beyond the rank, zeros.
        down: V^T, shape (rank, width).
        up: U diag(values), shape (outputs, rank).
        scale: alpha / rank.
        shapes: Of `lora_down` and `lora_up` in the file.
    """

    values: Tensor
    down: Tensor
    up: Tensor
    scale: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def rank(self) -> int:
        """Return the rank in the file."""
        return self.shapes[0][0]


def cuts_of(path: Path) -> dict[str, Cut]:
    """Take the SVD of each module of a file of kohya's."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    found = {}
    for name in [name.removesuffix(".lora_down.weight") for name in tensors if name.endswith(".lora_down.weight")]:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        a, b = down.flatten(1), up.flatten(1)
        (qa, ra), (qb, rb) = torch.linalg.qr(a.T), torch.linalg.qr(b)
        u, values, vh = torch.linalg.svd(rb @ ra.T)
        padded = torch.zeros(min(a.shape[1], b.shape[0]))
        padded[: len(values)] = values
        scale = float(tensors[f"{name}.alpha"]) / len(values)
        shapes = (tuple(down.shape), tuple(up.shape))
        found[name] = Cut(padded, vh @ qa.T, (qb @ u) * values, scale, shapes)
    return found


def ranks_of(tool: ModuleType, cuts: dict[str, Cut], method: str, parameter: float) -> Ranks:
    """Return the ranks that the tool chooses; the file's own ranks are its limit."""
    return {
        name: tool.rank_resize(cut.values, cut.rank, method, parameter, cut.scale)["new_rank"]
        for name, cut in cuts.items()
    }


def fixed(cuts: dict[str, Cut], rank: int) -> Ranks:
    """Return one rank for all modules, at most that which they have."""
    return {name: min(rank, cut.rank) for name, cut in cuts.items()}


def error_of(cuts: dict[str, Cut], ranks: Ranks) -> float:
    """Return the relative error of cutting modules to these ranks, without that of float16."""
    lost = math.fsum(cut.scale**2 * float(cut.values[ranks[name] :].square().sum()) for name, cut in cuts.items())
    return math.sqrt(lost / math.fsum(cut.scale**2 * float(cut.values.square().sum()) for cut in cuts.values()))


def resized(cuts: dict[str, Cut], ranks: Ranks) -> dict[str, Tensor]:
    """Return the tensors that the tool saves."""
    tensors = {}
    for name, cut in cuts.items():
        rank, (down, up) = ranks[name], cut.shapes
        tensors[f"{name}.lora_down.weight"] = cut.down[:rank].reshape(rank, *down[1:]).half().contiguous()
        tensors[f"{name}.lora_up.weight"] = cut.up[:, :rank].reshape(up[0], rank, *up[2:]).half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(cut.scale * rank).half()
    return tensors


def real_error(cuts: dict[str, Cut], tensors: dict[str, Tensor]) -> float:
    """Return the relative error of tensors as saved: with float16's rounding, of alpha too."""
    lost = norm = 0.0
    for name, cut in cuts.items():
        down, up = tensors[f"{name}.lora_down.weight"].float(), tensors[f"{name}.lora_up.weight"].float()
        scale = float(tensors[f"{name}.alpha"]) / len(down)
        before = torch.cat([cut.scale * cut.up, -scale * up.flatten(1)], 1)
        after = torch.cat([cut.down, down.flatten(1)])
        lost += float(((before.T @ before) * (after @ after.T)).sum())
        norm += float((cut.scale * cut.values).square().sum())
    return math.sqrt(max(0.0, lost) / norm)


def smallest(choose: Callable[[float], Ranks], cuts: dict[str, Cut], low: float, high: float, error: float) -> Ranks:
    """Return the ranks of the smallest parameter that keeps an error; larger parameters are more exact."""
    best = choose(high)
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        ranks = choose(middle)
        if error_of(cuts, ranks) <= error:
            best, high = ranks, middle
        else:
            low = middle
    return best


def measure(tool: ModuleType, path: Path, errors: tuple[float, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """Return by error, by method: bytes of the file and the error it really has."""
    cuts = cuts_of(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    limits = {"sv_fro": (0.05, 1.0), "sv_cumulative": (0.01, 1.0), "sv_ratio": (1.01, 1e4)}
    most = max(cut.rank for cut in cuts.values())
    found: dict[str, dict[str, dict[str, float]]] = {}
    for error in errors:
        chosen = {
            method: smallest(partial(ranks_of, tool, cuts, method), cuts, *limits[method], error) for method in METHODS
        }
        ranks = (fixed(cuts, rank) for rank in range(1, most + 1))
        chosen["fixed"] = next((one for one in ranks if error_of(cuts, one) <= error), fixed(cuts, most))
        for method, kept in chosen.items():
            tensors = resized(cuts, kept)
            figures = {
                "bytes": len(save(tensors, header)),
                "error": round(real_error(cuts, tensors), 5),
                "mean_rank": round(sum(kept.values()) / len(kept), 3),
            }
            found.setdefault(str(error), {})[method] = figures
    return found


def check(tool: ModuleType, path: Path, modules: int = 12) -> dict[str, float]:
    """Compare with the tool itself on the smallest modules: the most that a rank and an error of a module differ."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    cuts = cuts_of(path)
    names = sorted(cuts, key=lambda name: cuts[name].down.shape[1] * cuts[name].up.shape[0])[:modules]
    part = {name: cuts[name] for name in names}
    own = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in part}
    most = max(cut.rank for cut in part.values())
    worst = {"rank": 0.0, "error": 0.0}
    for method, parameter in (("sv_fro", 0.95), ("sv_ratio", 8.0), ("sv_cumulative", 0.8), (None, 2.0)):
        rank = most if method else 2
        theirs, _, _ = tool.resize_lora_model(own, rank, rank, torch.half, "cpu", method, parameter, False)
        kept = ranks_of(tool, part, method, parameter) if method else fixed(part, 2)
        ours = resized(part, kept)
        for name, cut in part.items():
            one = {name: cut}
            worst["rank"] = max(worst["rank"], abs(len(theirs[f"{name}.lora_down.weight"]) - kept[name]))
            worst["error"] = max(worst["error"], abs(real_error(one, theirs) - real_error(one, ours)))
    return {"modules": len(part), **worst}


def load_tool(sd_scripts: Path) -> ModuleType:
    """Import `networks/resize_lora.py` of a checkout."""
    sys.path.append(str(sd_scripts))
    return import_module("networks.resize_lora")


def main() -> None:
    """Measure files, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sd_scripts", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--errors", type=float, nargs="+", default=list(ERRORS))
    parser.add_argument("--check", action="store_true", help="only compare with the tool itself")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    tool = load_tool(options.sd_scripts)
    found: dict[str, object] = {}
    with torch.no_grad():
        if options.check:
            found["check"] = check(tool, options.files[0])
        else:
            for path in options.files:
                found[path.stem] = {
                    "original": path.stat().st_size,
                    "errors": measure(tool, path, tuple(options.errors)),
                }
                print(json.dumps({path.stem: found[path.stem]}), flush=True)
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.check:
        print(text)


if __name__ == "__main__":
    main()
