"""docs/reference/bundle.md names what the code writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icmlora.bundle import file as bundle, index as bundle_index
from icmlora.formats.peft.config import MAX_CONFIG_BYTES
from icmlora.io.safetensors import MAX_FILE_BYTES
from registry.manifests import Extra, Vector
from tests.docs.pages import ROOT, cells_of, codes_in, section_of
from tests.icmlora import bundles

PAGE = ROOT / "docs" / "reference" / "bundle.md"
OPEN = {"config", "metrics", "code.claim.measured.settings", "code.claim.measured.others", "vectors[].extractor"}
"""Objects with any keys."""


def documented(section: str) -> set[str]:
    return {name for row in cells_of(section_of(PAGE, section)) for name in codes_in(row[0])}


def keys_of(value: Any, place: str = "") -> Iterator[str]:
    """Yield the keys of the values in a JSON object, with dots between those of nested ones."""
    if isinstance(value, dict) and place not in OPEN:
        for key, inner in value.items():
            yield from keys_of(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from keys_of(value[0], f"{place}[]")
    else:
        yield place


def test_every_key_of_a_bundle_is_on_the_page(tmp_path: Path) -> None:
    vector = Vector(view="context", support_set=0, blob=bundles.blob("card"), dim=3, extractor={"view": "context"})
    extra = Extra(blob=bundles.blob("card"), file="tokenizer.json", size=9)
    claim = bundles.tasks()[0].code
    assert claim is not None
    more = {"step": 80, "is_generated": True, "format": "mlx", "template": "{}", "extras": (extra,)}
    task = bundles.task("rust", card=bundles.blob("card"), claim=claim.claim, vectors=[vector], **more)
    opened = bundles.opened(bundles.write(tmp_path / "fleet.icm", [task]))
    written = {key for body in (opened.generator, *opened.tasks) for key in keys_of(body)}
    assert documented("Manifests") == written
    assert documented("Directory") == set(bundle_index.Directory._fields)


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    section = section_of(PAGE, "What a reader must refuse")
    limits = [
        (bundle_index.MAX_DIRECTORY_BYTES, "directory above 32 MiB"),
        (bundle_index.MAX_TEXT_BYTES, "manifests above 64 MiB"),
        (MAX_CONFIG_BYTES, "configuration above 1 MiB"),
        (bundle_index.MAX_CARD_BYTES, "card above 64 KiB"),
        (bundle_index.MAX_CODE_BYTES, "code above 1 GiB"),
        (MAX_FILE_BYTES, "generator\n  above 8 GiB"),
        (bundle.MAX_BUNDLE_BYTES, "file above 64 GiB"),
    ]
    units = {"KiB": 10, "MiB": 20, "GiB": 30}
    for value, text in limits:
        number, unit = text.split()[-2:]
        assert value == int(number) << units[unit]
        assert text in section
    assert f"{bundle_index.MAX_TASKS:,} tasks" in section


def test_the_head_has_the_length_that_the_page_gives() -> None:
    assert bundle._HEAD.size == bundles.HEAD == 41
    assert bundle.MAGIC == b"ICMB\x06"
