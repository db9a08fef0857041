"""A bundle from a stranger, with digests that fit: every value that is not as the format says is refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from icmlora.bundle import index as bundle_index
from icmlora.bundle.file import open_bundle
from icmlora.errors import BundleError, UnsafeInput
from registry.encoding import packed
from tests.icmlora import bundles
from tests.icmlora.bundles import Opened

Change = Callable[[Opened], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return bundles.write(tmp_path / "fleet.icm")


def read(path: Path) -> None:
    with open_bundle(path):
        pass


def test_a_forged_bundle_without_a_change_is_read(path: Path) -> None:
    read(bundles.forge(path, lambda bundle: None))


NAMES = ["../../etc/cron.d/x", "/etc/passwd", "a/b", "..", ".hidden", "nul", "", "x\x1b[31m", "\u202egnp", "a" * 129]


@pytest.mark.parametrize("name", [*NAMES, "a\n", "a@2"])
def test_a_name_that_is_no_task_name_is_refused(path: Path, name: str) -> None:
    with pytest.raises((UnsafeInput, BundleError)) as caught:
        read(bundles.forge(path, lambda bundle: bundle.tasks[0].update(name=name)))
    assert not {"\x1b", "\u202e", "\n"} & set(str(caught.value))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".hidden", "", "x\x1b[31m", "a" * 300, "a\n", "con "])
def test_an_extra_whose_file_name_is_not_plain_is_refused(path: Path, name: str) -> None:
    extra = {"blob": f"{bundles.blob('card')}:7", "file": name, "size": 1}
    with pytest.raises((UnsafeInput, BundleError)) as caught:
        read(bundles.forge(path, lambda bundle: bundle.final.update(extras=[extra])))
    assert not {"\x1b", "\n"} & set(str(caught.value))


def in_claim(**values: Any) -> Change:
    return lambda bundle: bundle.tasks[0]["code"]["claim"].update(**values)


def in_measured(**values: Any) -> Change:
    return lambda bundle: bundle.tasks[0]["code"]["claim"]["measured"].update(**values)


CARD = f"{bundles.blob('card')}:7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.tasks.append(b.tasks[0]), "missing, out of order or duplicated"),
        (lambda b: b.tasks[1].update(name="RUST"), "missing, out of order or duplicated"),
        (lambda b: b.tasks.reverse(), "missing, out of order or duplicated"),
        (lambda b: b.tasks.clear(), "missing, out of order or duplicated"),
        (lambda b: b.extra_parts.append(["e" * 64, 0]), "parts"),
        (lambda b: b.extra_parts.append([str(bundles.blob("rust")), 0]), "twice"),
        (lambda b: b.blobs.pop(str(bundles.blob("sql"))), "parts"),
        (lambda b: b.tasks[0]["code"].update(blob="e" * 64 + ":9"), "parts"),
        (lambda b: b.tasks[0]["code"].update(blob=f"{bundles.blob('rust')}:9"), "another size"),
        (lambda b: b.tasks[0]["code"].update(generator=CARD), "another generator"),
        (lambda b: b.tasks[0].pop("code"), "parts"),
        (lambda b: b.tasks[0].update(base_model="acme/other"), "another generator"),
        (lambda b: b.directory.update(more=1), "directory"),
        (lambda b: b.directory.update(generator=None), "directory"),
        (lambda b: b.directory.update(tasks="x"), "directory"),
        (lambda b: b.directory.update(parts=[["e" * 64, -1]]), "directory"),
        (lambda b: b.directory.update(parts=[["e" * 64, 1.0]]), "directory"),
        (lambda b: b.directory.update(parts=[["E" * 64, 1]]), "directory"),
        (lambda b: b.extra_parts.append(["e" * 64, 2**52]), "bytes"),
        (lambda b: b.generator.update(base_model=""), "base model"),
        (lambda b: b.generator.update(version=0), "no valid version"),
        (lambda b: b.generator.update(version=2**60), "no valid version"),
        (lambda b: b.generator.update(start=CARD), "parts|more than"),
        (lambda b: b.generator.update(created_at="today"), "more than a bundle may hold"),
        (lambda b: b.generator.update(version=True), "manifest"),
        (lambda b: b.generator.update(blob="../" + "a" * 61), "manifest"),
        (lambda b: b.generator.update(config=[]), "manifest"),
        (lambda b: b.generator.update(type="base/1", name="x"), "manifest|kinds"),
        (lambda b: b.tasks[0].update(type="task/2"), "format 2"),
        (lambda b: b.tasks[0].update(note="hello"), "more than a bundle may hold"),
        (lambda b: b.tasks[0].update(samples=CARD), "more than a bundle may hold"),
        (lambda b: b.tasks[0].update(tags=["prod"]), "more than a bundle may hold"),
        (lambda b: b.tasks[0].update(aliases={"prod": 1}), "more than a bundle may hold"),
        (lambda b: b.tasks[0].update(pinned=True), "more than a bundle may hold"),
        (lambda b: b.tasks[0].update(version=7), "more than a bundle may hold"),
        (lambda b: b.tasks[0].update(seq=2**62), "more than a bundle may hold"),
        (lambda b: b.tasks[0].update(created_at="today"), "more than a bundle may hold"),
        (lambda b: b.tasks[0].update(unknown=1), "more than a bundle may hold"),
        (lambda b: b.tasks[0]["code"].update(squared_error=1e-9), "more than a bundle may hold"),
        (lambda b: b.tasks[0]["code"].update(effect=0.99), "more than a bundle may hold"),
        (lambda b: b.tasks[0]["code"].update(asked={"keep": 0.9}), "more than a bundle may hold"),
        (lambda b: b.final.update(source="/home/me"), "more than a bundle may hold"),
        (lambda b: b.final.update(tensors_key="00ff"), "more than a bundle may hold"),
        (lambda b: b.final.update(does_nothing=True), "more than a bundle may hold"),
        (lambda b: b.final.update(weights="5" * 64 + ":" + "9" * 19), "impossible size"),
        (lambda b: b.final.update(step=2**62), "step"),
        (lambda b: b.final.pop("evicted_at"), "more than a bundle may hold"),
        (lambda b: b.final.update(initial=CARD), "more than a bundle may hold"),
        (lambda b: b.final.update(step=-1), "step"),
        (lambda b: b.final.update(weights="5" * 64 + ":0"), "size"),
        (lambda b: b.final.update(dtype="F32+F32"), "number format"),
        (lambda b: b.final.update(dtype=""), "number format"),
        (lambda b: b.final.update(dtype="I8"), "number format"),
        (lambda b: b.final.update(format="../peft"), "unknown format"),
        (lambda b: b.final.update(template="[]"), "template"),
        (lambda b: b.final.update(template='{"a":NaN}'), "template"),
        (lambda b: b.final.update(rank_max=5), "contradicts"),
        (lambda b: b.final.update(parameters=1), "contradicts"),
        (lambda b: b.final.update(target_modules=["v_proj"]), "contradicts"),
        (lambda b: b.final.update(extras=[{"blob": CARD, "size": -1}]), "impossible size"),
        (lambda b: b.final.update(extras=[{"blob": "e" * 64 + ":1", "size": 1}]), "parts"),
        (lambda b: b.final.update(layout=[]), "empty"),
        (lambda b: b.final["layout"].append(b.final["layout"][0]), "twice"),
        (lambda b: b.final["layout"][0].append(1), "manifest"),
        (lambda b: b.final["layout"][0].__setitem__(0, "../x"), "module name"),
        (lambda b: b.final["layout"][0].__setitem__(1, 0), "shape"),
        (lambda b: b.final["layout"][0].__setitem__(1, 5000), "shape"),
        (in_claim(squared_error=-0.1), "impossible figure"),
        (in_claim(squared_error="0.1"), "manifest"),
        (in_claim(measured={}), "impossible figure"),
        (in_measured(retained_gain=[]), "impossible figure"),
        (in_measured(settings=3), "impossible figure"),
        (in_measured(value=None), "impossible figure"),
        (in_measured(data="no digest"), "impossible figure"),
    ],
)
def test_a_value_outside_the_format_is_refused_by_name(path: Path, change: Change, message: str) -> None:
    with pytest.raises((BundleError, UnsafeInput), match=message):
        read(bundles.forge(path, change))


@pytest.mark.parametrize(
    "directory",
    [
        b"",
        packed([]),
        packed("nothing"),
        zlib.compress(b"{"),
        zlib.compress(b'{"tasks": NaN}'),
        zlib.compress(b'{"a":' * 4000 + b"1" + b"}" * 4000),
        zlib.compress(b"\xff\xfe"),
    ],
)
def test_a_directory_that_is_no_json_is_refused(path: Path, directory: bytes) -> None:
    with pytest.raises((BundleError, UnsafeInput)):
        read(bundles.write_directory(path, directory, bundles.parts_of(path)))


def test_a_directory_that_inflates_beyond_the_limit_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_index, "MAX_DIRECTORY_BYTES", 1000)
    bomb = zlib.compress(json.dumps({"a": "x" * 100_000}).encode())
    with pytest.raises(UnsafeInput, match="directory"):
        read(bundles.write_directory(path, bomb, b""))


def test_manifests_that_inflate_beyond_the_limit_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_index, "MAX_TEXT_BYTES", 100_000)
    read(path)
    with pytest.raises(UnsafeInput, match="manifest"):
        read(bundles.forge(path, lambda bundle: bundle.generator.update(config={"a": "x" * 200_000})))


@pytest.mark.parametrize("value", ['{"a":1,"a":2}', '"\\ud800"', "[" * 40 + "]" * 40, "1e999", "NaN"])
def test_a_manifest_that_readers_may_disagree_on_is_refused(path: Path, value: str) -> None:
    def change(bundle: Opened) -> None:
        bundle.raw = lambda text: text.replace('"width":32', f'"width":{value}')

    with pytest.raises((BundleError, UnsafeInput)):
        read(bundles.forge(path, change))


def test_a_directory_beyond_the_limit_is_refused_before_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmlora.bundle.file.MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(BundleError, match="declares a directory"):
        read(path)


def test_more_tasks_than_the_limit_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_index, "MAX_TASKS", 1)
    with pytest.raises(UnsafeInput, match="more than 1"):
        read(path)


def test_a_card_that_is_huge_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_index, "MAX_CARD_BYTES", 3)
    with pytest.raises(UnsafeInput, match="more than"):
        read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(value=JSON, draw=st.data())
def test_any_value_in_any_place_is_taken_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, value: object, draw: st.DataObject
) -> None:
    path = bundles.write(tmp_path_factory.mktemp("forged") / "fleet.icm")

    def change(bundle: Opened) -> None:
        place: Any = {"generator": bundle.generator, "tasks": bundle.tasks}
        place = place[draw.draw(st.sampled_from(sorted(place)))]
        while isinstance(place, dict | list) and place:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw.draw(st.sampled_from(list(keys)))
            if not isinstance(place[key], dict | list) or draw.draw(st.booleans()):
                place[key] = value
                break
            place = place[key]

    with suppress(BundleError, UnsafeInput):
        read(bundles.forge(path, change))


@pytest.mark.parametrize("extractor", [{}, {"view": "sideways"}, {"view": "context", "base": "a"}])
def test_vectors_whose_description_is_of_another_view_are_refused(path: Path, extractor: dict[str, str]) -> None:
    vector = {"view": "adapted", "support_set": 0, "blob": CARD, "dim": 3, "extractor": extractor}
    with pytest.raises(BundleError, match="vectors"):
        read(bundles.forge(path, lambda bundle: bundle.tasks[0].update(vectors=[vector])))


def test_vectors_that_are_named_twice_are_refused(path: Path) -> None:
    vector = {"view": "adapted", "support_set": 0, "blob": CARD, "dim": 3, "extractor": {"view": "adapted"}}
    with pytest.raises(BundleError, match="vectors"):
        read(bundles.forge(path, lambda bundle: bundle.tasks[0].update(vectors=[vector, vector])))
