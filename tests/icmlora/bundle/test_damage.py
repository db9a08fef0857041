"""A real bundle, damaged in every place: it is refused, or gives the very same adapter, and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter
from icmlora.bundle.file import open_bundle, write_bundle
from icmlora.bundle.index import (
    BundledGenerator,
    BundledMeasurement,
    BundledTask,
    BundleIndex,
    BundlePart,
    index_from_json,
    index_to_json,
)
from icmlora.errors import BundleError, DataError, IcmLoraError
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.write.materialize import TooLossy
from tests.icmlora import bundles
from tests.icmlora.small_fleet import BASE, codec, make_adapter, same, trained_file

ORIGINALS = {"rust": make_adapter(0), "sql": make_adapter(1, rank=4)}
CONFIG = b'{"r": 2}'


def named(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with a trained generator and the codes of two adapters."""
    codes = {name: codec().encode(adapter, {}).data for name, adapter in ORIGINALS.items()}
    parts = [trained_file(), CONFIG, *codes.values()]
    tasks = tuple(
        replace(bundles.task("sql"), name=name, code=named(codes[name]), config=named(CONFIG), layout=adapter.layout)
        for name, adapter in ORIGINALS.items()
    )
    index = BundleIndex(
        BASE,
        BundledGenerator(named(trained_file()), 1, {}, {}),
        tasks,
        tuple(BundlePart(named(part), len(part)) for part in parts),
    )
    path = tmp_path_factory.mktemp("real") / "fleet.icm"
    list(write_bundle(path, index, {named(part): part for part in parts}.__getitem__))
    return path


@pytest.fixture(scope="module")
def adapters(bundle: Path) -> dict[str, Adapter]:
    return {name: Bundle(bundle).load(name) for name in ORIGINALS}


@pytest.fixture(scope="module")
def damaged(bundle: Path) -> Path:
    """Return a path for damaged copies."""
    return bundle.with_name("damaged.icm")


def refused_or_the_same(path: Path, data: bytes, adapters: dict[str, Adapter]) -> bool:
    """Read both adapters from other bytes; return whether they were refused."""
    path.write_bytes(data)
    try:
        read = {name: Bundle(path).load(name) for name in adapters}
    except IcmLoraError:
        return True
    assert all(same(read[name], adapter) for name, adapter in adapters.items())
    return False


