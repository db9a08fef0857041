"""The formats and figures in the documents are those of the code."""

import dataclasses
import json
from typing import get_args

from icmlora.adapter.layout import ModuleShape
from icmlora.fewshot import start_file, step
from icmlora.fewshot.meta_training import MetaConfig
from icmlora.fewshot.start import RANK, USUAL_SAMPLES, FewShotStart
from icmlora.formats.discovery import placeholder
from icmlora.generator.codec.code import ABSENT, MAGIC, CodeHead
from icmlora.generator.config import GeneratorConfig, config_for, keep_of, tolerance_of
from icmlora.generator.files import file as versions
from icmlora.generator.scales import OCTAVE
from registry.storage.folder import FORMAT_TEXT, RESERVE_BYTES, StorePaths
from tests.docs.pages import ROOT, cells_of, codes_in, section_of

DESIGN = ROOT / "docs" / "design.md"
FORMATS = ROOT / "docs" / "reference" / "formats.md"
GENERATOR = ROOT / "docs" / "concepts" / "generator.md"
FEW_SHOT = ROOT / "docs" / "concepts" / "few-shot.md"


def test_every_part_of_a_code_is_on_the_page_of_formats() -> None:
    section = section_of(FORMATS, "Code format")
    assert MAGIC.decode() == "ICMC\x05"
    assert "0x05" in codes_in(section)
    assert "255" in section
    assert f"{ABSENT:,}" in section
    rows = [row[2] for row in cells_of(section) if row[1] in ("int16", "int8", "uint8", "UTF-8")]
    names = [row.replace(" ", "_") for row in rows]
    for field, row in zip(dataclasses.fields(CodeHead), names, strict=True):
        assert row.startswith(field.name), "the head's fields, in the order in which they are written"


def test_every_field_of_a_generators_configuration_is_on_the_page_of_formats() -> None:
    section = section_of(FORMATS, "Generator file")
    assert {field.name for field in dataclasses.fields(GeneratorConfig)} <= set(codes_in(section))
    assert versions.MAGIC.decode() == "ICMG\x04"
    assert {"ICMG", "0x04", "0x05", "config", "shapes", "tables"} <= set(codes_in(section))
    assert versions.MAGIC_OF_VERSIONS.decode() == "ICMG\x05"


def test_every_part_of_a_store_is_in_the_design() -> None:
    section = section_of(DESIGN, "Store format")
    paths = StorePaths(ROOT)
    for path in (paths.format, paths.database, paths.blobs, paths.tmp, paths.quarantine, paths.lock, paths.reserve):
        assert path.name in section
    assert FORMAT_TEXT.strip() in section
    assert f"{RESERVE_BYTES >> 10} KiB" in section


def test_the_table_of_qualities_is_that_of_the_code() -> None:
    rows = {row[0]: row[1:] for row in cells_of(section_of(GENERATOR, "Encoding"))}
    assert rows["kept effect"] == [f"{keep_of(quality):g}" for quality in range(1, 9)]
    assert rows["largest weighted error"] == [f"{tolerance_of(quality):g}" for quality in range(1, 9)]


def test_the_table_of_sizes_is_that_of_the_code() -> None:
    rows = {row[0]: row[1:] for row in cells_of(section_of(GENERATOR, "Encoding"))}
    layout = [[ModuleShape("layers.0.q_proj", 2, 8, 8)]]
    for column, fleet in enumerate([(1, 31), (32, 63), (64, 2000)]):
        for tasks in fleet:
            config = config_for("base", layout, tasks=tasks, condition_size=0, quality=4)
            assert rows["width of the decoder (`--width`)"][column] == str(config.width)
            assert rows["embedding"][column] == str(config.embedding)
            assert rows["condition, latent"][column] == str(config.condition) == str(config.latent)
            assert rows["sketch"][column] == str(config.sketch)


def test_every_part_of_a_start_file_is_on_the_page_of_formats() -> None:
    section = section_of(FORMATS, "Start file")
    assert start_file.MAGIC.decode() == "ICMS\x01"
    assert {"ICMS", "0x01"} <= set(codes_in(section))
    keys = {name for row in cells_of(section) for name in codes_in(row[0])}
    assert keys == {field.name for field in dataclasses.fields(FewShotStart)} - {"adapter"}
    assert f"tolerance of {start_file._TOLERANCE}" in section
    assert f"+-{start_file._EXPONENT_LIMIT}" in section
    assert f"{start_file._STEPS_LIMIT} steps" in section
    assert f"{start_file._HEAD_LIMIT >> 20} MiB" in section


def test_the_figures_of_a_step_are_those_of_the_code() -> None:
    section = FEW_SHOT.read_text(encoding="utf-8")
    assert f"P_{step.RANK} / |P_{step.RANK}|" in section
    assert step._DAMPING == 1 / 20  # "raised by a twentieth"
    assert f"log2(K / {USUAL_SAMPLES})) / {OCTAVE})" in section
    assert f"half of the tasks have, with {RANK} directions each" in section
    assert MetaConfig().support == (1, 4, 16)


def test_every_key_of_a_placeholder_is_on_the_page_of_formats() -> None:
    section = section_of(FORMATS, "Placeholder")
    stamp = placeholder.FileStamp("0" * 64, 1)
    file = placeholder.ReplacedFile("a", "weights", stamp)
    code = placeholder.CodeStamp(stamp, stamp)
    whole = placeholder.Placeholder("a", "/", "peft", True, "0" * 64, "0" * 64, (file,), code)
    value = json.loads(placeholder.placeholder_to_json(whole))
    assert {*value, *value["adapter"], *value["files"][0], *value["code"]} <= set(codes_in(section))
    assert {placeholder.PLACEHOLDER_NAME, *get_args(placeholder.Part)} <= set(codes_in(section))
    assert f"{placeholder.MAX_BYTES >> 10} KiB" in section
    assert f"{placeholder.MAX_FILES} files" in section
    assert f"the version, {placeholder.VERSION}" in section
