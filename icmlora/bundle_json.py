"""A bundle's index as JSON: written so that equal indexes give equal bytes, read as hostile input.

Tasks of one layout, as most of a fleet are, share it: it is listed once and referred to by its number. What follows
from a layout (rank, parameters, target modules) is not written, so that it cannot contradict it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from icmlora.adapter_config import MAX_LABEL, MAX_RANK
from icmlora.bundle_index import BundledGenerator, BundledTask, BundleIndex, Measured, Part
from icmlora.errors import AdapterRefused, BundleError, UnsafeInput
from icmlora.json_fields import Fields, as_count, as_digest, wrong
from icmlora.layout import ModuleShape
from icmlora.names import is_module_name, printable, task_name_problem
from icmlora.strict_json import parse_object
from icmlora.tensorfile import ITEM_BYTES, MAX_DIMENSION

MAX_INDEX_BYTES = 32 * 1024 * 1024
MAX_TASKS = 5_000

_INDEX = ("base_model", "generator", "layouts", "parts", "tasks")
_GENERATOR = tuple(BundledGenerator.__dataclass_fields__)
_TASK = tuple(BundledTask.__dataclass_fields__)
_MEASURED = tuple(Measured.__dataclass_fields__)

Layout = tuple[ModuleShape, ...]


def index_to_json(index: BundleIndex) -> bytes:
    """Serialise an index."""
    layouts = list(dict.fromkeys(task.layout for task in index.tasks))
    numbers = {layout: number for number, layout in enumerate(layouts)}
    fields = {
        "base_model": index.base_model,
        "generator": vars(index.generator),
        "layouts": layouts,
        "parts": [[part.digest, part.size] for part in index.parts],
        "tasks": [_task_fields(task, numbers[task.layout]) for task in index.tasks],
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def index_from_json(data: bytes) -> BundleIndex:
    """Read what `index_to_json` wrote.

    Raises:
        UnsafeInput: Limits broken, duplicate keys, or names that are no names.
        BundleError: Anything else that is not the index of a bundle.
    """
    try:
        parsed = parse_object(data, what="the bundle's index", max_bytes=MAX_INDEX_BYTES)
    except UnsafeInput:
        raise
    except AdapterRefused as error:
        raise BundleError(error.message) from None
    fields = Fields(parsed, _INDEX, "the bundle's index")
    tasks = fields.entries("tasks")
    if len(tasks) > MAX_TASKS:
        raise UnsafeInput(f"the bundle has {len(tasks):,} tasks, more than {MAX_TASKS:,}", kind="limits")
    layouts = [_layout(entry) for entry in fields.entries("layouts")]
    return BundleIndex(
        base_model=fields.text("base_model", MAX_LABEL),
        generator=_generator(fields.mapping("generator")),
        tasks=tuple(_task(entry, layouts) for entry in tasks),
        parts=tuple(_part(entry) for entry in fields.entries("parts")),
    )


def _task_fields(task: BundledTask, layout: int) -> dict[str, Any]:
    measured = None if task.measured is None else vars(task.measured)
    return {**{name: getattr(task, name) for name in _TASK}, "layout": layout, "measured": measured}


def _generator(value: object) -> BundledGenerator:
    fields = Fields(value, _GENERATOR, "the bundle's generator")
    return BundledGenerator(
        blob=fields.digest("blob"),
        version=fields.count("version", least=1),
        config=fields.mapping("config"),
        metrics=fields.mapping("metrics"),
    )


def _task(value: object, layouts: Sequence[Layout]) -> BundledTask:
    fields = Fields(value, _TASK, "a task of the bundle")
    name = fields.text("name", limit=1024)
    if (problem := task_name_problem(name)) is not None:
        raise UnsafeInput(f"{printable(name)!r} is no task name: {problem}", kind="name")
    dtype = fields.text("dtype", limit=64)
    if dtype != "+".join(sorted(set(dtype.split("+")) & ITEM_BYTES.keys())):
        raise wrong(dtype, "a task of the bundle: dtype")
    layout = fields.count("layout")
    if layout >= len(layouts):
        raise wrong(layout, "a task of the bundle: layout")
    return BundledTask(
        name=name,
        code=fields.digest("code"),
        dw_error=fields.optional_number("dw_error"),
        weights=fields.digest("weights"),
        weights_size=fields.count("weights_size", least=1),
        config=fields.digest("config"),
        card=fields.optional_digest("card"),
        dtype=dtype,
        step=fields.optional_count("step"),
        is_generated=fields.flag("is_generated"),
        layout=layouts[layout],
        measured=_measured(fields.optional_mapping("measured")),
    )


def _measured(value: object) -> Measured | None:
    if value is None:
        return None
    fields = Fields(value, _MEASURED, "a measurement of the bundle")
    return Measured(
        data=fields.digest("data"),
        nats_per_token=fields.number("nats_per_token"),
        tokens=fields.count("tokens"),
        utf8_bytes=fields.count("utf8_bytes"),
        retained_gain=fields.optional_number("retained_gain"),
        dw_error=fields.optional_number("dw_error"),
        settings=fields.mapping("settings"),
    )


def _part(value: object) -> Part:
    if not isinstance(value, list) or len(value) != 2:
        raise wrong(value, "a part of the bundle")
    return Part(as_digest(value[0], "a part's digest"), as_count(value[1], "a part's size"))


def _layout(value: object) -> Layout:
    if not isinstance(value, list) or not value:
        raise wrong(value, "a layout of the bundle")
    shapes = tuple(_shape(entry) for entry in value)
    if len({shape.module for shape in shapes}) != len(shapes):
        raise BundleError("a layout of the bundle names a module twice")
    return shapes


def _shape(value: object) -> ModuleShape:
    if not isinstance(value, list) or len(value) != 4:
        raise wrong(value, "a module of the bundle")
    module, rank, inputs, outputs = value
    if not isinstance(module, str) or len(module) > 512 or not is_module_name(module):
        raise UnsafeInput(f"{printable(str(module))!r} is no module name", kind="name")
    sizes = [as_count(size, f"{module} of the bundle", least=1) for size in (rank, inputs, outputs)]
    if sizes[0] > MAX_RANK or max(sizes) > MAX_DIMENSION:
        raise UnsafeInput(f"{module} of the bundle has the shape {sizes}", kind="limits")
    return ModuleShape(module, *sizes)
