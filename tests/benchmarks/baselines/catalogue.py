"""Baselines by name: `int8`, `svd4-3bit`, `mean16+svd2-2bit`, `loraquant2-90`, `jd16x4diag-int8`.

QUANTISER              bf16 int8 nf4, or 1bit to 4bit; 3bitg64: one scale per 64 values; 3bitf: at full strength
svdK[-QUANTISER]       the K strongest directions, bf16 by default; svd alone is svd4
meanK[-QUANTISER]      the fleet's mean dW in K directions for every task; mean alone is mean16
meanK[-Q]+svdK[-Q]     the mean, plus each task's difference to it
loraquantB[-SHARE][f]  B bits for the directions with SHARE % of the energy (90), 1 bit for the others
lordbaK[r][f]          signs and scales of the K strongest directions; r: scales of rank channels alone
[svdK-]e8-B[w][f]      the lattice E8 at B bits a value, entropy coded; w: by the energy of directions
jdR[xC][diag][-Q]      joint diagonalisation: R columns, C clusters, full or diagonal cores
"""

from __future__ import annotations

import re

from tests.benchmarks.baselines.baseline import Baseline
from tests.benchmarks.baselines.double_binary import DoubleBinary
from tests.benchmarks.baselines.factors import FleetMean, Plain, Truncation
from tests.benchmarks.baselines.joint import Joint
from tests.benchmarks.baselines.lattice import Lattice
from tests.benchmarks.baselines.mixed_precision import MixedPrecision
from tests.benchmarks.baselines.quantizers import Bf16, Int8, Nf4, Uniform, ValueQuantizer

EXAMPLES = ("bf16", "int8", "nf4", "3bit", "svd4", "svd2-3bit", "mean16", "loraquant2", "jd16", "jd16x4diag")
_SHORT = {"svd": "svd4", "mean": "mean16", "jd": "jd16", "loraquant": "loraquant2"}
_QUANTISER = r"(bf16|int8|nf4|[1-4]bit(?:g[1-9]\d{0,4})?f?)"
_TRUNCATION = re.compile(rf"svd([1-9]\d{{0,3}})(?:-{_QUANTISER})?")
_MEAN = re.compile(rf"mean([1-9]\d{{0,3}})(?:-{_QUANTISER})?(?:\+(svd.+))?")
_MIXED = re.compile(r"loraquant([2-4])(?:-([1-9]\d?|100))?(f)?")
_BINARY = re.compile(r"lordba([1-9]\d{0,3})(r)?(f)?")
_LATTICE = re.compile(r"(?:svd([1-9]\d{0,3})-)?e8-(\d{1,2}(?:\.\d{1,4})?)(w)?(f)?")
_JOINT = re.compile(rf"jd([1-9]\d{{0,3}})(?:x([1-9]\d?))?(diag)?(?:-{_QUANTISER})?")


def baseline_named(name: str) -> Baseline:
    """Return the baseline with this name; raise `ValueError` if there is none."""
    full = _SHORT.get(name, name)
    if re.fullmatch(_QUANTISER, full):
        return Plain(_quantizer(full))
    if match := _TRUNCATION.fullmatch(full):
        return Truncation(int(match[1]), _quantizer(match[2]))
    if match := _MIXED.fullmatch(full):
        return MixedPrecision(int(match[1]), int(match[2] or 90) / 100, full=match[3] is not None)
    if match := _BINARY.fullmatch(full):
        return DoubleBinary(int(match[1]), channels=match[2] is None, full=match[3] is not None)
    if match := _LATTICE.fullmatch(full):
        rank = None if match[1] is None else int(match[1])
        return Lattice(float(match[2]), rank, full=match[4] is not None, by_energy=match[3] is not None)
    if match := _MEAN.fullmatch(full):
        residual = None if match[3] is None else baseline_named(match[3])
        return FleetMean(int(match[1]), _quantizer(match[2]), residual)
    if match := _JOINT.fullmatch(full):
        return Joint(int(match[1]), int(match[2] or 1), match[3] is not None, _quantizer(match[4]))
    raise ValueError(f"unknown baseline {name!r}; examples: {', '.join(EXAMPLES)}")


def _quantizer(name: str | None) -> ValueQuantizer:
    match name:
        case None | "bf16":
            return Bf16()
        case "int8":
            return Int8()
        case "nf4":
            return Nf4()
    bits, _, rest = name.partition("bit")
    group = rest.strip("gf")
    return Uniform(int(bits), int(group) if group else None, full=rest.endswith("f"))
