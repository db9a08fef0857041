"""docs/reference/bundle.md names what the code writes."""

from icmlora.bundle import file as bundle
from icmlora.bundle import index as bundle_index
from icmlora.bundle import index as bundle_json
from icmlora.bundle.index import BundledGenerator
from icmlora.formats.peft.config import MAX_CONFIG_BYTES
from icmlora.io.safetensors import MAX_FILE_BYTES
from tests.docs.pages import ROOT, cells_of, codes_in, section_of
from tests.icmlora import bundles

PAGE = ROOT / "docs" / "reference" / "bundle.md"


def test_every_key_of_an_index_is_on_the_page() -> None:
    documented = {name for row in cells_of(section_of(PAGE, "Index")) for name in codes_in(row[0])}
    assert documented == {
        *("base_model", "extractors", "layouts", "parts"),
        *(f"generator.{name}" for name in BundledGenerator.__dataclass_fields__),
        *(f"tasks[].{name}" for name in bundle_index._TASK),
        *(f"tasks[].measured.{name}" for name in bundle_index._MEASURED),
    }


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    section = section_of(PAGE, "What a reader must refuse")
    limits = [
        (bundle_json.MAX_INDEX_BYTES, "index above 32 MiB"),
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
    assert f"{bundle_json.MAX_TASKS:,} tasks" in section


def test_the_head_has_the_length_that_the_page_gives() -> None:
    assert bundle._HEAD.size == bundles.HEAD == 41
    assert bundle.MAGIC == b"ICMB\x05"
