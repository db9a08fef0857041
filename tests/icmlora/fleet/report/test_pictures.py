"""What sources of image tasks draw, on tiny pipelines of diffusers: the same as the files that icm writes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from icmlora import Fleet
from icmlora.base_models.running.pipeline import Pixels
from icmlora.errors import BaseModelNotFound, DataError
from icmlora.fleet.report.pictures import data_uri, distances
from icmlora.fleet.report.summary import ReportSummary
from tests.icmlora.fleet.image_store import LABEL
from tests.icmlora.formats.tiny_pipelines import tiny_sd15

HOW: dict[str, Any] = {"steps": 2, "image_size": 32, "device": "cpu", "force": True}


@pytest.fixture
def drawn(images: Fleet, tmp_path: Path) -> Callable[..., tuple[ReportSummary, str]]:
    """Return a function that writes a report and returns its summary and the page."""

    def write(*tasks: str, **options: Any) -> tuple[ReportSummary, str]:
        page = tmp_path / "fleet.html"
        return images.report(page, outputs=tasks, **{**HOW, **options}), page.read_text()

    return write


def picture_of(uri: str) -> Pixels:
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_diffusers(file: Path, prompt: str, seed: int) -> Pixels:
    pipe = tiny_sd15()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(file)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    with torch.no_grad():
        image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **size).images[0]
    return np.asarray(np.rint(image * 255), np.uint8)


@pytest.mark.slow
def test_original_and_code_draw_what_diffusers_draws_with_their_files(
    images: Fleet, drawn: Callable[..., tuple[ReportSummary, str]], image_template: Path, tmp_path: Path
) -> None:
    (made,) = drawn("pear")[0].pictures
    images.materialize("pear", tmp_path / "code.safetensors", source="code")
    files = {"original": image_template / "loras" / "pear.safetensors", "code": tmp_path / "code.safetensors"}
    assert made.sources == ["base model", "original", "code"]
    for source, file in files.items():
        for row in made.prompts[0].rows:
            expected = data_uri(by_diffusers(file, made.prompts[0].prompt, row.seed))
            assert row.pictures[source] == expected


@pytest.mark.slow
def test_a_code_is_nearer_to_its_original_than_another_seed(drawn: Callable[..., tuple[ReportSummary, str]]) -> None:
    (made,) = drawn("pear")[0].pictures
    assert made.distances is not None
    assert made.distances.seeds is not None
    assert 0 < made.distances.to_original["code"] < made.distances.to_original["base model"] < made.distances.seeds
    assert made.notes == []


@pytest.mark.slow
def test_prompts_are_what_the_header_notes(drawn: Callable[..., tuple[ReportSummary, str]]) -> None:
    summary, page = drawn("pear")
    assert [found.prompt for found in summary.pictures[0].prompts] == ["pear, red, on a table"]
    assert '<blockquote dir="auto">pear, red, on a table</blockquote>' in page


@pytest.mark.slow
def test_prompts_of_a_file_and_more_seeds_are_more_rows(
    drawn: Callable[..., tuple[ReportSummary, str]], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a pear\na ship\n")
    summary, page = drawn("pear", prompts=tmp_path / "prompts.txt", seeds=3)
    assert [(found.prompt, len(found.rows)) for found in summary.pictures[0].prompts] == [("a pear", 3), ("a ship", 3)]
    assert len(re.findall("<img ", page)) == 2 * 3 * 3


@pytest.mark.slow
def test_the_same_store_gives_the_same_page(drawn: Callable[..., tuple[ReportSummary, str]]) -> None:
    assert drawn("pear", seeds=1)[1] == drawn("pear", seeds=1)[1]


@pytest.mark.slow
def test_an_evicted_original_leaves_base_model_and_code(
    images: Fleet, drawn: Callable[..., tuple[ReportSummary, str]]
) -> None:
    images.evict(["pear"], max_error=0.9)
    (made,) = drawn("pear")[0].pictures
    assert (made.sources, made.distances, made.errors) == (["base model", "code"], None, ())
    assert [found.prompt for found in made.prompts] == ["pear, red, on a table"]


@pytest.mark.slow
def test_blocks_of_the_model_have_their_errors(images: Fleet, drawn: Callable[..., tuple[ReportSummary, str]]) -> None:
    summary, page = drawn("pear")
    groups = {group.group: group.modules for group in summary.pictures[0].errors}
    assert groups == {"attention": 40, "feed_forward": 8, "text_encoder": 6}
    assert summary.pictures[0].errors == images.module_errors("pear")
    assert "Relative error of the code by kind of module" in page


@pytest.mark.slow
def test_a_method_that_diffusers_does_not_load_is_said_and_stops_no_other(
    drawn: Callable[..., tuple[ReportSummary, str]], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a pear\n")
    summary, page = drawn("loha", "pear", prompts=tmp_path / "prompts.txt", seeds=1)
    assert summary.outputs == ["pear"]
    assert summary.failures["loha"].startswith("diffusers cannot load it")
    assert "<b>loha</b> has no outputs: diffusers cannot load it" in page


def test_a_file_without_trigger_words_asks_for_prompts(drawn: Callable[..., tuple[ReportSummary, str]]) -> None:
    with pytest.raises(DataError, match="no trigger words or tags") as caught:
        drawn("loha")
    assert "--prompts" in str(caught.value.hint)


def test_chats_are_no_prompts_for_pictures(drawn: Callable[..., tuple[ReportSummary, str]], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(DataError, match="a chat is not a prompt for a picture"):
        drawn("pear", prompts=tmp_path / "prompts.jsonl")


def test_without_the_pipeline_the_hint_says_how_to_name_one(
    images: Fleet, drawn: Callable[..., tuple[ReportSummary, str]]
) -> None:
    images.forget_base_model(LABEL)
    with pytest.raises(BaseModelNotFound) as caught:
        drawn("pear")
    assert f"icm base add {LABEL} PATH" in str(caught.value.hint)


def test_without_diffusers_the_tasks_are_named(
    drawn: Callable[..., tuple[ReportSummary, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    summary, page = drawn("pear", "plum")
    assert set(summary.failures) == {"pear", "plum"}
    assert "diffusers, which is not installed" in page


@pytest.mark.slow
def test_what_diffusers_passes_over_is_noted(
    drawn: Callable[..., tuple[ReportSummary, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from icmlora.base_models.running import pipeline

    monkeypatch.setattr(pipeline, "dw_norm", lambda adapter: 1.0)
    (made,) = drawn("pear", seeds=1)[0].pictures
    assert [note.partition(":")[0] for note in made.notes] == ["original", "code"]


@pytest.mark.parametrize("option", ["steps", "seeds", "image_size"])
def test_nothing_to_draw_is_refused_before_anything_is_loaded(
    drawn: Callable[..., tuple[ReportSummary, str]], option: str
) -> None:
    with pytest.raises(DataError, match="must be at least 1"):
        drawn("pear", **{option: 0})


def test_one_seed_has_no_distance_between_seeds() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    found = distances({"original": {("a", 0): grey}, "code": {("a", 0): grey + 51}})
    assert found is not None
    assert (found.to_original["code"], found.seeds) == (pytest.approx(0.2), None)


def test_seeds_are_compared_within_a_prompt_only() -> None:
    shades = {("a", 0): 0, ("a", 1): 51, ("b", 0): 255, ("b", 1): 204}
    found = distances({"original": {key: np.full((8, 8, 3), shade, np.uint8) for key, shade in shades.items()}})
    assert found is not None
    assert found.seeds == pytest.approx(0.2)


def test_a_picture_is_scaled_down_to_what_a_page_shows() -> None:
    shown = picture_of(data_uri(np.zeros((600, 1200, 3), np.uint8)))
    assert shown.shape == (256, 512, 3)


def test_a_small_picture_keeps_its_size_and_its_colours() -> None:
    given = np.full((32, 24, 3), (200, 30, 90), np.uint8)
    shown = picture_of(data_uri(given))
    assert shown.shape == given.shape
    assert np.abs(shown.astype(int) - given).max() < 8
