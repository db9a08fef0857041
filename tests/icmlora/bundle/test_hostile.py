"""A bundle from a stranger, with digests that fit: every field that is not as the format says is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icmlora.bundle import index as bundle_json
from icmlora.bundle.file import open_bundle
from icmlora.bundle.index import MAX_CARD_BYTES, BundlePart
from icmlora.errors import BundleError, UnsafeInput
from tests.icmlora import bundles

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return bundles.write(tmp_path / "fleet.icm")


def opened(path: Path) -> None:
    with open_bundle(path):
        pass


def changed(path: Path, change: Change) -> Path:
    fields = bundles.fields_of(path)
    change(fields)
    return bundles.forge(path, fields)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/cron.d/x",
        "/etc/passwd",
        "a/b",
        "..",
        ".hidden",
        "nul",
        "",
        "x\x1b[31m",
        "\u202egnp",
        "a" * 129,
        "a\n",
    ],
)
def test_a_name_that_is_no_task_name_is_refused(path: Path, name: str) -> None:
    with pytest.raises((UnsafeInput, BundleError)) as caught:
        opened(changed(path, lambda fields: fields["tasks"][0].update(name=name)))
    assert not {"\x1b", "\u202e", "\n"} & set(str(caught.value))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".hidden", "", "x\x1b[31m", "a" * 129, "a\n", "con "])
def test_an_extra_whose_file_name_is_not_plain_is_refused(path: Path, name: str) -> None:
    with pytest.raises((UnsafeInput, BundleError)) as caught:
        opened(changed(path, lambda fields: fields["tasks"][0].update(extras=[["e" * 64, name, 1]])))
    assert not {"\x1b", "\n"} & set(str(caught.value))


def test_a_module_name_that_is_a_path_is_refused(path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["layouts"][0][0][0] = "../x"

    with pytest.raises(UnsafeInput, match="module name"):
        opened(changed(path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["tasks"].append(f["tasks"][0]), "missing, out of order or duplicated"),
        (lambda f: f["tasks"][1].update(name="RUST"), "missing, out of order or duplicated"),
        (lambda f: f["tasks"].reverse(), "missing, out of order or duplicated"),
        (lambda f: f.update(tasks=[]), "missing, out of order or duplicated"),
        (lambda f: f["parts"].append(f["parts"][0]), "parts"),
        (lambda f: f["parts"].append(["e" * 64, 1]), "parts"),
        (lambda f: f["parts"].pop(), "parts"),
        (lambda f: f["tasks"][0].update(code="e" * 64), "parts"),
        (lambda f: f.update(more=1), "fields"),
        (lambda f: f.pop("base_model"), "fields"),
        (lambda f: f.update(base_model=""), "base_model"),
        (lambda f: f.update(base_model="x" * 5000), "base_model"),
        (lambda f: f["generator"].update(version=0), "version"),
        (lambda f: f["generator"].update(version=True), "version"),
        (lambda f: f["generator"].update(blob="../" + "a" * 61), "blob"),
        (lambda f: f["generator"].update(config=[]), "config"),
        (lambda f: f["tasks"][0].update(code="A" * 64), "code"),
        (lambda f: f["tasks"][0].update(dw_error="0.1"), "dw_error"),
        (lambda f: f["tasks"][0].update(dw_error=10**4000), "dw_error"),
        (lambda f: f["tasks"][0].update(dw_error=-0.1), "dw_error"),
        (lambda f: f["tasks"][0].update(step=-1), "step"),
        (lambda f: f["tasks"][0].update(step=2**60), "step"),
        (lambda f: f["tasks"][0].update(layout=1), "layout"),
        (lambda f: f["tasks"][0].update(layout=-1), "layout"),
        (lambda f: f["tasks"][0].update(dtype="F32+F32"), "dtype"),
        (lambda f: f["tasks"][0].update(dtype="I8"), "dtype"),
        (lambda f: f["tasks"][0].update(measured=5), "measured"),
        (lambda f: f["tasks"][0]["measured"].update(retained_gain=[]), "retained_gain"),
        (lambda f: f["tasks"][0].update(template=5), "template"),
        (lambda f: f["tasks"][0].update(template="[]"), "template"),
        (lambda f: f["tasks"][0].update(template='{"a":NaN}'), "template"),
        (lambda f: f["tasks"][0].update(extras={}), "extras"),
        (lambda f: f["tasks"][0].update(extras=[["a"]]), "extra"),
        (lambda f: f["tasks"][0].update(extras=[["x", None, 1]]), "extra"),
        (lambda f: f["tasks"][0].update(extras=[["e" * 64, None, -1]]), "extra"),
        (lambda f: f["tasks"][0].update(extras=[["e" * 64, None, 1]]), "parts"),
        (lambda f: f["tasks"][0].update(extras=[["e" * 64, 7, 1]]), "file name"),
        (lambda f: f["layouts"].append([]), "layout"),
        (lambda f: f["layouts"][0].append(f["layouts"][0][0]), "twice"),
        (lambda f: f["layouts"][0][0].append(1), "module"),
        (lambda f: f["layouts"][0][0].__setitem__(1, 0), "q_proj"),
        (lambda f: f["parts"][0].__setitem__(1, -1), "size"),
        (lambda f: f["parts"][0].__setitem__(1, 1.0), "size"),
        (lambda f: f["parts"][0].__setitem__(1, 2**52), "bytes"),
    ],
)
def test_a_field_outside_the_format_is_refused_by_name(path: Path, change: Change, message: str) -> None:
    with pytest.raises((BundleError, UnsafeInput), match=message):
        opened(changed(path, change))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"nothing",
        b'{"tasks": NaN}',
        b'{"tasks": 1, "tasks": 2}',
        b'{"a":' * 40 + b"1" + b"}" * 40,
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
    ],
)
def test_an_index_that_is_no_plain_json_is_refused(path: Path, text: bytes) -> None:
    with pytest.raises((BundleError, UnsafeInput)):
        opened(bundles.forge(path, text))


def test_an_index_beyond_the_limit_is_refused_before_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmlora.bundle.file.MAX_INDEX_BYTES", 100)
    with pytest.raises(BundleError, match="declares an index"):
        opened(path)


def test_more_tasks_than_the_limit_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_json, "MAX_TASKS", 1)
    with pytest.raises(UnsafeInput, match="more than 1"):
        opened(path)


def test_a_rank_beyond_the_limit_is_refused(path: Path) -> None:
    with pytest.raises(UnsafeInput, match="shape"):
        opened(changed(path, lambda fields: fields["layouts"][0][0].__setitem__(1, 5000)))


def test_a_card_that_claims_to_be_huge_is_refused() -> None:
    sizes = {bundles.digest("card"): MAX_CARD_BYTES + 1}
    parts = tuple(BundlePart(part.digest, sizes.get(part.digest, part.size)) for part in bundles.index().parts)
    with pytest.raises(UnsafeInput, match="more than"):
        bundles.index(parts=parts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(value=JSON, draw=st.data())
def test_any_value_in_any_place_is_taken_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, value: object, draw: st.DataObject
) -> None:
    path = bundles.write(tmp_path_factory.mktemp("forged") / "fleet.icm")
    fields = bundles.fields_of(path)
    place: Any = fields
    while isinstance(place, dict | list) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = draw.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or draw.draw(st.booleans()):
            place[key] = value
            break
        place = place[key]
    with suppress(BundleError, UnsafeInput):
        opened(bundles.forge(path, fields))


@pytest.mark.parametrize("vectors", [[], ["5" * 64], ["5" * 64, []], ["5" * 64, [1]], ["x", [0]], ["5" * 64, [0, 0]]])
def test_vectors_that_name_no_part_or_no_extractor_are_refused(path: Path, vectors: list[Any]) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["extractors"] = [{"view": "context"}]
        fields["tasks"][0]["vectors"] = vectors

    with pytest.raises(BundleError):
        opened(changed(path, change))


@pytest.mark.parametrize("extractor", [None, [], {}, {"view": "sideways"}])
def test_an_extractor_without_a_view_is_refused(path: Path, extractor: object) -> None:
    with pytest.raises(BundleError, match="an extractor of the bundle"):
        opened(changed(path, lambda fields: fields.update(extractors=[extractor])))
