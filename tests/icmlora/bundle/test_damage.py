"""A real bundle, damaged in every place: it is refused, or gives the very same adapter, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter
from icmlora.bundle.file import open_bundle, write_bundle
from icmlora.errors import BundleError, DataError, IcmLoraError
from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.write.sources import TooLossy
from icmlora.generator.codec.encoding import encode_adapter
from registry.manifests import Claim, Code, File, Task
from tests.icmlora import bundles
from tests.icmlora.small_fleet import BASE, codec, make_adapter, same, trained_file

ORIGINALS = {"rust": make_adapter(0), "sql": make_adapter(1, rank=4)}
CONFIG = b'{"r": 2}'


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with a trained generator and the codes of two adapters."""
    codes = {name: encode_adapter(codec(), adapter, {}).data for name, adapter in ORIGINALS.items()}
    blobs = {hashlib.sha256(part).hexdigest(): part for part in (trained_file(), CONFIG, *codes.values())}

    def file(data: bytes) -> File:
        return File(hashlib.sha256(data).hexdigest(), len(data))

    generator = bundles.generator(base_model=BASE, blob=file(trained_file()), version=1)
    tasks = []
    for name, original in ORIGINALS.items():
        layout = tuple((shape.module, shape.rank, shape.inputs, shape.outputs) for shape in original.layout)
        final = bundles.adapter(
            config=file(CONFIG),
            layout=layout,
            rank_max=max(shape.rank for shape in original.layout),
            parameters=sum(shape.parameters for shape in original.layout),
            target_modules=target_modules(shape.module for shape in original.layout),
        )
        code = Code(blob=file(codes[name]), generator=generator.blob, claim=Claim(squared_error=0.11))
        tasks.append(Task(name=name, base_model=BASE, final=final, code=code, created_at=""))
    path = tmp_path_factory.mktemp("real") / "fleet.icm"
    list(write_bundle(path, generator, tasks, blobs.__getitem__))
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
        rust, sql = (file.read(str(task.code and task.code.blob)) for task in file.index.tasks)
    assert refused_or_the_same(damaged, data.replace(rust, b"@@").replace(sql, rust).replace(b"@@", sql), adapters)


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
