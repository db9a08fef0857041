"""The study on a tiny fleet, from the command line to the figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from icmlora.base_models.kinds import likelihood as evaluation
from icmlora.formats.discovery.folder import load_adapter
from tests.benchmarks.rate_distortion import judging
from tests.benchmarks.rate_distortion.__main__ import main
from tests.benchmarks.rate_distortion.cache import Cache
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.icm_store import IcmStore
from tests.benchmarks.rate_distortion.judging import Judge, Settings
from tests.benchmarks.rate_distortion.method import Coded, Naive, Point
from tests.benchmarks.rate_distortion.study import PointResult, Study
from tests.benchmarks.rate_distortion.summary import OURS, above_ours, bd_rates, summarise, table
from tests.cli.tiny_fleet import build_ingested, train_store, write_mixed_fleet
from tests.icmlora.tiny_base import write_tiny_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fleet and its base model."""
    folder = tmp_path_factory.mktemp("study")
    write_mixed_fleet(folder / "loras")
    write_tiny_base(folder / "base")
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a loss is computed."""
    calls: list[int] = []
    real = evaluation.nll

    def nll(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[2]))
        return real(*arguments, **options)

    monkeypatch.setattr(judging, "nll", nll)
    return calls


def run(place: Path, tmp_path: Path, *points: Point, settings: Settings | None = None) -> list[PointResult]:
    fleet, cache = FleetFolder(place / "loras"), Cache(tmp_path / "cache.jsonl")
    judge = Judge(place / "base", fleet, settings or Settings(), cache)
    return list(Study(fleet, judge, cache, tmp_path / "work").run(points))


def naive(*names: str) -> list[Point]:
    return [Point("naive", name, Naive(name)) for name in names]


def test_a_fleet_is_every_folder_with_an_adapter_and_held_out_text(place: Path) -> None:
    fleet = FleetFolder(place / "loras")
    assert list(fleet) == ["poems", "rules"]
    assert fleet.bf16_sizes["poems"] == 2 * sum(shape.parameters for shape in fleet["poems"].layout)
    with pytest.raises(SystemExit, match="silent"):
        FleetFolder(place / "loras", ["silent"])


def test_fewer_bytes_are_measured_beside_what_they_lose(place: Path, tmp_path: Path) -> None:
    exact, coarse = map(summarise, run(place, tmp_path, *naive("bf16", "1bit")))
    assert exact.total > coarse.total
    assert exact.dw_error < 1e-4 < coarse.dw_error
    assert exact.gain == pytest.approx(1.0, abs=0.01) or exact.gain != exact.gain


def test_a_second_run_measures_and_encodes_nothing(place: Path, tmp_path: Path, measured: list[int]) -> None:
    first = run(place, tmp_path, *naive("int8"))
    assert len(measured) == 6  # base, original and int8 of two tasks
    assert run(place, tmp_path, *naive("int8")) == first
    assert len(measured) == 6


def test_base_and_original_are_measured_once_for_all_points(place: Path, tmp_path: Path, measured: list[int]) -> None:
    run(place, tmp_path, *naive("int8", "3bit", "2bit"))
    assert len(measured) == 4 + 3 * 2


def test_the_same_weights_are_measured_once_whatever_made_them(
    place: Path, tmp_path: Path, measured: list[int]
) -> None:
    run(place, tmp_path, *naive("svd8-2bit", "svd9-2bit"))
    assert len(measured) == 4 + 2


def test_a_run_that_was_killed_goes_on_with_the_next_task(place: Path, tmp_path: Path, measured: list[int]) -> None:
    run(place, tmp_path, *naive("int8"))
    lines = (tmp_path / "cache.jsonl").read_text().splitlines()
    assert len(lines) == 8  # six losses, two coded tasks
    cut = [line for line in lines if '"rules"' not in line or '"loss"' in line]
    (tmp_path / "cache.jsonl").write_text("\n".join([*cut, lines[-1][:20]]))
    run(place, tmp_path, *naive("int8"))
    assert len(measured) == 6


def test_other_settings_are_other_measurements(place: Path, tmp_path: Path, measured: list[int]) -> None:
    run(place, tmp_path, *naive("int8"))
    run(place, tmp_path, *naive("int8"), settings=Settings(texts=1))
    assert measured[-6:] == [1] * 6


def test_what_gives_the_original_back_is_not_measured(place: Path, tmp_path: Path, measured: list[int]) -> None:
    class Same:
        def identity(self) -> str:
            return "same"

        def code(self, fleet: FleetFolder, work: Path) -> Coded:
            rounded = run_decoded(fleet)
            return Coded(7, dict.fromkeys(fleet, 5), lambda task: rounded[task])

    def run_decoded(fleet: FleetFolder) -> dict[str, Any]:
        return {task: load_adapter(fleet.folder(task)) for task in fleet}

    (result,) = run(place, tmp_path, Point("same", "same", Same()))
    assert summarise(result).total == 17
    assert all(task.dw_error < 1e-4 for task in result.tasks)


def test_a_trained_store_gives_its_bytes_as_they_lie_on_disk(tmp_path: Path) -> None:
    store = build_ingested(tmp_path, vectors=True)
    train_store(store)
    (result,) = run(tmp_path, tmp_path, Point(OURS, "store", IcmStore(store)))
    files = {path.name: path.stat().st_size for path in (store / "blobs").rglob("*") if path.is_file()}
    assert result.shared == files[result.notes["generator"]] + result.notes["database"]
    assert result.notes["database"] > sum(path.stat().st_size for path in (store / "manifests").rglob("*/*"))
    assert all(0 < task.size < sum(files.values()) for task in result.tasks)
    assert all(0 <= task.dw_error < 1 for task in result.tasks)


def summary_of(family: str, share: float, gain: float) -> Any:
    from tests.benchmarks.rate_distortion.summary import PointSummary

    return PointSummary(family, "p", 2, 1, 1000 * share, 1.0, share, share, 0.1, gain, gain - 0.1, "a")


def test_bd_rates_are_against_every_family_and_the_best_of_all() -> None:
    points = [summary_of(OURS, 0.01, 0.8), summary_of(OURS, 0.1, 0.99)]
    points += [summary_of("x", 0.02, 0.8), summary_of("x", 0.2, 0.99), summary_of("y", 0.5, 0.7)]
    rates = bd_rates(points)
    assert rates["x"]["mean"]["rate"] == pytest.approx(-0.5)
    assert rates["best of all"]["worst"]["rate"] == pytest.approx(-0.5)
    assert rates["best as published"]["mean"]["rate"] == pytest.approx(-0.5)
    assert rates["y"]["mean"] is None
    assert bd_rates(points[2:]) == {}


def test_methods_that_were_given_full_strength_are_not_counted_as_published() -> None:
    points = [summary_of(OURS, 0.01, 0.8), summary_of(OURS, 0.1, 0.99)]
    points += [summary_of("x", 0.02, 0.8), summary_of("x", 0.2, 0.99)]
    points += [summary_of("x, full strength", 0.01, 0.8), summary_of("x, full strength", 0.1, 0.99)]
    rates = bd_rates(points)
    assert rates["best of all"]["mean"]["rate"] == pytest.approx(0.0)
    assert rates["best as published"]["mean"]["rate"] == pytest.approx(-0.5)


def test_points_that_beat_icm_at_their_size_are_named() -> None:
    ours = [summary_of(OURS, 0.02, 0.8), summary_of(OURS, 0.1, 0.9)]
    better = [summary_of("x", 0.05, 0.95), summary_of("x", 0.015, 0.3), summary_of("x", 0.2, 0.91)]
    worse = [summary_of("x", 0.05, 0.81), summary_of("x", 0.5, 0.999), summary_of("x", 0.001, 0.5)]
    assert above_ours([*ours, *better, *worse]) == better


def test_the_table_has_a_line_for_each_point() -> None:
    assert "| x | p | 5.00 % | 5.00 % | 0.100 | 0.900 | 0.800 | a |" in table([summary_of("x", 0.05, 0.9)])


def test_half_a_line_of_a_killed_run_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    Cache(path).add("loss", "a", nats=1.0)
    path.write_text(path.read_text() + '{"key": ["loss", "b"], "na')
    cache = Cache(path)
    cache.add("loss", "c", nats=3.0)
    again = Cache(path)
    assert (again.get("loss", "a"), again.get("loss", "b"), again.get("loss", "c")) == (
        {"nats": 1.0},
        None,
        {"nats": 3.0},
    )


def test_the_command_prints_a_table_and_writes_json_and_figures(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, figures = tmp_path / "study.json", tmp_path / "figures"
    arguments = [
        "--fleet",
        place / "loras",
        "--base",
        place / "base",
        "--cache",
        tmp_path / "c.jsonl",
        "--work",
        tmp_path,
    ]
    wanted = ["--methods", "int8,svd[12],fleet mean", "--texts", "1", "--threads", "1", "--out", out]
    main(["--figures", str(figures), *(str(argument) for argument in (*arguments, *wanted))])
    document = json.loads(out.read_text())
    assert {point["name"] for point in document["points"]} == {
        "int8", "svd2", "svd1", "mean16", "mean4-3bit", "mean1-3bit",
    }  # fmt: skip
    assert document["settings"] == {"texts": 1, "max_tokens": 256, "dtype": "float32"}
    assert set(document["points"][0]["by_task"][0]) >= {"task", "size", "dw_error", "retained_gain"}
    assert "| int8 | int8 |" in capsys.readouterr().out
    assert [(figures / name).read_text().count("<svg") for name in ("rates.svg", "rate-distortion.svg")] == [1, 1]


def test_a_default_that_is_not_measured_is_an_error(place: Path) -> None:
    with pytest.raises(SystemExit, match="trained"):
        main(["--fleet", str(place / "loras"), "--base", str(place / "base"), "--threads", "1", "--default", "trained"])


def test_a_method_that_does_not_exist_is_an_error(place: Path) -> None:
    with pytest.raises(SystemExit, match="zstd"):
        main(["--fleet", str(place / "loras"), "--base", str(place / "base"), "--threads", "1", "--methods", "zstd"])
