"""A bundle comes back as it was written, and no changed byte of it goes unnoticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from icmlora.bundle.file import MAGIC, bundle_digest, open_bundle, write_bundle
from icmlora.errors import BundleError, IcmLoraError, OtherFormat, OutputExists, UnsafeInput
from registry.manifests import Extra, Vector
from tests.icmlora import bundles


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return bundles.write(tmp_path_factory.mktemp("made") / "fleet.icm").read_bytes()


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path for damaged copies."""
    return tmp_path_factory.mktemp("spoilt") / "fleet.icm"


def read_all(path: Path) -> dict[str, bytes]:
    with open_bundle(path) as bundle:
        bundle.check()
        return {str(part): bundle.read(part) for part in bundle.index.parts}


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = bundles.write(tmp_path / "fleet.icm")
    digest, size, index = bundle_digest(bundles.generator(), bundles.tasks())
    with open_bundle(path) as bundle:
        assert bundle.index == index
        assert (bundle.index.generator, list(bundle.index.tasks)) == (bundles.generator(), bundles.tasks())
        assert bundle.digest == digest
    assert read_all(path).items() >= bundles.BLOBS.items()
    assert path.stat().st_size == size


def test_the_same_index_gives_the_same_bytes(tmp_path: Path) -> None:
    assert bundles.write(tmp_path / "a").read_bytes() == bundles.write(tmp_path / "b").read_bytes()


def test_tasks_of_one_shape_share_their_description(tmp_path: Path) -> None:
    bundle = bundles.opened(bundles.write(tmp_path / "fleet.icm"))
    with open_bundle(tmp_path / "fleet.icm") as file:
        assert len(file.index.parts) == len(bundle.blobs) + 1 + len(bundle.tasks) + 1


@given(st.data())
def test_any_flipped_bit_is_noticed(data: bytes, spoilt: Path, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[at] ^= 1 << draw.draw(st.integers(0, 7))
    spoilt.write_bytes(changed)
    with pytest.raises(BundleError):
        read_all(spoilt)


@given(st.data())
def test_a_bundle_that_is_cut_anywhere_is_refused_when_it_is_opened(
    data: bytes, spoilt: Path, draw: st.DataObject
) -> None:
    spoilt.write_bytes(data[: draw.draw(st.integers(0, len(data) - 1))])
    with pytest.raises(BundleError), open_bundle(spoilt):
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_name(spoilt: Path, junk: bytes) -> None:
    spoilt.write_bytes(MAGIC + junk)
    with pytest.raises(BundleError), open_bundle(spoilt):
        pass


def test_bytes_after_the_last_part_are_refused(data: bytes, spoilt: Path) -> None:
    spoilt.write_bytes(data + b"\0")
    with pytest.raises(BundleError, match="not"), open_bundle(spoilt):
        pass


def test_a_blob_of_other_bytes_is_noticed(tmp_path: Path) -> None:
    path = bundles.write(tmp_path / "fleet.icm")
    data, rust = path.read_bytes(), bundles.CONTENT["rust"]
    path.write_bytes(data.replace(rust, rust[::-1]))
    with pytest.raises(BundleError, match="damaged"):
        read_all(path)


def test_only_the_part_that_is_read_is_hashed(data: bytes, spoilt: Path) -> None:
    spoilt.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with open_bundle(spoilt) as bundle:
        assert bundle.read(bundles.blob("rust")) == bundles.CONTENT["rust"]
        with pytest.raises(BundleError, match="damaged"):
            bundle.read(bundles.blob("sql"))


def test_another_file_is_called_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(BundleError, match="not an icm bundle") as caught, open_bundle(tmp_path / "x.zip"):
        pass
    assert str(tmp_path) in str(caught.value)


def test_a_newer_format_is_named(data: bytes, spoilt: Path) -> None:
    spoilt.write_bytes(b"ICMB\x07" + data[5:])
    with pytest.raises(BundleError, match="has format 7") as caught, open_bundle(spoilt):
        pass
    assert "newer" in (caught.value.hint or "")


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_an_earlier_format_is_named_and_not_called_damaged(data: bytes, spoilt: Path, version: int) -> None:
    spoilt.write_bytes(b"ICMB" + bytes([version]) + data[5:])
    with pytest.raises(OtherFormat, match=r"the bundle was written by icm 0\.x"), open_bundle(spoilt):
        pass


def test_vectors_templates_and_extras_come_back(tmp_path: Path) -> None:
    vectors = [
        Vector(view=view, support_set=0, blob=bundles.blob("card"), dim=3, extractor={"view": view, "base": "a"})
        for view in ("adapted", "context")
    ]
    extras = (
        Extra(blob=bundles.blob("card"), file="tokenizer.json", size=99),
        Extra(blob=bundles.blob("card"), size=5),
    )
    rust = bundles.task("rust", vectors=vectors, template='{"dtype":"F32"}', extras=extras)
    with open_bundle(bundles.write(tmp_path / "fleet.icm", [rust, bundles.task("sql")])) as bundle:
        assert bundle.index.tasks[0] == rust


def test_a_link_to_a_bundle_is_followed(tmp_path: Path) -> None:
    bundles.write(tmp_path / "fleet.icm")
    (tmp_path / "latest.icm").symlink_to("fleet.icm")
    assert read_all(tmp_path / "latest.icm").items() >= bundles.BLOBS.items()


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeInput, match="regular file"), open_bundle(tmp_path / "pipe"):
        pass


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(IcmLoraError, match=r"none\.icm"), open_bundle(tmp_path / "none.icm"):
        pass


def test_a_part_that_is_not_what_the_index_says_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="damaged"):
        list(write_bundle(tmp_path / "fleet.icm", bundles.generator(), bundles.tasks(), lambda digest: b"other"))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_is_not_written_to_its_end_leaves_no_file(tmp_path: Path) -> None:
    writing = write_bundle(tmp_path / "fleet.icm", bundles.generator(), bundles.tasks(), bundles.BLOBS.__getitem__)
    assert next(iter(writing)).size > 0
    del writing
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "fleet.icm"
    path.write_text("mine")
    with pytest.raises(OutputExists) as caught:
        bundles.write(path)
    assert "--force" in (caught.value.hint or "")
    assert path.read_text() == "mine"
    list(write_bundle(path, bundles.generator(), bundles.tasks(), bundles.BLOBS.__getitem__, force=True))
    assert read_all(path).items() >= bundles.BLOBS.items()
