"""Encode all vectors of a task: the mean precisely, the differences between support sets coarsely.

    ICMT 4 | views (1) | length (4) | per view: which, sets, exponent, slope, two scales (8) | words | checksum (8)

    sets ──cosine transform over the sets──▶ mean, differences ──one step──▶ integers
                                               `── later views: minus the prediction from the first view's mean

All sets describe the same task, so their spread shows how precise one vector is: the quantisation step is 1.3 times the
typical difference, to an eighth of an octave. Rounding moves a set by a fifth of its distance from another set, and the
mean by a sixth of a set's distance from it; drawing other samples would move the mean by more than half that distance.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError, DataError
from icmlora.generator.files.container import add_checksum, check_magic, checked
from icmlora.generator.files.entropy_coding import LIMIT, IntegerReader, IntegerWriter, clip
from icmlora.generator.scales import LARGEST, OCTAVE, SMALLEST
from icmlora.task_vectors.vector import View

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]

_MAGIC = b"ICMT\x04"
_HEAD = struct.Struct("<BI")
_VIEW = struct.Struct("<BBhhbb")
_VIEWS: tuple[View, ...] = get_args(View)  # the order of views in a file, and their numbers
# Median magnitude of a standard normal value. Medians are used because outliers must not set the step.
_TYPICAL = 0.6745
_STEP = 2.0 ** (3 / OCTAVE)  # the step, relative to a typical difference between sets
_SINGLE, _MIN_STEP = 1 / 8, 1 / 64  # relative to a typical value: the step of a single set, and the smallest step
_ONE = 256  # slopes are stored in 256ths
# Values are at most a sixteenth of the largest integer, so differences from a prediction still fit.
_MAX_SLOPE = 15 * _ONE
_MAX_VALUES = 1 << 24  # per file, so that a damaged header cannot request gigabytes
_MAX_EXPONENT = 130 * OCTAVE  # absolute value, for a step


@dataclass(frozen=True)
class _ViewHead:
    """Header of one view: how its integers are encoded."""

    which: int  # number of the view, an index into `_VIEWS`
    sets: int
    exponent: int  # log2 of the step, in eighths
    slope: int  # slope of this view's mean over the first view's, in 256ths, each in its own steps
    mean_scale: int  # scale index of the mean's integers
    spread_scale: int  # scale index of the differences' integers

    def predicted(self, first: Floats) -> Floats:
        """Predict this view's mean from the first view's (length,), as integers that are exact in float64."""
        prediction: Floats = np.floor((self.slope * first + _ONE // 2) / _ONE)
        return prediction

    @property
    def step(self) -> float:
        return float(2.0 ** (self.exponent / OCTAVE))

    def is_sound(self) -> bool:
        """Return whether an encoder could have written this header."""
        scales = (self.mean_scale, self.spread_scale)
        in_range = all(SMALLEST <= scale <= LARGEST for scale in scales) and abs(self.exponent) <= _MAX_EXPONENT
        return in_range and self.sets > 0 and self.which < len(_VIEWS)


def vectors_to_bytes(views: Mapping[View, torch.Tensor]) -> bytes:
    """Encode vectors, view -> float32 (support sets, hidden size); raise `ValueError` if a value is not finite."""
    exact = {view: values.detach().cpu().double().numpy() for view, values in views.items()}
    lengths = {values.shape[-1] for values in exact.values() if values.ndim == 2 and 1 <= len(values) <= 255}
    if len(lengths) != 1 or not all(values.ndim == 2 and np.isfinite(values).all() for values in exact.values()):
        raise ValueError("task vectors are rows of finite values, equally long in every view")
    length = lengths.pop()
    heads, writer = b"", IntegerWriter()
    first = np.zeros(length)
    present = [view for view in _VIEWS if view in exact]
    for view in present:
        head, integers = _quantised(_VIEWS.index(view), exact[view], first)
        writer.write(clip(integers[0] - head.predicted(first)), np.full(length, head.mean_scale, dtype=np.int32))
        writer.write(clip(integers[1:].ravel()), np.full(integers[1:].size, head.spread_scale, dtype=np.int32))
        first = first if heads else integers[0]  # later views are predicted from the first one
        heads += _VIEW.pack(*astuple(head))
    return add_checksum(_MAGIC + _HEAD.pack(len(present), length) + heads + writer.to_bytes())


def vectors_from_bytes(data: bytes) -> dict[View, torch.Tensor]:
    """Read the vectors of a task like `arrays_from_bytes`, but as tensors (support sets, hidden size)."""
    import torch  # slow to import, and not needed for comparing vectors

    return {view: torch.from_numpy(values) for view, values in arrays_from_bytes(data).items()}


def arrays_from_bytes(data: bytes, views: Collection[View] = _VIEWS) -> dict[View, NDArray[np.float32]]:
    """Read the vectors of a task, view -> (support sets, hidden size); raise `DataError` if they are damaged.

    Stops after the last of the requested `views`; the result may include earlier ones.
    """
    content, start = checked(data), len(_MAGIC) + _HEAD.size
    if content is None or len(content) < start:
        raise DataError("not task vectors, or damaged", hint="run `icm vectors --again` to extract them again")
    check_magic(data, _MAGIC, "file of task vectors", DataError)
    count, length = _HEAD.unpack_from(content, len(_MAGIC))
    end = start + count * _VIEW.size
    heads = [_ViewHead(*fields) for fields in _VIEW.iter_unpack(content[start:end])] if end <= len(content) else []
    is_sound = bool(heads) and all(head.is_sound() for head in heads)
    if not is_sound or not 1 <= length * sum(head.sets for head in heads) <= _MAX_VALUES:
        raise DataError("not task vectors: the header is out of range")
    try:
        wanted = [place for place, head in enumerate(heads, 1) if _VIEWS[head.which] in views]
        reader, views = IntegerReader(content[end:]), dict[View, NDArray[np.float32]]()
        first = np.zeros(length)
        for head in heads[: max(wanted, default=0)]:
            mean = reader.read(np.full(length, head.mean_scale, dtype=np.int32)) + head.predicted(first)
            rest = reader.read(np.full((head.sets - 1) * length, head.spread_scale, dtype=np.int32))
            first = first if views else mean
            integers = np.concatenate([mean, rest]).reshape(head.sets, length)
            values = _cosines(head.sets).T @ (integers * head.step)  # (sets, length)
            views[_VIEWS[head.which]] = values.astype(np.float32)
        return views
    except CodeError as error:
        raise DataError(f"not task vectors: {error.message}") from error


def _quantised(which: int, exact: Floats, first: Floats) -> tuple[_ViewHead, Floats]:
    """Quantise one view (sets, length), given the first view's mean in steps (length,), or zeros for that view."""
    # Returns integers (sets, length): the mean in the first row, then differences.
    coefficients = _cosines(len(exact)) @ exact  # (sets, length)
    typical = _typical(exact)
    step = _STEP * _typical(coefficients[1:]) if len(exact) > 1 else _SINGLE * typical
    # The mean must fit the largest scale, and an outlier the largest integer.
    step = max(step, _MIN_STEP * typical, 16 * float(np.abs(coefficients).max(initial=0.0)) / LIMIT, 2.0**-120)
    exponent = round(OCTAVE * np.log2(step))
    steps = coefficients / 2.0 ** (exponent / OCTAVE)  # in units of the stored step
    head = _ViewHead(which, len(exact), exponent, _slope(steps[0], first), 0, _scale(steps[1:]))
    return replace(head, mean_scale=_scale(steps[0] - head.predicted(first))), np.rint(steps)


def _slope(mean: Floats, first: Floats) -> int:
    near, near_first = (np.clip(values, -4 * _typical(values), 4 * _typical(values)) for values in (mean, first))
    slope = float(near @ near_first) / max(float(near_first @ near_first), 1.0)
    return int(np.clip(np.rint(_ONE * slope), -_MAX_SLOPE, _MAX_SLOPE))


def _scale(steps: Floats) -> int:
    return int(np.clip(np.rint(OCTAVE * np.log2(max(_typical(steps), 2.0**-4))), SMALLEST, LARGEST))


def _typical(values: Floats) -> float:
    """Estimate the standard deviation from the median magnitude."""
    return float(np.median(np.abs(values))) / _TYPICAL if values.size else 0.0


@cache  # thousands of files have the same number of sets
def _cosines(sets: int) -> Floats:
    """Return the orthonormal cosine transform (sets, sets): the first row gives the mean, the others differences."""
    angles = np.pi / sets * np.outer(np.arange(sets), np.arange(sets) + 0.5)
    rows: Floats = np.cos(angles) * np.sqrt(2 / sets)
    rows[0] /= np.sqrt(2)
    return rows