def test_the_bundle_gives_both_adapters(bundle: Path, damaged: Path, adapters: dict[str, Adapter]) -> None:
    assert not refused_or_the_same(damaged, bundle.read_bytes(), adapters)
    assert not same(adapters["rust"], adapters["sql"])


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_in_any_part_of_the_file_is_refused(
    bundle: Path, damaged: Path, adapters: dict[str, Adapter], bit: int
) -> None:
    data = bundle.read_bytes()
    # Every byte of the head, and bytes all over the index, the generator and the codes.
    for at in [*range(41), *range(41, len(data), max(1, len(data) // 60)), len(data) - 1]:
        changed = bytearray(data)
        changed[at] ^= 1 << bit
        assert refused_or_the_same(damaged, bytes(changed), adapters), at


def test_a_bundle_that_was_cut_is_refused_wherever_it_ends(
    bundle: Path, damaged: Path, adapters: dict[str, Adapter]
) -> None:
    data = bundle.read_bytes()
    for end in [*range(60), *range(60, len(data), max(1, len(data) // 100)), len(data) - 1]:
        assert refused_or_the_same(damaged, data[:end], adapters), end


@given(draw=st.data())
def test_a_bundle_with_bytes_put_in_left_out_or_copied_is_refused(
    bundle: Path, damaged: Path, adapters: dict[str, Adapter], draw: st.DataObject
) -> None:
    data = bundle.read_bytes()
    begin, end = sorted((draw.draw(st.integers(0, len(data))), draw.draw(st.integers(0, len(data)))))
    new = draw.draw(st.sampled_from([b"", b"\0", data[begin:end] * 2, data[begin:end][::-1], bytes(end - begin)]))
    changed = data[:begin] + new + data[end:]
    assert refused_or_the_same(damaged, changed, adapters) == (changed != data)


def test_two_codes_that_changed_places_are_refused(bundle: Path, damaged: Path, adapters: dict[str, Adapter]) -> None:
    data = bundle.read_bytes()
    with open_bundle(bundle) as file:
        rust, sql = (file.read(task.code) for task in file.index.tasks)
    assert refused_or_the_same(damaged, data.replace(rust + sql, sql + rust), adapters)


def test_a_bundle_that_was_replaced_since_it_was_opened_is_refused(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "fleet.icm"
    path.write_bytes(bundle.read_bytes())
    opened = Bundle(path)
    bundles.write(tmp_path / "other.icm").replace(path)
    with pytest.raises(BundleError, match="replaced"):
        opened.load("rust")


def test_nothing_is_written_from_a_damaged_bundle(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "fleet.icm"
    path.write_bytes(bundle.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match="damaged"):
        Bundle(path).materialize("rust", tmp_path / "adapter")  # its own code is whole
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("name", "hint"), [("rusty", "'rust'"), ("haskell", "icm ls")])
def test_a_task_that_is_not_there_is_named_with_a_hint(bundle: Path, name: str, hint: str) -> None:
    with pytest.raises(DataError, match=name) as caught:
        Bundle(bundle).load(name)
    assert hint in str(caught.value.hint)


def test_a_code_above_the_limit_is_refused_before_it_is_decoded(bundle: Path) -> None:
    with pytest.raises(TooLossy):
        Bundle(bundle).load("RUST", max_error=0.1)
    assert Bundle(bundle).load("RUST", max_error=0.7).modules


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
DIGESTS = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")
NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
ERRORS = st.none() | st.floats(min_value=0, allow_nan=False, allow_infinity=False)
OBJECTS = st.dictionaries(TEXTS, st.none() | st.integers(-(2**53), 2**53) | TEXTS, max_size=3)
SHAPES = st.builds(
    ModuleShape,
    st.from_regex(r"model\.layers\.[0-9]\.[a-z_]{1,8}", fullmatch=True),
    st.integers(1, 64),
    st.integers(1, 4096),
    st.integers(1, 4096),
)
LAYOUTS = st.lists(SHAPES, min_size=1, max_size=4, unique_by=lambda shape: shape.module).map(tuple)
MEASURED = st.builds(
    BundledMeasurement,
    DIGESTS,
    st.floats(0, 20),
    st.integers(0, 2**53),
    st.integers(0, 2**53),
    NUMBERS,
    ERRORS,
    OBJECTS,
)


@st.composite
def indexes(draw: st.DrawFn) -> BundleIndex:
    """Draw any index that a store could export."""
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9]{3,8}", fullmatch=True), min_size=1, max_size=4, unique=True))
    generator = BundledGenerator(draw(DIGESTS), draw(st.integers(1, 2**53)), draw(OBJECTS), draw(OBJECTS))
    tasks = []
    for name in sorted(names):
        fields: dict[str, Any] = {
            "code": draw(DIGESTS),
            "config": draw(DIGESTS),
            "card": draw(st.none() | DIGESTS),
            "weights": draw(DIGESTS),
            "weights_size": draw(st.integers(1, 2**53)),
            "squared_error": draw(ERRORS),
            "dtype": draw(st.sampled_from(["F32", "F16", "BF16", "BF16+F32"])),
            "step": draw(st.none() | st.integers(0, 2**53)),
            "is_generated": draw(st.booleans()),
            "layout": draw(LAYOUTS),
            "measured": draw(st.none() | MEASURED),
        }
        tasks.append(BundledTask(name=name, **fields))
    digests = dict.fromkeys([generator.blob, *(part for task in tasks for part in task.parts)])
    parts = tuple(BundlePart(digest, draw(st.integers(0, 1000))) for digest in digests)
    return BundleIndex(draw(TEXTS), generator, tuple(tasks), parts)


@given(indexes())
def test_any_index_comes_back_from_its_json(index: BundleIndex) -> None:
    text = index_to_json(index)
    assert index_from_json(text) == index
    assert index_to_json(index_from_json(text)) == text
    assert text.isascii()


@given(indexes())
def test_a_task_is_found_in_any_case_and_its_parts_are_in_the_bundle(index: BundleIndex) -> None:
    for task in index.tasks:
        assert index.task(task.name.upper()) is task
        assert set(task.parts) <= index.sizes.keys()
    assert index.task("no-such-task") is None
