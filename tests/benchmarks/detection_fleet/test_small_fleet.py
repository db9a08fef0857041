"""Three detectors from nothing: trained, coded, measured and recognised. Needs Debian's and npm's registries."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from icmlora import Fleet
from tests.benchmarks.detection_fleet.__main__ import make_base, make_images, make_task
from tests.benchmarks.detection_fleet.held_out import mean_of
from tests.benchmarks.detection_fleet.nanodet import NAME
from tests.benchmarks.detection_fleet.study import LOADER, Icm, measured
from tests.benchmarks.detection_fleet.train import Task

pytestmark = pytest.mark.slow

CLASSES = ["letter", "coin", "fruit"]
STEPS = 40


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fleet whose tasks are in its store, with codes."""
    work = tmp_path_factory.mktemp("detection")
    try:
        make_base(work)
        make_images(work, CLASSES)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the packages cannot be fetched here: {error}")
    for name in CLASSES:
        make_task(work, Task(name), STEPS)
    icm = Icm(work / "store")
    icm("base", "add", NAME, work / "base", "--loader", LOADER)
    icm("ingest", work / "loras", "--device", "cpu")
    icm("train", "--no-eval", "--device", "cpu", "--quality", 7, "--steps", 30)
    return work


def test_codes_detect_what_their_originals_detect(work: Path) -> None:
    tasks = measured(Icm(work / "store"), [f"{name}-detection" for name in CLASSES])
    base, original, code = (
        mean_of([task[source] for task in tasks.values()]) for source in ("base", "original", "code")
    )
    assert original["mAP50"] > base["mAP50"] + 0.2
    assert abs(code["mAP50"] - original["mAP50"]) < 0.04
    assert abs(code["mAP75"] - original["mAP75"]) < 0.06
    assert all(task["code_bytes"] < 0.08 * task["bf16_bytes"] for task in tasks.values())


def test_samples_are_recognised_as_their_class(work: Path) -> None:
    fleet = Fleet(work / "store")
    for name in CLASSES:
        report = fleet.recognize(work / "loras" / f"{name}-detection" / "samples.jsonl", device="cpu")
        assert report.candidates[0].task == f"{name}-detection"
