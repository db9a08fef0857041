"""Two machines share a store and have the base model in different folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from icmlora import BaseModelNotFound, Fleet
from icmlora.base_models.finding.locations import Location
from icmlora.fleet.context import locate_base
from tests.icmlora.fleet.stores import files_of
from tests.icmlora.tiny_base import LABEL, write_tiny_base

CPU = {"device": "cpu"}


@contextmanager
def machine(folder: Path) -> Iterator[Path]:
    """Work on a machine for a block, which has the base model in a folder of its own; yield that."""
    base = folder / "models" / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        yield base if base.exists() else write_tiny_base(base)


def located(fleet: Fleet) -> Path:
    with fleet.context.open(read_only=True) as store:
        return locate_base(store, LABEL).path


def test_each_finds_the_base_model_where_it_said_and_measures_the_same(learned: Fleet, tmp_path: Path) -> None:
    before, found, gains = files_of(learned.path), [], []
    for name in ("ana", "ben"):
        with machine(tmp_path / name) as base:
            learned.add_base_model(LABEL, base)
            assert (located(learned), [known.path for known in learned.base_models()]) == (base, [base])
            found.append(base)
    assert files_of(learned.path) == before, "what a machine says is no content of the store"
    for name, base in zip(("ana", "ben"), found, strict=True):
        with machine(tmp_path / name):
            assert located(learned) == base
            report = learned.evaluate(["ships"], sources=["code"], again=True, **CPU)
            gains.append(report.done[0].sources["code"].retained_gain)
    assert gains[0] == gains[1] is not None


def test_each_encodes_on_its_own_copy(learned: Fleet, tmp_path: Path) -> None:
    for name, task in (("ana", "ships"), ("ben", "trains")):
        with machine(tmp_path / name) as base:
            learned.add_base_model(LABEL, base)
            (done,) = learned.encode([task], again=True, refine=1, **CPU).done
            assert (done.status, done.reason) == ("encoded", None)


def test_the_place_on_one_machine_is_none_on_another(learned: Fleet, tmp_path: Path) -> None:
    with machine(tmp_path / "ana") as base:
        learned.add_base_model(LABEL, base)
    with machine(tmp_path / "ben"):
        assert [(known.path, known.location) for known in learned.base_models()] == [(None, None)]
        with pytest.raises(BaseModelNotFound):
            learned.evaluate(["ships"], again=True, **CPU)


def test_an_alias_that_one_sets_is_found_by_the_location_that_the_other_has(learned: Fleet, tmp_path: Path) -> None:
    with machine(tmp_path / "ana") as base:
        learned.add_base_model("my/copy", base)
        learned.alias_base_model(LABEL, ["my/copy"])
        assert located(learned) == base
    with machine(tmp_path / "ben") as other:
        (known,) = learned.base_models()
        assert (known.base.name, [label.label for label in known.base.labels], known.path) == (LABEL, ["my/copy"], None)
        learned.add_base_model("my/copy", other)
        learned.add_base_model(LABEL, base)  # the later place counts, whatever the label
        assert [(known.path, known.location) for known in learned.base_models()] == [(base, Location(base))]
        learned.forget_base_model("my/copy")
        assert [known.path for known in learned.base_models()] == [None]
