"""Pictures of the report: a pipeline of diffusers on the card draws what it draws on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import Fleet
from tests.device.counts import counting
from tests.icmlora.fleet.image_store import LABEL
from tests.icmlora.formats.image_files import kohya_file
from tests.icmlora.formats.tiny_pipelines import tiny_sd15


@pytest.fixture
def images(tmp_path: Path) -> tuple[Fleet, str]:
    """A fleet of one image adapter with its pipeline, and the name of its task."""
    tiny_sd15().save_pretrained(tmp_path / "sd15", safe_serialization=True)
    fleet = Fleet(tmp_path / "store")
    (task,) = fleet.ingest([kohya_file("sd15")]).done
    fleet.add_base_model(LABEL, tmp_path / "sd15")
    fleet.train(device="cuda", steps=1, refine=0, evaluate=False)
    return fleet, task.task


@pytest.mark.slow
def test_the_report_draws_with_a_pipeline_on_the_card(images: tuple[Fleet, str], tmp_path: Path) -> None:
    (fleet, task), made = images, {}
    for device in ("cuda", "cpu"):
        with counting() as counts:
            summary = fleet.report(
                tmp_path / f"{device}.html", outputs=[task], steps=2, seeds=1, image_size=32, device=device
            )
        assert (counts.operators > 0) == (device == "cuda")
        (made[device],) = summary.pictures
    assert made["cuda"].sources == made["cpu"].sources == ["base model", "original", "code"]
    assert (made["cuda"].notes, made["cpu"].notes) == ([], [])
    far = {device: pictures.distances.to_original for device, pictures in made.items()}
    assert far["cuda"] == pytest.approx(far["cpu"], abs=0.005)
    assert far["cuda"]["base model"] > 0.01
