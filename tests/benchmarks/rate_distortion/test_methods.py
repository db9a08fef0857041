"""The methods that are in the study alone: other packages, and the paper's network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from icmlora.adapter.metrics import squared_error
from tests.benchmarks.rate_distortion.cvae_method import CvaeMethod, code_of, standardised
from tests.benchmarks.rate_distortion.flat_cvae import CHANNELS, FlatCvae
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.method import Coded, Method
from tests.benchmarks.rate_distortion.peer_lmzip import Lmzip
from tests.benchmarks.rate_distortion.peer_lorashare import Lorashare
from tests.benchmarks.rate_distortion.peer_vlora import Vlora
from tests.benchmarks.rate_distortion.peers import PackageMissing, PeerMethod, installed_version, like_groups
from tests.benchmarks.rate_distortion.points import all_points, chosen
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.small_fleet import make_adapter

TINY = (2, 4, 4, 2)


@pytest.fixture
def fleet(tmp_path: Path) -> FleetFolder:
    """Three adapters of one layout and one of another."""
    for seed, name in enumerate(("a", "b", "c")):
        write_lora(tmp_path / "loras" / name, seed=seed, alpha=4)
    write_lora(tmp_path / "loras" / "wide", seed=9, rank=4)
    for folder in (tmp_path / "loras").iterdir():
        (folder / "eval.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    return FleetFolder(tmp_path / "loras")


def errors(coded: Coded, fleet: FleetFolder) -> dict[str, float]:
    return {task: squared_error(fleet[task], coded.decode(task)) for task in fleet}


def installed(method: Method) -> Method:
    try:
        method.identity()
    except PackageMissing as error:
        pytest.skip(str(error))
    return method


def test_adapters_are_grouped_by_rank_and_modules(fleet: FleetFolder) -> None:
    assert like_groups(fleet) == [["a", "b", "c"], ["wide"]]


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(PackageMissing, match="pip install no-such-package-at-all"):
        installed_version("no-such-package-at-all")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", [Vlora(2), Vlora(2, nf4=True), Lorashare(8)], ids=str)
def test_a_package_gives_every_adapter_back(peer: Vlora | Lorashare, fleet: FleetFolder, tmp_path: Path) -> None:
    method = installed(PeerMethod(peer))
    coded = method.code(fleet, tmp_path / "work")
    assert set(coded.sizes) == set(fleet)
    assert coded.shared > 0
    assert coded.notes["alone"] == ["wide"]
    assert all(error < 0.6 for error in errors(coded, fleet).values())


@pytest.mark.filterwarnings("ignore")
def test_lmzip_is_lossless(fleet: FleetFolder, tmp_path: Path) -> None:
    coded = installed(Lmzip()).code(fleet, tmp_path / "work")
    assert all(error < 1e-13 for error in errors(coded, fleet).values())
    assert coded.shared + sum(coded.sizes.values()) == (tmp_path / "work" / "fleet.lmz").stat().st_size


def test_the_papers_network_has_twelve_layers_each_way_and_a_latent_of_256() -> None:
    net = FlatCvae(4096, 3)
    assert sum(isinstance(module, torch.nn.Conv1d) for module in net.encoder.modules()) == len(CHANNELS) == 12
    assert sum(isinstance(module, torch.nn.ConvTranspose1d) for module in net.decoder.modules()) == 12
    rebuilt, mean, log_variance = net(torch.zeros(2, net.length), torch.eye(3)[:2])
    assert (rebuilt.shape, mean.shape, log_variance.shape) == ((2, 4096), (2, 256), (2, 256))


def test_values_are_standardised_and_the_two_moments_counted() -> None:
    adapter = make_adapter(0)
    values, (mean, deviation) = standardised(adapter)
    assert float(values.mean()) == pytest.approx(0, abs=1e-5)
    assert float(values.std()) == pytest.approx(1, abs=1e-5)
    assert len(code_of(adapter)) < 150
    assert deviation > 0
    assert mean == pytest.approx(float(torch.cat([f.reshape(-1) for m in adapter.modules for f in (m.a, m.b)]).mean()))


def test_the_network_learns_two_adapters_by_heart(fleet: FleetFolder, tmp_path: Path) -> None:
    def error(steps: int) -> float:
        pair = FleetFolder(fleet.root, ["a", "b"])
        coded = CvaeMethod(0, steps, TINY).code(pair, tmp_path / str(steps))
        assert coded.shared > 1000
        return sum(errors(coded, pair).values())

    assert error(300) < 0.85 * error(1)


def test_what_was_trained_is_not_trained_again(fleet: FleetFolder, tmp_path: Path) -> None:
    first = CvaeMethod(0, 2, TINY).code(fleet, tmp_path / "work")
    stored = (tmp_path / "work" / "decoder.safetensors").read_bytes()
    again = CvaeMethod(0, 50, TINY).code(fleet, tmp_path / "work")
    assert (first.shared, again.shared) == (len(stored), len(stored))


def test_seeds_differ_and_repeat(fleet: FleetFolder) -> None:
    one, same, other = (CvaeMethod(seed, 2, TINY).train(fleet) for seed in (1, 1, 2))
    assert one == same != other


def test_every_point_of_the_study_has_a_name_of_its_own() -> None:
    points = all_points([Path("a"), Path("b")])
    assert len({point.name for point in points}) == len(points)
    assert [point.name for point in points if point.family == "icm"] == ["a", "b"]
    assert {point.name for point in points if point.family == "flat CVAE"} == {"cvae-seed0", "cvae-seed1", "cvae-seed2"}


def test_points_are_chosen_by_name_or_family_with_wildcards() -> None:
    points = all_points()
    assert [point.name for point in chosen(points, ["svd1-?bit", "lmzip"])] == [
        "svd1-4bit", "svd1-3bit", "svd1-2bit", "svd1-1bit", "lmzip",
    ]  # fmt: skip
    assert chosen(points, []) == points
