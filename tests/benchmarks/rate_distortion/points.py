"""The operating points of the study, by family; a family is one curve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tests.benchmarks.rate_distortion.cvae_method import CvaeMethod
from tests.benchmarks.rate_distortion.icm_store import IcmStore
from tests.benchmarks.rate_distortion.method import Naive, Point
from tests.benchmarks.rate_distortion.peer_lmzip import Lmzip
from tests.benchmarks.rate_distortion.peer_lorashare import Lorashare
from tests.benchmarks.rate_distortion.peer_vlora import Vlora
from tests.benchmarks.rate_distortion.peers import PeerMethod
from tests.benchmarks.rate_distortion.refined_lattice import RefinedLattice
from tests.benchmarks.rate_distortion.summary import OURS

SEEDS = (0, 1, 2)
# "Full strength" is icm's own correction of a quantiser's scale (docs/results/LOG.md), given to the alternatives too.
NAIVE: dict[str, str] = {
    "bf16": "bf16",
    "int8": "int8",
    "nf4": "nf4",
    "uniform": "4bit 3bit 2bit 1bit 3bitg64",
    "uniform, full strength": "3bitf 2bitf 1bitf",
    "fewer ranks": "svd4 svd2 svd1",
    "fewer ranks and bits": "svd4-int8 svd2-int8 svd1-int8 svd4-4bit svd2-4bit svd1-4bit svd8-3bit svd4-3bit "
    "svd2-3bit svd1-3bit svd8-2bit svd4-2bit svd2-2bit svd1-2bit svd1-1bit",
    "fewer ranks and bits, full strength": "svd8-2bitf svd8-1bitf svd4-3bitf svd4-2bitf svd4-1bitf svd2-3bitf "
    "svd2-2bitf svd2-1bitf svd1-3bitf svd1-2bitf svd1-1bitf",
    "fleet mean": "mean16 mean4-3bit mean1-3bit",
    "fleet mean and residual, full strength": "mean4-3bit+svd4-3bitf mean4-3bit+svd2-3bitf mean4-3bit+svd2-2bitf "
    "mean1-3bit+svd1-2bitf",
    "LoRAQuant": "loraquant3-95 loraquant3-90 loraquant3-70 loraquant2-90 loraquant2-70 loraquant2-30",
    "LoRAQuant, full strength": "loraquant3-90f loraquant3-70f loraquant2-90f loraquant2-30f",
    "LoRDBA": "lordba8 lordba4 lordba1",
    "LoRDBA, full strength": "lordba8f lordba4f lordba1f",
    "LoRDBA, scales of rank channels": "lordba8r lordba4r lordba2r lordba1r",
    "LoRDBA, scales of rank channels, full strength": "lordba8rf lordba4rf lordba2rf lordba1rf",
    "E8 lattice": "e8-1 svd4-e8-1 svd2-e8-2 svd2-e8-1 svd1-e8-2 svd1-e8-1 svd1-e8-0.5",
    "E8 lattice, full strength": "e8-1f svd4-e8-1f svd2-e8-2f svd2-e8-1f svd1-e8-2f svd1-e8-1f svd1-e8-0.5f",
    "E8 lattice by energy, full strength": "e8-1wf e8-0.5wf e8-0.25wf e8-0.15wf e8-0.08wf",
    "joint diagonalisation": "jd16 jd8 jd16-int8 jd16x2-int8 jd32-3bit jd16-3bit jd8-3bit jd16x2-3bit jd8-2bit "
    "jd16diag jd64diag-3bit jd32diag-3bit jd16diag-3bit",
}

# Refined as icm's codes are. No publication has any of it, so the family counts among those at full strength.
REFINED_LATTICES = "e8-0.5wf e8-0.25wf e8-0.15wf"


def all_points(stores: Sequence[Path] = (), cvae_steps: int = 400, base: Path | None = None) -> list[Point]:
    """Return every point, those of the stores first; without a base model none is refined here."""
    points = [Point(OURS, store.name, IcmStore(store)) for store in stores]
    points += [Point(family, name, Naive(name)) for family, names in NAIVE.items() for name in names.split()]
    if base is not None:
        family = "E8 lattice by energy, refined, full strength"
        points += [Point(family, f"{name}-refined", RefinedLattice(name, base)) for name in REFINED_LATTICES.split()]
    points += [Point("lmzip", "lmzip", Lmzip())]
    points += [Point("vlora-dev", f"vlora-k{k}", PeerMethod(Vlora(k))) for k in (1, 2, 4)]
    points += [Point("vlora-dev", f"vlora-k{k}-nf4", PeerMethod(Vlora(k, nf4=True))) for k in (4, 8, 12)]
    points += [Point("lorashare", f"lorashare-k{k}", PeerMethod(Lorashare(k))) for k in (8, 16, 32)]
    return points + [Point("flat CVAE", f"cvae-seed{seed}", CvaeMethod(seed, cvae_steps)) for seed in SEEDS]


def chosen(points: Iterable[Point], patterns: Sequence[str]) -> list[Point]:
    """Return the points whose name or family matches a pattern, as shells match; all without patterns."""
    found = [point for point in points if not patterns or any(_matches(point, pattern) for pattern in patterns)]
    if not found:
        raise SystemExit(f"no method matches {', '.join(patterns)}")
    return found


def _matches(point: Point, pattern: str) -> bool:
    return fnmatchcase(point.name, pattern) or fnmatchcase(point.family, pattern)
